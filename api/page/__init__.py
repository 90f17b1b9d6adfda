"""The page for people, served at `/`: a static application in the browser over the same REST API as everyone's.

Owns its files, its log-in and the curves in its list; all else it shows comes from the routes of `api.routes`. There
is no build step. Invariants: no text of a job is ever parsed as HTML (the policy forbids it), and no script or style
comes from anywhere but here.
"""

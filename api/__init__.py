"""The HTTP service and what talks to it: routes, problem details, keys, the Python client and the command line.

Owns no state: jobs live in `jobs`, and what a job means in `grpo_core`.
"""

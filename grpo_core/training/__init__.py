"""One run from spec to result, and the class of failure that an error belongs to.

Owns the order of a run's phases; each phase has its own module. Invariant: every run ends with an exit code
that names its class of failure.
"""

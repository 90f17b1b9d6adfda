"""Graders tried on given completions, without a model, in a process with narrow limits.

`requests` reads what is to be graded, `process` starts and ends the process, and `__main__` is what it runs. Invariant:
the process that asks never runs a grader and never parses what one returned except as JSON.
"""

"""Graders: rewards that a job describes as data, in OpenAI's format, beside the recipe's five rewards.

`models` defines their fields, `templates` and `formula` the two small languages in them, `protocol` what a grader must
implement, and `registry` which module implements which type. Invariant: importing this package or one of these modules
imports no library of a grader and nothing that runs a job's code.
"""

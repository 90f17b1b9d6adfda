"""The module that implements each type of grader.

Owns that table. Each module has `make(model, context)`, which returns a `Grader`, or raises `GraderUnavailable` if this
worker cannot run it. Invariant: a grader's libraries are imported only for a job with such a grader.
"""

from __future__ import annotations

from importlib import import_module
from typing import Final

from grpo_core.errors import GrpoError
from grpo_core.reasons import FailureCode
from grpo_core.rewards.graders.models import AnyGrader
from grpo_core.rewards.graders.protocol import ErrorKind, Grader, GraderContext

MODULES: Final = {
    "string_check": "text",
    "text_similarity": "similarity",
    "regex": "text",
    "length": "text",
    "json_schema": "text",
    "math": "mathematics",
    "python": "python",
    "score_model": "judges",
    "label_model": "judges",
    "endpoint": "endpoints",
}
"""Modules of this package by type. `multi` is not among them: its members are made one by one."""


class GraderUnavailable(GrpoError):
    """This worker cannot run a grader. `remedy` says who can do what about it."""

    def __init__(self, code: FailureCode, message: str, remedy: str, *, kind: ErrorKind = "other_error") -> None:
        super().__init__(message)
        self.code, self.remedy = code, remedy
        self.kind: ErrorKind = kind


def make_grader(model: AnyGrader, context: GraderContext) -> Grader:
    """Return the grader, ready for its first row. Raises `GraderUnavailable`."""
    name = f"{__package__}.{MODULES[model.type]}"
    try:
        module = import_module(name)
    except ModuleNotFoundError as error:
        missing = "the grader's own module" if error.name == name else f"the package {error.name}"
        raise GraderUnavailable(
            FailureCode.GRADER_NOT_AVAILABLE,
            f"The grader {context.name} of type {model.type} cannot run on this worker: {missing} is not installed.",
            "Use another grader, or ask the operator to install the worker's graders extra.",
        ) from error
    return module.make(model, context)

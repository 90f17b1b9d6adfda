"""The errors of `grpo_core` and the ways a job can fail.

    GrpoError
    ├── StrictJsonError      text that is not JSON as this project accepts it
    ├── SpecError            a job spec with one or more bad fields (see `spec.problems`)
    ├── DatasetError         a data set that cannot be read or has nothing left to train on
    └── JobFailure           a run that ended badly: class, code, hint, and the child's exit code

Invariant: every failure class has exactly one exit code, so a worker can name the failure of a child that
wrote no error event.
"""

from __future__ import annotations

from dataclasses import dataclass

from grpo_core.reasons import FailureClass, FailureCode

EXIT_DONE = 0
EXIT_CHECKPOINTED = 75
"""The child saved its state and stopped because it was asked to (BSD's EX_TEMPFAIL)."""

EXIT_RANK_LOST = 17
"""Of processes that train together, one died, hung or could not be reached: `infra`, and the others ended with it."""

EXIT_CODES: dict[FailureClass, int] = {
    FailureClass.USER_CONFIG: 10,
    FailureClass.DATASET: 11,
    FailureClass.REWARD: 12,
    FailureClass.OOM: 13,
    FailureClass.NO_SIGNAL: 14,
    FailureClass.DIVERGED: 15,
    FailureClass.INTERNAL: 16,
}
"""Exit codes of the child. Only the worker assigns `infra`, `stalled` and `preempted`."""

RETRYABLE: frozenset[FailureClass] = frozenset({FailureClass.INFRA, FailureClass.PREEMPTED, FailureClass.STALLED})
"""Classes for which another attempt may succeed without a change to the job."""


class GrpoError(Exception):
    """Base of every error raised by `grpo_core`."""


@dataclass(frozen=True, kw_only=True)
class FailureReport:
    """The failure as the owner sees it: stored in the record, the last event and `outcome.json`."""

    failure_class: FailureClass
    code: str
    message: str
    hint: str = ""
    retryable: bool = False

    @classmethod
    def of(
        cls,
        code: str,
        message: str,
        *,
        hint: str = "",
        failure_class: FailureClass | None = None,
        retryable: bool | None = None,
    ) -> FailureReport:
        """The report of a `FailureCode`, or of an error in the data. Class and `retryable` follow from the code."""
        kind = failure_class or FailureCode(code).failure_class
        again = kind in RETRYABLE if retryable is None else retryable
        return cls(failure_class=kind, code=code, message=message, hint=hint, retryable=again)

    def as_dict(self) -> dict[str, object]:
        """The JSON form, with the class under its public name `class`."""
        return {
            "code": self.code,
            "class": self.failure_class,
            "message": self.message,
            "hint": self.hint,
            "retryable": self.retryable,
        }


class JobFailure(GrpoError):
    """A run cannot continue; carries the report for the user and the exit code for the worker."""

    def __init__(self, code: str, message: str, *, hint: str = "", failure_class: FailureClass | None = None) -> None:
        super().__init__(message)
        self.report = FailureReport.of(code, message, hint=hint, failure_class=failure_class)

    @property
    def exit_code(self) -> int:
        """The child's exit status for this failure."""
        if self.report.code == FailureCode.RANK_LOST.value:
            return EXIT_RANK_LOST
        return EXIT_CODES.get(self.report.failure_class, EXIT_CODES[FailureClass.INTERNAL])


def fault(code: FailureCode, message: str) -> JobFailure:
    """A violated invariant: an error of this project or of a library."""
    return JobFailure(
        code,
        message,
        hint="This is an error of the service or of its library versions: install the locked versions, and report it.",
    )


def failure_class_of_exit(code: int) -> FailureClass:
    """The failure class of a child that exited with `code` (negative: killed by that signal) without a report."""
    for name, exit_code in EXIT_CODES.items():
        if exit_code == code:
            return name
    return FailureClass.INFRA if code < 0 or code == EXIT_RANK_LOST else FailureClass.INTERNAL

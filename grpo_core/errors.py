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
from typing import Literal

FailureClass = Literal[
    "user_config",
    "dataset",
    "reward",
    "oom",
    "no_signal",
    "diverged",
    "stalled",
    "preempted",
    "infra",
    "internal",
]

EXIT_DONE = 0
EXIT_CHECKPOINTED = 75
"""The child saved its state and stopped because it was asked to (BSD's EX_TEMPFAIL)."""

EXIT_CODES: dict[FailureClass, int] = {
    "user_config": 10,
    "dataset": 11,
    "reward": 12,
    "oom": 13,
    "no_signal": 14,
    "diverged": 15,
    "internal": 16,
}
"""What the child exits with. `infra`, `stalled` and `preempted` are the worker's to say."""

RETRYABLE: frozenset[FailureClass] = frozenset({"infra", "preempted", "stalled"})
"""Classes another attempt may cure without any change to the job."""


class GrpoError(Exception):
    """Base of every error raised by `grpo_core`."""


@dataclass(frozen=True, kw_only=True)
class FailureReport:
    """What a failed job tells its owner: stored in the record, the last event and `outcome.json`."""

    failure_class: FailureClass
    code: str
    message: str
    hint: str = ""
    retryable: bool = False

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
    """A run that cannot go on; carries the report for the user and the exit code for the worker."""

    def __init__(self, failure_class: FailureClass, code: str, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.report = FailureReport(
            failure_class=failure_class,
            code=code,
            message=message,
            hint=hint,
            retryable=failure_class in RETRYABLE,
        )

    @property
    def exit_code(self) -> int:
        """The child's exit status for this failure."""
        return EXIT_CODES.get(self.report.failure_class, EXIT_CODES["internal"])


def fault(code: str, message: str) -> JobFailure:
    """The failure of a run that came to what must not be: a fault of ours, or of a library's."""
    return JobFailure(
        "internal",
        code,
        message,
        hint="This is a fault of the service or of its library versions: install the locked versions, and report it.",
    )


def failure_class_of_exit(code: int) -> FailureClass:
    """The failure class of a child that exited with `code` (negative: killed by that signal) and said nothing."""
    for name, exit_code in EXIT_CODES.items():
        if exit_code == code:
            return name
    return "infra" if code < 0 else "internal"

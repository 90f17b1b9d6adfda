"""The grader `python`: a job's own function `grade(sample, item)`, in a confined process.

Owns what each of its failures means; `confined` owns the process. Invariant: the training process never runs the code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Final

from grpo_core.reasons import FailureCode
from grpo_core.rewards.graders.confined import (
    UNCONFINED,
    ConfinedProcess,
    ConfinementError,
    LoadError,
    RowFailure,
    is_unconfined,
    why_not_confined,
)
from grpo_core.rewards.graders.models import AnyGrader, GraderLimits, Python
from grpo_core.rewards.graders.protocol import ErrorKind, Grade, GraderContext, GraderRow
from grpo_core.rewards.graders.registry import GraderUnavailable

STEP_SECONDS: Final = 60.0

_KINDS: Final[Mapping[str, ErrorKind]] = {
    "Timeout": "unresponsive_reward_error",
    "Late": "unresponsive_reward_error",
    "Crash": "python_grader_server_error",
    "Start": "python_grader_server_error",
}
_BY_EXECUTION: Final = frozenset({"Timeout", "Crash", "MemoryError"})
"""Failures that a completion can cause in a grader that executes it. They count as its fault if each completion has a
separate process."""


class PythonGrader:
    """One grader in its process."""

    waits = True

    def __init__(self, model: Python, context: GraderContext) -> None:
        self._limits = context.limits
        self._process = confined_process(context, model.source)
        self.printed = ""
        """Start of what it printed while it graded the last rows."""
        _start(self._process, context)

    @property
    def isolation(self) -> Mapping[str, object]:
        """How its process is confined."""
        return self._process.isolation

    def grade(self, rows: Sequence[GraderRow]) -> list[Grade]:
        lines = [row.line for row in rows]
        try:
            outcome = self._process.run(
                lines, row_seconds=self._limits.row_seconds, seconds=self._limits.step_seconds or STEP_SECONDS
            )
        except (ConfinementError, LoadError) as error:  # it started before, so something on this machine has changed
            return [Grade.failed("python_grader_server_error", str(error))] * len(rows)
        self.printed = outcome.printed
        return [
            self._failure(result) if isinstance(result, RowFailure) else Grade(score=result)
            for result in outcome.results
        ]

    def close(self) -> None:
        self._process.close()

    def _failure(self, failure: RowFailure) -> Grade:
        kind: ErrorKind = _KINDS.get(failure.type, "python_grader_runtime_error")
        at = f" ({', '.join(failure.at)})" if failure.at else ""
        message = f"{failure.type}: {failure.message}{at}"
        if self._limits.fresh_process and failure.type in _BY_EXECUTION:
            return Grade.worthless(kind, message)
        return Grade.failed(kind, message)


def make(model: AnyGrader, context: GraderContext) -> PythonGrader:
    """Return the grader with its source loaded. Raises `GraderUnavailable`."""
    assert isinstance(model, Python), "the registry's table"
    return PythonGrader(model, context)


def confined_process(
    context: GraderContext, source: str, *, limits: GraderLimits | None = None, **options: object
) -> ConfinedProcess:
    """Return a process for this source, confined unless the operator turned that off. Raises `GraderUnavailable`."""
    unconfined = is_unconfined(context.environment)
    if not unconfined and (lacking := why_not_confined()):
        raise GraderUnavailable(
            FailureCode.GRADERS_NOT_CONFINED,
            f"The grader {context.name} needs a confined process, which this worker cannot start: {lacking}.",
            f"Use a worker with Linux 5.19 or newer and Landlock. Or its operator sets {UNCONFINED}=1: then the code "
            "of jobs runs with the rights of the training process.",
        )
    process = ConfinedProcess(
        context.name,
        source,
        limits=limits or context.limits,
        environment=context.environment,
        confined=not unconfined,
        **options,  # pyright: ignore[reportArgumentType]
    )
    process.start_seconds = context.start_seconds
    return process


def _start(process: ConfinedProcess, context: GraderContext) -> None:
    try:
        process.start()
    except LoadError as error:
        raise GraderUnavailable(
            FailureCode.GRADER_NOT_LOADED,
            f"The source of the grader {context.name} cannot be loaded: {error}.",
            "Correct the source.",
            kind="python_grader_runtime_error",
        ) from error
    except ConfinementError as error:
        raise GraderUnavailable(
            FailureCode.GRADERS_NOT_CONFINED,
            f"The process of the grader {context.name} cannot be confined: {error}.",
            "Ask the worker's operator to repair this.",
        ) from error


def encode(row: Mapping[str, object]) -> bytes:
    """Encode a row as the line that the process reads."""
    return json.dumps(row).encode() + b"\n"

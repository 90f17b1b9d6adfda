"""The protocol between a run and its graders.

Owns the types that both sides share. Invariant: a grader returns a grade for every row, with a score or with an error
that says what caused it; it raises only if the whole job cannot be graded.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol, runtime_checkable

from grpo_core.rewards.graders.models import GraderLimits

ErrorKind = Literal[
    "formula_parse_error",
    "invalid_variable_error",
    "model_grader_parse_error",
    "model_grader_refusal_error",
    "model_grader_server_error",
    "other_error",
    "python_grader_runtime_error",
    "python_grader_server_error",
    "sample_parse_error",
    "unresponsive_reward_error",
]
"""OpenAI's names, as in the answers of its `POST /graders/run`."""


@dataclass(frozen=True, kw_only=True)
class GraderRow:
    """One completion to grade."""

    sample: Mapping[str, Any]
    """OpenAI's object: `output_text`, `output_tools`, `choices`, and `output_json` if the job has a response format
    (None if this completion does not match it)."""
    item: Mapping[str, Any]
    """Every column of the data set's row."""
    prompt_id: str = ""
    number: int = 0
    """Position in the group, from 0."""
    step: int = 0

    @cached_property
    def line(self) -> bytes:
        """The row as the process of a `python` grader reads it; encoded once for all of a job's."""
        seed = f"{self.step}/{self.prompt_id}/{self.number}"
        return json.dumps({"sample": self.sample, "item": self.item, "seed": seed}).encode() + b"\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class GradeError:
    """Why a grader gave a row no score."""

    kind: ErrorKind
    message: str
    of_completion: bool = False
    """Whether the completion caused the error: then its score is 0. If not, its score is unknown, and
    `rewards.on_error` decides what happens to its group."""

    def as_dict(self) -> dict[str, object]:
        """The record's form."""
        return {"kind": self.kind, "message": self.message, "of_completion": self.of_completion}


@dataclass(frozen=True, slots=True, kw_only=True)
class Grade:
    """A grader's result for one row: a score, an error, or 0 with the error that the completion caused."""

    score: float | None = None
    error: GradeError | None = None
    details: Mapping[str, object] = field(default_factory=dict[str, object])
    """Values recorded beside the score as JSON, such as a judge's reason, tokens and seconds."""

    @staticmethod
    def failed(kind: ErrorKind, message: str) -> Grade:
        """A grade without score, because of an error that the completion did not cause."""
        return Grade(error=GradeError(kind=kind, message=message[:MAX_MESSAGE]))

    @staticmethod
    def worthless(kind: ErrorKind, message: str) -> Grade:
        """A score of 0, because of an error that the completion caused."""
        return Grade(score=0.0, error=GradeError(kind=kind, message=message[:MAX_MESSAGE], of_completion=True))


MAX_MESSAGE = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class GraderContext:
    """The context in which a grader is made, beside its description in the spec."""

    name: str
    """Its name in records and errors; a member of a `multi` is `name.member`."""
    limits: GraderLimits = field(default_factory=GraderLimits)
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)
    """Variables with the operator's judges, allowed hosts, secrets and settings."""
    seed: int = 0
    start_seconds: float = 60.0
    """For starting a process and loading the grader in it, which may import large packages."""


class Grader(Protocol):
    """One grader of a job, while the job runs."""

    waits: bool
    """Whether `grade` waits for another process or machine. Such graders of a job run concurrently, in threads."""

    def grade(self, rows: Sequence[GraderRow]) -> list[Grade]:
        """Return one grade for each row, in order."""
        ...

    def close(self) -> None:
        """Close processes and connections. Called once, also after an error."""
        ...


@runtime_checkable
class Remembers(Protocol):
    """A grader with a memory that a resumed run needs."""

    def state(self) -> dict[str, Any]:
        """What it remembers, as JSON."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Remember what an earlier run's `state` gave. Raises `ValueError`, `TypeError` or `KeyError` for others."""
        ...


class AbsentGrader:
    """Stands for a grader that cannot run here: no row has a score."""

    waits = False

    def __init__(self, kind: ErrorKind, reason: str) -> None:
        self._grade = Grade.failed(kind, reason)

    def grade(self, rows: Sequence[GraderRow]) -> list[Grade]:
        return [self._grade] * len(rows)

    def close(self) -> None:
        """It holds nothing."""

"""What to find among a job's rollouts, and where a reader stands in what was found.

Knows no storage. Invariant: a cursor names the row it stands on by values that never change, not by a number of rows,
so rows that are added behind it or before it neither repeat a row nor hide one; and it fits one list only, the one of
its job, filters and order.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

from grpo_core import strict_json
from jobs.errors import BadCursor

RolloutOrder = Literal["step", "-step", "reward", "-reward", "advantage", "-advantage", "length", "-length"]
FinishReason = Literal["stop", "length"]

COLUMNS = {"step": "step", "reward": "reward_total", "advantage": "advantage", "length": "completion_tokens"}
"""The column behind each order."""


@dataclass(frozen=True, kw_only=True)
class RolloutQuery:
    """Which rollouts of a job, in which order. Filters that are None let everything pass."""

    step: int | None = None
    step_from: int | None = None
    step_to: int | None = None
    """Inclusive, as `step_from`."""
    prompt: str | None = None
    """A prompt_id."""
    reward_lt: float | None = None
    reward_gt: float | None = None
    """Strict bounds of reward_total; one that is no finite number is within none."""
    finish: FinishReason | None = None
    order: RolloutOrder = "step"
    """A minus turns it round. Rows that are equal in it come by step, then as they were drawn; those without a finite
    value come last in either direction."""

    @property
    def column(self) -> str:
        """What is sorted by."""
        return COLUMNS[self.order.removeprefix("-")]

    @property
    def descending(self) -> bool:
        """Whether the largest come first."""
        return self.order.startswith("-")

    @property
    def first_step(self) -> int:
        """No step below it can match."""
        return max(bound for bound in (self.step, self.step_from, 0) if bound is not None)

    @property
    def last_step(self) -> float:
        """No step above it can match; infinite where there is no bound."""
        return min(bound for bound in (self.step, self.step_to, math.inf) if bound is not None)

    def digest(self, job_id: str) -> str:
        """Short name of the list this makes of a job."""
        return hashlib.sha256(f"{job_id} {strict_json.dumps(asdict(self))}".encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Position:
    """A row's place in the order."""

    value: float | None
    """Of the column that is sorted by; None where it is no finite number."""
    step: int
    place: int
    """Within its step, from 0."""


def encode_cursor(position: Position, query: RolloutQuery, job_id: str) -> str:
    """The cursor that leads to what follows a row."""
    body = [query.digest(job_id), position.value, position.step, position.place]
    return base64.urlsafe_b64encode(json.dumps(body, separators=(",", ":")).encode()).decode().rstrip("=")


def decode_cursor(text: str, query: RolloutQuery, job_id: str) -> Position:
    """Where a cursor stands; raises `BadCursor` for any other text, and for a cursor of another list."""
    try:
        body = json.loads(base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True))
    except (binascii.Error, ValueError, RecursionError) as error:
        raise BadCursor("is not a cursor") from error
    values = cast("list[Any]", body) if isinstance(body, list) else []
    if len(values) != 4 or not isinstance(values[0], str) or not _are_numbers(values[1:]):
        raise BadCursor("is not a cursor")
    digest, value, step, place = values
    if digest != query.digest(job_id):
        raise BadCursor("belongs to another job, other filters or another order")
    return Position(value=value, step=step, place=place)


def _are_numbers(values: list[Any]) -> bool:
    value, step, place = values
    # `type`: a bool is an int too.
    is_value = value is None or (type(value) in (int, float) and math.isfinite(value))
    return is_value and all(type(number) is int and 0 <= number < 2**31 for number in (step, place))

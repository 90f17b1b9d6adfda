"""Queries of a job's rollouts, and cursors in their results.

Reads no storage. Invariants: a cursor names its row by values that never change and not by a count of rows, so added
rows neither repeat nor hide a row; and it is valid for one list only, that of its job, filters and order.
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
from grpo_core.reasons import FinishReason
from jobs.errors import BadCursor

RolloutOrder = Literal["step", "-step", "reward", "-reward", "advantage", "-advantage", "length", "-length"]

COLUMNS = {"step": "step", "reward": "reward_total", "advantage": "advantage", "length": "completion_tokens"}
"""The column of each order."""


@dataclass(frozen=True, kw_only=True)
class RolloutQuery:
    """Filters and order of a job's rollouts. A filter of None matches every rollout."""

    step: int | None = None
    step_from: int | None = None
    step_to: int | None = None
    """Last step, inclusive like `step_from`."""
    prompt: str | None = None
    """The prompt_id."""
    reward_lt: float | None = None
    reward_gt: float | None = None
    """Strict bounds of reward_total. A total that is not finite is outside all bounds."""
    finish: FinishReason | None = None
    order: RolloutOrder = "step"
    """A minus reverses the order. Rows with equal values are ordered by step and then as they were sampled; rows
    without a finite value come last in both directions."""

    @property
    def column(self) -> str:
        """The column of the order."""
        return COLUMNS[self.order.removeprefix("-")]

    @property
    def descending(self) -> bool:
        """Whether the largest value comes first."""
        return self.order.startswith("-")

    @property
    def first_step(self) -> int:
        """The first step that can match."""
        return max(bound for bound in (self.step, self.step_from, 0) if bound is not None)

    @property
    def last_step(self) -> float:
        """The last step that can match; infinite without a bound."""
        return min(bound for bound in (self.step, self.step_to, math.inf) if bound is not None)

    def digest(self, job_id: str) -> str:
        """Return a short digest of the job and this query."""
        return hashlib.sha256(f"{job_id} {strict_json.dumps(asdict(self))}".encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Position:
    """A row's position in the order."""

    value: float | None
    """Value of the order's column; None if it is not finite."""
    step: int
    place: int
    """Position within the step, from 0."""


def encode_cursor(position: Position, query: RolloutQuery, job_id: str) -> str:
    """Return the cursor for the rows after a position."""
    body = [query.digest(job_id), position.value, position.step, position.place]
    return base64.urlsafe_b64encode(json.dumps(body, separators=(",", ":")).encode()).decode().rstrip("=")


def decode_cursor(text: str, query: RolloutQuery, job_id: str) -> Position:
    """Return the position of a cursor. Raises `BadCursor` for other text and for a cursor of another list."""
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
    # `type`, because a bool is an int too.
    is_value = value is None or (type(value) in (int, float) and math.isfinite(value))
    return is_value and all(type(number) is int and 0 <= number < 2**31 for number in (step, place))

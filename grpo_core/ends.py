"""The two ends of a run: the steps over which a number is averaged where its start is compared with its end.

Owns how many those are, so that the report, its page, the command line and the demo tell the same. Invariant: the ends
of a run of two steps or more share none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TypeVar

MAX_STEPS: Final = 10
"""Steps of an end, at most a fifth of all."""

Value = TypeVar("Value")


def ends_of(values: Sequence[Value]) -> tuple[Sequence[Value], Sequence[Value]]:
    """The first and the last of a run's values, in order of steps; none where there are none."""
    window = max(1, min(MAX_STEPS, len(values) // 5))
    return values[:window], values[-window:]

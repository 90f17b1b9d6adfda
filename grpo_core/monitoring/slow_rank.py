"""Finds the rank that the others wait for, such as one whose GPU is throttled or used by another process.

Owns what counts as slow; the team of ranks measures how long each one computes, without what it waits. Invariant: one
slow step, or one in which a rank got more to do, is not reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median_low
from typing import Final, NamedTuple

FACTOR: Final = 1.5
STEPS: Final = 10
"""Number of steps in a row in which the same rank must take `FACTOR` times as long as the median of the ranks."""


class Slow(NamedTuple):
    """A rank that drags, with its time and the median of all in its last step, in seconds."""

    rank: int
    seconds: float
    usual: float


class SlowRank:
    """The steps of one run."""

    def __init__(self) -> None:
        self._rank, self._steps = -1, 0

    def note(self, seconds: Sequence[float]) -> Slow | None:
        """Note how long each rank computed in a step; return the slow one once its steps in a row are enough."""
        slowest, usual = max(seconds), median_low(seconds)
        rank = list(seconds).index(slowest) if slowest >= FACTOR * usual and usual > 0 else -1
        self._steps = self._steps + 1 if rank == self._rank else 1
        self._rank = rank
        return Slow(rank, slowest, usual) if rank >= 0 and self._steps == STEPS else None

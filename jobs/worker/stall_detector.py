"""Detects a training process that is running without progress: no new step for many times the usual duration.

Owns the limits and the clock; reads only the sizes of the run folder's files. Invariant: only time during which this
process was awake counts, so that a run is not stalled after its host was suspended.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from grpo_core.reasons import Phase

LONGEST_LOOK_SECONDS = 5.0
"""Longest time between two checks that counts; the rest counts as suspended."""
STEPS_REMEMBERED = 51


@dataclass(frozen=True, kw_only=True)
class StallLimits:
    """When a run counts as stalled."""

    factor: float = 10.0
    """Limit of a step as a multiple of the median step."""
    floor_seconds: float = 600.0
    """Smallest limit of a step."""
    quiet_seconds: float = 3600.0
    """Longest time without an event or output while loading, in the first step and in evaluations."""


class StallDetector:
    """Watches the folder of one run. Call `look` often; `stalled` returns the reason."""

    def __init__(self, folder: Path, limits: StallLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self._steps_file = folder / "metrics.jsonl"
        self._signs = (folder / "events.jsonl", folder / "stderr.log", self._steps_file)
        self._limits = limits
        self._clock = clock
        self._looked_at = clock()
        self._quiet = 0.0
        self._since_step = 0.0
        self._seen = self._sizes()
        self._size = _size(self._steps_file)
        self._durations: deque[float] = deque(maxlen=STEPS_REMEMBERED)
        self._stepping = False
        """Whether a step was finished in this phase: only then the limit of a step applies."""

    def look(self, phase: Phase | None) -> None:
        """Check the files for progress. `phase` is the run's phase."""
        now = self._clock()
        passed, self._looked_at = min(now - self._looked_at, LONGEST_LOOK_SECONDS), now
        self._quiet += passed
        self._since_step += passed
        sizes = self._sizes()
        if sizes != self._seen:
            self._seen, self._quiet = sizes, 0.0
        size = _size(self._steps_file)
        if size > self._size:
            self._note_step(size)
        if phase != Phase.TRAINING:
            self._stepping = False

    def stalled(self) -> str | None:
        """Return why the run is stalled, or None."""
        if self._stepping:
            limit = self._step_limit()
            if self._since_step > limit:
                return f"No step was finished for {self._since_step:.0f} s; the limit was {limit:.0f} s."
        elif self._quiet > self._limits.quiet_seconds:
            return f"The training process wrote nothing for {self._quiet:.0f} s."
        return None

    def _note_step(self, size: int) -> None:
        """Record a step. The first growth of the file does not count: it may be the lines of earlier runs."""
        if self._stepping:
            self._durations.append(self._since_step)
        self._size, self._since_step, self._stepping = size, 0.0, True

    def _step_limit(self) -> float:
        median = statistics.median(self._durations) if self._durations else None
        if median is None:
            return max(self._limits.floor_seconds, self._limits.quiet_seconds)
        return max(self._limits.floor_seconds, self._limits.factor * median)

    def _sizes(self) -> tuple[int, ...]:
        return tuple(_size(path) for path in self._signs)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0

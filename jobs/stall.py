"""Notices a training process that lives and gets nowhere: no new step for many times as long as a step takes.

Owns the limits and the clock; reads only the sizes of the run folder's files. Invariant: only time in which this
process was awake itself counts, so that a host that slept finds no stalled run.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

LONGEST_LOOK_SECONDS = 5.0
"""Between two looks: what is beyond was spent asleep."""
STEPS_REMEMBERED = 51


@dataclass(frozen=True, kw_only=True)
class StallLimits:
    """When a run counts as stalled."""

    factor: float = 10.0
    """Times the median step that the next may take."""
    floor_seconds: float = 600.0
    """And at least so long."""
    quiet_seconds: float = 3600.0
    """How long loading, the first step and evaluations may go on without an event or a line of output."""


class StallWatch:
    """Watches the folder of one run. Call `look` often; `stalled` says why once it is."""

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
        """Whether a step was made in this phase: only then is the next one due soon."""

    def look(self, phase: str | None) -> None:
        """Take note of what has happened since the last time; `phase` is the run's."""
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
        if phase != "training":
            self._stepping = False

    def stalled(self) -> str | None:
        """What is wrong, or None."""
        if self._stepping:
            limit = self._step_limit()
            if self._since_step > limit:
                return f"No step was finished for {self._since_step:.0f} s; the limit was {limit:.0f} s."
        elif self._quiet > self._limits.quiet_seconds:
            return f"Nothing was heard of the training process for {self._quiet:.0f} s."
        return None

    def _note_step(self, size: int) -> None:
        """The first growth may be the lines of a resumed run: it tells nothing of how long a step takes."""
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

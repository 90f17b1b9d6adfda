"""What the rules look at: the steps a run began with, and the latest ones.

Owns how many steps make a window and how two of them are compared. Invariant: the two windows that are compared
share no step, and hold at least `WINDOW_COMPLETIONS` completions each, so that one odd prompt is not a trend.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from grpo_core.rewards import describe
from grpo_core.rewards.tags import CORRECTNESS_PAYS
from grpo_core.spec import JobSpec

WINDOW_STEPS: Final = 10
WINDOW_COMPLETIONS: Final = 128
SOLVED_SHARE: Final = 0.8
"""Share of the most `correctness` can pay from which a model that is sure of itself is no reason to worry."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What the rules read of one step; None where the run does not have it."""

    step: int
    reward: float | None
    correctness: float | None
    """Weighted; None where it is not paid for."""
    zero_variance_share: float | None
    duplicate_share: float | None
    truncated_share: float | None
    tokens: float | None
    """Mean length of a completion."""
    entropy: float | None
    kl: float | None


class History:
    """A run's steps so far, as far as the rules need them; `window` is how many steps are looked at together."""

    def __init__(self, spec: JobSpec) -> None:
        self._iterations = spec.loss.iterations
        self._weight = spec.rewards.weights.correctness
        self.window = max(WINDOW_STEPS, math.ceil(WINDOW_COMPLETIONS * self._iterations / spec.completions_per_step))
        self.correctness_pays = self._weight * CORRECTNESS_PAYS
        """The most, weighted; 0 or less where it is not paid for."""
        self.other_rewards_pay = _other_rewards_pay(spec)
        self.steps = 0
        self.silent_steps = 0
        """Steps in a row, up to the last, without any variance within a group."""
        self.first: list[Reading] = []
        self._latest: deque[Reading] = deque(maxlen=2 * self.window)

    def add(self, metrics: Mapping[str, Any]) -> None:
        """Take the next line of `metrics.jsonl`."""
        reading = self._read(metrics)
        self.steps += 1
        self.silent_steps = self.silent_steps + 1 if reading.zero_variance_share == 1.0 else 0
        if len(self.first) < self.window:
            self.first.append(reading)
        self._latest.append(reading)

    @property
    def recent(self) -> list[Reading]:
        """The last window, or as much of it as there is."""
        return list(self._latest)[-self.window :]

    @property
    def is_full(self) -> bool:
        """Whether there are steps enough to average."""
        return self.steps >= self.window

    @property
    def is_comparable(self) -> bool:
        """Whether the latest steps can be held against the first."""
        return self.steps >= 2 * self.window

    @property
    def last_step(self) -> int:
        return self._latest[-1].step

    def span(self, steps: int | None = None) -> tuple[int, int]:
        """First and last of the latest `steps`, the window's where None."""
        return max(1, self.last_step - (steps or self.window) + 1), self.last_step

    def rollout_step(self, step: int) -> int:
        """The step whose rollouts `step` learnt from."""
        return step - (step - 1) % self._iterations

    def recent_values(self, name: str) -> list[float] | None:
        """A field of each recent step; None unless every one has it, and there is a window of them."""
        return _values(self.recent, name) if self.is_full else None

    def rise(self, name: str) -> Rise | None:
        """How a field's mean has changed from the first window to the last; None where it cannot be said."""
        return _rise(self.first, self.recent, name) if self.is_comparable else None

    def climb(self, name: str) -> Rise | None:
        """As `rise`, from the window before the last: what happens now."""
        return _rise(list(self._latest)[: self.window], self.recent, name) if self.is_comparable else None

    @property
    def is_solved(self) -> bool:
        """Whether nearly every answer is right: then there is nothing left to explore."""
        correctness = _values(self.recent, "correctness")
        return correctness is not None and statistics.fmean(correctness) >= SOLVED_SHARE * self.correctness_pays

    def _read(self, metrics: Mapping[str, Any]) -> Reading:
        raw: Mapping[str, Any] = metrics.get("rewards") or {}
        correctness = raw.get("correctness")
        paid = self._weight > 0 and isinstance(correctness, int | float)
        return Reading(
            step=metrics["step"],
            reward=metrics.get("reward"),
            correctness=self._weight * float(correctness) if paid and correctness is not None else None,
            zero_variance_share=metrics.get("zero_variance_share"),
            duplicate_share=metrics.get("duplicate_share"),
            truncated_share=metrics.get("truncated_share"),
            tokens=metrics.get("completion_tokens_mean"),
            entropy=metrics.get("entropy"),
            kl=metrics.get("kl"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Rise:
    """The change of a mean; negative where it fell."""

    before: float
    after: float
    error: float
    """Standard error of the difference."""

    @property
    def by(self) -> float:
        return self.after - self.before

    def is_beyond(self, errors: float) -> bool:
        """Whether it rose by more than so many standard errors."""
        return self.by > max(errors * self.error, 1e-9)


def _values(readings: Sequence[Reading], name: str) -> list[float] | None:
    found = [getattr(reading, name) for reading in readings]
    return None if any(value is None for value in found) else found


def _rise(first: Sequence[Reading], last: Sequence[Reading], name: str) -> Rise | None:
    before, after = _values(first, name), _values(last, name)
    if before is None or after is None:
        return None
    return Rise(before=statistics.fmean(before), after=statistics.fmean(after), error=_error(before, after))


def _error(before: Sequence[float], after: Sequence[float]) -> float:
    return math.sqrt(statistics.variance(before) / len(before) + statistics.variance(after) / len(after))


def _other_rewards_pay(spec: JobSpec) -> float:
    """The most that all rewards but correctness can pay together."""
    weights = spec.rewards.weights.model_dump()
    return sum(
        max(0.0, weights[info.name] * info.most) for info in describe(spec.rewards.mode) if info.name != "correctness"
    )

"""The data for the rules: the first steps of a run and the latest ones.

Owns the size of a window and the comparison of two windows. Invariant: the two windows that are compared share no step,
and hold at least `WINDOW_COMPLETIONS` completions each, so that one odd prompt is not a trend.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from grpo_core.rewards import describe
from grpo_core.spec import JobSpec

WINDOW_STEPS: Final = 10
WINDOW_COMPLETIONS: Final = 128
SOLVED_SHARE: Final = 0.8
"""Share of the maximum of right answers from which a confident model is no reason to warn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """The metrics of one step that rules use; None if the run does not have them."""

    step: int
    reward: float | None
    correctness: float | None
    """Weighted; None if its weight is not positive."""
    zero_variance_share: float | None
    duplicate_share: float | None
    truncated_share: float | None
    tokens: float | None
    """Mean length of a completion."""
    entropy: float | None
    kl: float | None


class History:
    """A run's steps so far, as far as the rules need them; `window` is the number of steps in a window."""

    def __init__(self, spec: JobSpec) -> None:
        self._iterations = spec.loss.iterations
        self.measure = spec.rewards.measure
        """The reward that stands for right answers."""
        self._weight = spec.rewards.weights.by_name.get(self.measure, 0.0)
        self.window = max(WINDOW_STEPS, math.ceil(WINDOW_COMPLETIONS * self._iterations / spec.completions_per_step))
        self.correctness_pays = self._weight * (_most(spec, self.measure) or 0.0)
        """The weighted maximum; 0 or less if its weight is not positive."""
        self.other_rewards_pay = _other_rewards_pay(spec)
        self.steps = 0
        self.silent_steps = 0
        """Steps in a row, up to the last, without any variance within a group."""
        self.first: list[Reading] = []
        self._latest: deque[Reading] = deque(maxlen=2 * self.window)

    def add(self, metrics: Mapping[str, Any]) -> None:
        """Add the next line of `metrics.jsonl`."""
        reading = self._read(metrics)
        self.steps += 1
        self.silent_steps = self.silent_steps + 1 if reading.zero_variance_share == 1.0 else 0
        if len(self.first) < self.window:
            self.first.append(reading)
        self._latest.append(reading)

    @property
    def recent(self) -> list[Reading]:
        """The last window, or all steps if there are fewer."""
        return list(self._latest)[-self.window :]

    @property
    def is_full(self) -> bool:
        """Whether there are enough steps to average."""
        return self.steps >= self.window

    @property
    def is_comparable(self) -> bool:
        """Whether the latest steps can be compared with the first."""
        return self.steps >= 2 * self.window

    @property
    def last_step(self) -> int:
        return self._latest[-1].step

    def span(self, steps: int | None = None) -> tuple[int, int]:
        """First and last of the latest `steps` steps; of the window if None."""
        return max(1, self.last_step - (steps or self.window) + 1), self.last_step

    def rollout_step(self, step: int) -> int:
        """The step whose rollouts `step` trained on."""
        return step - (step - 1) % self._iterations

    def recent_values(self, name: str) -> list[float] | None:
        """A field of each step in the last window; None unless every one has it and the window is full."""
        return _values(self.recent, name) if self.is_full else None

    def rise(self, name: str) -> Rise | None:
        """The change of a field's mean from the first window to the last; None if it cannot be computed."""
        return _rise(self.first, self.recent, name) if self.is_comparable else None

    def climb(self, name: str) -> Rise | None:
        """Like `rise`, but from the previous window to the last."""
        return _rise(list(self._latest)[: self.window], self.recent, name) if self.is_comparable else None

    @property
    def is_solved(self) -> bool:
        """Whether nearly every answer is correct, so that nothing is left to explore."""
        correctness = _values(self.recent, "correctness")
        return correctness is not None and statistics.fmean(correctness) >= SOLVED_SHARE * self.correctness_pays

    def _read(self, metrics: Mapping[str, Any]) -> Reading:
        raw: Mapping[str, Any] = metrics.get("rewards") or {}
        correctness = raw.get(self.measure)
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
    """The change of a mean; negative if it fell."""

    before: float
    after: float
    error: float
    """Standard error of the difference."""

    @property
    def by(self) -> float:
        return self.after - self.before

    def is_beyond(self, errors: float) -> bool:
        """Whether it rose by more than this number of standard errors."""
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
    return math.sqrt(_variance(before) / len(before) + _variance(after) / len(after))


def _variance(values: Sequence[float]) -> float:
    """In floats: `statistics.variance` computes with fractions, and takes ten times as long at every step."""
    mean = statistics.fmean(values)
    return math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)


def _most(spec: JobSpec, name: str) -> float | None:
    """The most that a reward can be, raw; None where only its author knows."""
    if name in spec.rewards.graders:
        return spec.rewards.graders[name].bounds[1]
    return next(info.most for info in describe(spec.rewards.mode) if info.name == name)


def _other_rewards_pay(spec: JobSpec) -> float:
    """The maximum of all rewards together, except the one that judges answers; 0 if unknown."""
    paid = {name: weight for name, weight in spec.rewards.weights.by_name.items() if weight > 0}
    paid.pop(spec.rewards.measure, None)
    most = {name: _most(spec, name) for name in paid}
    if None in most.values():
        return 0.0
    return sum(max(0.0, weight * (most[name] or 0.0)) for name, weight in paid.items())

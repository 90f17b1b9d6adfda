"""The evaluations of one run in order of steps: when they are due, which step is best, and when training may end.

Owns the schedule, the points of the curve and their file `evaluations.jsonl`; `held_out` asks the questions. Every
point is of the same questions. Invariant: a step has one point, also in a run that resumes, and the best step is always
one of an adapter, the earliest with the largest value.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Final, Literal

from grpo_core.evaluation.generate import EvaluationItem
from grpo_core.evaluation.paired_stats import Interval, mean_interval, wilson_interval
from grpo_core.run_dir.records import RECORD_VERSION
from grpo_core.schedule import COST_SHARE, MEASURED_STEPS, fixed_interval, spaced
from grpo_core.spec import JobSpec

ACCURACY: Final = "strict_accuracy"
"""The metric of a job that defines no rewards: right, and in the required format."""

StopReason = Literal["target_reached", "no_better"]


def spread(count: int, rows: int) -> list[int]:
    """The places of `count` rows, spread evenly over all."""
    return [place * rows // count for place in range(count)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One evaluation: a line of `evaluations.jsonl`."""

    step: int
    """Optimizer steps of the adapter; 0 is the base model."""
    questions: int
    metric: str
    """What decides the best step: `strict_accuracy`, a reward, or `total`."""
    value: float | None
    """Its mean; None where a grader failed on all."""
    interval: Interval | None
    """95 % interval of `value`."""
    strict_accuracy: float
    strict_interval: Interval
    lenient_accuracy: float
    lenient_interval: Interval
    strict_format_share: float
    completion_tokens: float
    seconds: float

    @staticmethod
    def of(step: int, items: Sequence[EvaluationItem], metric: str | None, seconds: float) -> Point:
        """Summarise the answers; `metric` is the job's own, if it has one."""
        count = len(items)
        strict, lenient = sum(item.strict for item in items), sum(item.lenient for item in items)
        strict_interval = wilson_interval(strict, count)
        value, interval = strict / count, strict_interval
        if metric is not None:
            values = [found for item in items if (found := item.value_of(metric)) is not None]
            value, interval = (statistics.fmean(values) if values else None), mean_interval(values)
        return Point(
            step=step,
            questions=count,
            metric=metric or ACCURACY,
            value=value,
            interval=interval,
            strict_accuracy=strict / count,
            strict_interval=strict_interval,
            lenient_accuracy=lenient / count,
            lenient_interval=wilson_interval(lenient, count),
            strict_format_share=statistics.fmean(item.strict_format for item in items),
            completion_tokens=statistics.fmean(item.completion_tokens for item in items),
            seconds=round(seconds, 3),
        )

    @staticmethod
    def read(line: Mapping[str, Any]) -> Point:
        """A point from JSON; what a later release added is left out."""
        known: dict[str, Any] = {field.name: line[field.name] for field in fields(Point)}
        for name in ("interval", "strict_interval", "lenient_interval"):
            known[name] = None if known[name] is None else tuple(known[name])
        return Point(**known)

    def as_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)


class Curve:
    """The evaluations of one run. `add` each, in order of steps."""

    def __init__(self, spec: JobSpec) -> None:
        self._spec = spec
        self.points: list[Point] = []
        self.stopped: StopReason | None = None
        """Why training ends, or ended, before its last step."""
        self.every = fixed_interval(spec)
        """Steps between two evaluations; None until it is known."""
        self._durations: list[float] = []

    @property
    def best(self) -> Point | None:
        """The best evaluation of an adapter so far; the earliest among equals."""
        return max(self._of_adapters(), key=_value, default=None)

    @property
    def best_step(self) -> int | None:
        """Its step."""
        return None if self.best is None else self.best.step

    def has(self, step: int) -> bool:
        """Whether a step was evaluated."""
        return any(point.step == step for point in self.points)

    def add(self, point: Point) -> None:
        """Take an evaluation; a later one of the same step replaces the earlier."""
        self.points = sorted([*(p for p in self.points if p.step != point.step), point], key=lambda p: p.step)
        if 0 < point.step < self._spec.training.steps and self.stopped is None:
            self.stopped = self._why_stop(point)

    def is_due(self, step: int, seconds: float, *, ends: float) -> bool:
        """Whether to evaluate after this step, which took `seconds`; the evaluations at the ends take `ends`.

        The last step is not due: its evaluation follows training.
        """
        self._durations.append(seconds)
        steps = self._spec.training.steps
        if self.every is None and len(self._durations) >= MEASURED_STEPS:
            self.every = spaced(steps, step_seconds=self._step_seconds(), one=self._expected(ends), ends=ends)
        if not self.is_point(step):
            return False
        return fixed_interval(self._spec) is not None or self._is_affordable(ends)

    def is_point(self, step: int) -> bool:
        """Whether the schedule has an evaluation after this step."""
        return bool(self.every) and step % (self.every or 1) == 0 and step < self._spec.training.steps

    def cost_share(self, ends: float) -> float | None:
        """What all evaluations take of training, about; None before steps were timed."""
        if not self._durations or not self.every:
            return None
        count = (self._spec.training.steps - 1) // self.every
        return (ends + count * self._expected(ends)) / (self._spec.training.steps * self._step_seconds())

    def sentence(self) -> str:
        """Why training ended early."""
        last = self._of_adapters()[-1]
        when, stop = f"Training ended after step {last.step}", self._spec.evaluation.stop_when
        if self.stopped == "target_reached":
            return f"{when}: {last.metric} is {last.value:.3g}, and evaluation.stop_when.target is {stop.target:g}."
        return (
            f"{when}: {stop.no_better_for} evaluations in a row were no better than that of step {self.best_step} "
            "(evaluation.stop_when.no_better_for)."
        )

    def state(self) -> dict[str, Any]:
        """What a run that resumes needs, as JSON."""
        return {
            "every": self.every,
            "stopped": self.stopped,
            "points": [point.as_dict() for point in self.points],
        }

    def take_over(self, state: Mapping[str, Any]) -> None:
        """Go on where another run of the same spec stopped."""
        self.points = [Point.read(line) for line in state["points"]]
        self.every, self.stopped = state["every"], state["stopped"]

    def lines(self) -> list[dict[str, Any]]:
        """The lines of `evaluations.jsonl`."""
        return [{"v": RECORD_VERSION, **point.as_dict()} for point in self.points]

    def _of_adapters(self) -> list[Point]:
        return [point for point in self.points if point.step > 0 and point.value is not None]

    def _why_stop(self, point: Point) -> StopReason | None:
        stop, best = self._spec.evaluation.stop_when, self.best
        if point.value is None or best is None:
            return None
        if stop.target is not None and point.value >= stop.target:
            return "target_reached"
        since = sum(other.step > best.step for other in self._of_adapters())
        return "no_better" if stop.no_better_for is not None and since >= stop.no_better_for else None

    def _step_seconds(self) -> float:
        return statistics.fmean(self._durations[1:] or self._durations)

    def _expected(self, ends: float) -> float:
        """Seconds of the next evaluation: as the last one during training, or as the base model's."""
        during = [point.seconds for point in self.points if point.step > 0]
        first = next((point.seconds for point in self.points if point.step == 0), ends / 2)
        return during[-1] if during else first

    def _is_affordable(self, ends: float) -> bool:
        spent = sum(point.seconds for point in self.points if point.step > 0)
        room = COST_SHARE * self._spec.training.steps * self._step_seconds()
        return ends + spent + self._expected(ends) <= room


def _value(point: Point) -> tuple[float, int]:
    return (float("-inf") if point.value is None else point.value, -point.step)

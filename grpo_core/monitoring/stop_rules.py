"""Early-stopping rules.

Owns when numbers count as diverged, rollouts as inconsistent with the trainer, and steps as without signal; the limits
are in the spec (`guards`). Invariant: the state of a rule can be rebuilt from the metrics so far, so that a resumed run
is stopped like one that never stopped.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from grpo_core.errors import JobFailure
from grpo_core.reasons import FailureCode, WarningCode
from grpo_core.run_dir.metrics import StepMetrics
from grpo_core.run_dir.records import EventWriter
from grpo_core.spec import JobSpec

RUNAWAY_REFERENCE = 10
"""Number of first steps whose median a runaway value is compared with."""
RUNAWAY_FLOOR = 0.01
"""The least such median: a GRPO loss is next to nothing while the policy is close to the one that was sampled."""
RUNAWAY_STEPS = 5
"""Steps in a row that must be beyond the limit: a single one is a spike, and clipped."""
MISMATCH_WARNING = 0.2
"""Share of `guards.max_logprob_diff` from which a warning is given, once a run."""


class StopRules:
    """The guards of one run; each of its steps is shown to them once, in order."""

    def __init__(self, spec: JobSpec, events: EventWriter) -> None:
        self._spec, self._events = spec, events
        self._runaways = {"loss": _Runaway(spec), "gradient norm": _Runaway(spec)}
        self._silent_steps = 0
        self._told_mismatch = False

    def require_finite(self, step: int, numbers: Mapping[str, float | None]) -> None:
        """Raise `JobFailure` (`diverged`) if one of a step's numbers, by its name for people, is none."""
        for name, value in numbers.items():
            if value is not None and not math.isfinite(value):
                raise diverged(f"The {name} of step {step} is {value}.")

    def check(self, metrics: StepMetrics) -> None:
        """Raise `JobFailure` where a step that has been written down is one too many."""
        self._require_no_runaway(metrics)
        self._require_one_policy(metrics)
        self._require_signal(metrics)

    def replay(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Process the steps of an earlier run from its `metrics.jsonl`, without reporting again."""
        for line in lines:
            self._count_silent(line["zero_variance_share"])
            self._runaways["loss"].add(abs(line["loss"]))
            self._runaways["gradient norm"].add(abs(line["grad_norm"]))
            self._told_mismatch |= self._is_worth_a_warning(line["logprob_diff_mean"])

    def _require_no_runaway(self, metrics: StepMetrics) -> None:
        for (name, runaway), value in zip(self._runaways.items(), (metrics.loss, metrics.grad_norm), strict=True):
            if runaway.add(abs(value)):
                raise diverged(
                    f"The {name} was above {runaway.limit:.3g} in each of the last {RUNAWAY_STEPS} steps; in the "
                    f"run's first steps it was {runaway.usual:.3g}.",
                    code=FailureCode.RUNAWAY,
                )

    def _require_one_policy(self, metrics: StepMetrics) -> None:
        """What is sampled must be the model that is trained: else the loss corrects for another policy's choices."""
        found, limit = metrics.logprob_diff_mean, self._spec.guards.max_logprob_diff
        if found is None or not limit:
            return
        if found > limit:
            raise JobFailure(
                FailureCode.ROLLOUTS_DIFFER,
                f"In step {metrics.step} the rollout engine's log-probabilities differ from the trainer's by "
                f"{found:.3g} on average; at most {limit:g} is accepted.",
                hint="Set model.precision to 16bit if the weights fit the card; a larger guards.max_logprob_diff "
                "accepts the difference, and 0 turns this guard off.",
            )
        if self._is_worth_a_warning(found) and not self._told_mismatch:
            self._told_mismatch = True
            self._events.warning(
                WarningCode.ROLLOUTS_DIFFER,
                f"In step {metrics.step} the rollout engine's log-probabilities differ from the trainer's by "
                f"{found:.3g} on average.",
            )

    def _is_worth_a_warning(self, difference: float | None) -> bool:
        limit = self._spec.guards.max_logprob_diff
        return difference is not None and bool(limit) and difference > MISMATCH_WARNING * limit

    def _count_silent(self, zero_variance_share: float) -> None:
        self._silent_steps = self._silent_steps + 1 if zero_variance_share == 1.0 else 0

    def _require_signal(self, metrics: StepMetrics) -> None:
        self._count_silent(metrics.zero_variance_share)
        limit = self._spec.guards.no_signal_steps
        if limit and self._silent_steps >= limit:
            raise JobFailure(
                FailureCode.NO_REWARD_VARIANCE,
                f"In each of the last {limit} steps all completions of a prompt had the same reward.",
                hint="Look at the samples: if every reward is 0 the model never meets the format, so add worked "
                "examples (data.examples) or start from an adapter that does; if all are right, use harder questions. "
                "A higher sampling.temperature or more sampling.generations also help; guards.no_signal_steps 0 "
                "turns this guard off.",
            )


class _Runaway:
    """Whether one of a run's numbers has left the range of its first steps."""

    def __init__(self, spec: JobSpec) -> None:
        self._factor = spec.guards.runaway_factor
        self._first: list[float] = []
        self._above = 0

    def add(self, value: float) -> bool:
        """Take the next step's value; True if it has been too large for too long."""
        if len(self._first) < RUNAWAY_REFERENCE:
            self._first.append(value)
            return False
        self._above = self._above + 1 if value > self.limit else 0
        return bool(self._factor) and self._above >= RUNAWAY_STEPS

    @property
    def usual(self) -> float:
        """The median of the first steps."""
        return statistics.median(self._first)

    @property
    def limit(self) -> float:
        return self._factor * max(self.usual, RUNAWAY_FLOOR)


def diverged(message: str, *, code: FailureCode = FailureCode.NOT_FINITE) -> JobFailure:
    """The failure of a run whose numbers are no longer finite, or far out of their range."""
    return JobFailure(
        code,
        message,
        hint="Lower optimizer.learning_rate (the recipe uses 5e-6) or optimizer.max_grad_norm, and start from an "
        "earlier checkpoint.",
    )

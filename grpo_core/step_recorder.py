"""Joins what is known of a step at two times, its completions and later its update, and writes both down.

Owns the step's statistics, which steps become events, and the guards that end a run for its own good: numbers that
are not finite or run away, rollouts that are not of the model in training, too many steps without any signal. Every
engine calls it in the same two places. Invariant: all it knows can be had again from the metrics and the last
completions, so that a run that goes on from a checkpoint is guarded as one that never stopped.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from grpo_core.audits import Auditor
from grpo_core.errors import JobFailure
from grpo_core.records import Completion, EventWriter, MetricsWriter, StepMetrics, StepSeconds, write_rollouts
from grpo_core.runfolder import RunFolder
from grpo_core.spec import JobSpec

MAX_SAMPLE_CHARACTERS = 4000
"""Longer texts are cut in a `sample` event, which is sent to every watcher; the rollouts hold them whole."""

REWARD_WINDOW = 10
"""Steps over which a run's first and last reward are averaged, at most a fifth of it."""

RUNAWAY_REFERENCE = 10
"""First steps of a run whose median a runaway value is held against."""
RUNAWAY_FLOOR = 0.01
"""The least such median: a GRPO loss is next to nothing while the policy is close to the one that was sampled."""
RUNAWAY_STEPS = 5
"""Steps in a row that must be beyond the limit: a single one is a spike, and clipped."""
MISMATCH_WARNING = 0.2
"""Share of `guards.max_logprob_diff` from which a warning is given, once a run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """What an engine knows once the optimizer has stepped."""

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    kl: float | None
    entropy: float | None
    seconds: float
    """The whole step, generation included."""
    gpu_memory_gb: float | None
    logprob_diff_mean: float | None = None
    """Mean absolute difference of rollout engine's and trainer's log-probabilities of the step's tokens, where the
    engine rolls out by another program than it trains with."""
    logprob_diff_max: float | None = None


@dataclass(frozen=True, slots=True)
class _Rollout:
    """Statistics of the completions that the following updates learn from."""

    reward: float
    reward_std: float
    rewards: Mapping[str, float]
    rewards_std: Mapping[str, float]
    zero_variance_share: float
    tokens: tuple[float, int, int]
    truncated_share: float
    duplicate_share: float
    completions: Sequence[Completion]


class StepRecorder:
    """Called by an engine at each rollout and after each update; raises `JobFailure` where a guard says stop."""

    def __init__(
        self, *, spec: JobSpec, folder: RunFolder, events: EventWriter, metrics: MetricsWriter, epoch: int
    ) -> None:
        self._spec, self._folder, self._events, self._metrics, self._epoch = spec, folder, events, metrics, epoch
        self._rollout: _Rollout | None = None
        self._generation_seconds = 0.0
        self._reward_seconds = 0.0
        self._silent_steps = 0
        self._rewards: list[float] = []
        self._runaways = {"loss": _Runaway(spec), "gradient norm": _Runaway(spec)}
        self._told_mismatch = False
        self._auditor = Auditor(spec)
        self._latest: StepMetrics | None = None

    def record_rollout(
        self, step: int, completions: Sequence[Completion], *, generation_seconds: float, reward_seconds: float
    ) -> None:
        """Write down the completions that update `step` learns from (and later ones, if `loss.iterations` > 1)."""
        write_rollouts(self._folder.rollout(step), completions, step=step, epoch=self._epoch)
        self._rollout = _summarise(completions, self._spec.sampling.generations)
        self._generation_seconds, self._reward_seconds = generation_seconds, reward_seconds

    def record_update(self, update: Update) -> None:
        """Write down a finished step, then end the run if a guard says so."""
        self._require_finite(update)
        metrics = self._join(update)
        self._rewards.append(metrics.reward)
        self._metrics.write(metrics)
        self._latest = metrics
        if update.step % self._spec.training.log_every == 0 or update.step == self._spec.training.steps:
            self._events.emit("metric", metrics.as_dict(), step=update.step)
            self._events.emit("sample", self._sample(), step=update.step)
        for finding in self._auditor.add(metrics.as_dict(), self.latest_completions()):
            self._events.emit("warning", finding.as_dict(), step=update.step)
        self._require_no_runaway(update)
        self._require_one_policy(update)
        self._require_signal(metrics)

    def state(self) -> dict[str, Any]:
        """What `go_on` needs besides the metrics of the steps so far, as JSON."""
        return {"completions": [asdict(completion) for completion in self.latest_completions()]}

    def go_on(self, lines: Sequence[Mapping[str, Any]], state: Mapping[str, Any]) -> None:
        """Know what another run's recorder knew, from its lines of `metrics.jsonl` and its `state`."""
        for line in lines:
            self._rewards.append(line["reward"])
            self._count_silent(line["zero_variance_share"])
            self._runaways["loss"].add(abs(line["loss"]))
            self._runaways["gradient norm"].add(abs(line["grad_norm"]))
            self._told_mismatch |= self._is_worth_a_warning(line["logprob_diff_mean"])
        self._auditor.replay(lines)  # what it found then was told then
        completions = [Completion(**item) for item in state["completions"]]
        if completions:
            self._rollout = _summarise(completions, self._spec.sampling.generations)

    def latest_completions(self) -> Sequence[Completion]:
        """The completions of the last rollout; none before the first."""
        return self._rollout.completions if self._rollout else ()

    def latest_metrics(self) -> StepMetrics | None:
        """What was written down of the last step; None before the first."""
        return self._latest

    def reward_summary(self) -> dict[str, float | int | None]:
        """Mean total reward over the first and the last steps."""
        window = max(1, min(REWARD_WINDOW, len(self._rewards) // 5))
        if not self._rewards:
            return {"start": None, "end": None, "steps_averaged": 0}
        return {
            "start": statistics.fmean(self._rewards[:window]),
            "end": statistics.fmean(self._rewards[-window:]),
            "steps_averaged": window,
        }

    def _join(self, update: Update) -> StepMetrics:
        rollout = self._current()
        generation, reward = self._generation_seconds, self._reward_seconds
        # A second pass over the same completions generates nothing.
        self._generation_seconds = self._reward_seconds = 0.0
        mean, least, most = rollout.tokens
        return StepMetrics(
            step=update.step,
            reward=rollout.reward,
            reward_std=rollout.reward_std,
            rewards=rollout.rewards,
            rewards_std=rollout.rewards_std,
            zero_variance_share=rollout.zero_variance_share,
            completion_tokens_mean=mean,
            completion_tokens_min=least,
            completion_tokens_max=most,
            truncated_share=rollout.truncated_share,
            kl=update.kl,
            entropy=update.entropy,
            loss=update.loss,
            grad_norm=update.grad_norm,
            learning_rate=update.learning_rate,
            seconds=StepSeconds(
                generation=generation,
                reward=reward,
                update=max(0.0, update.seconds - generation - reward),
                total=update.seconds,
            ),
            completions_per_s=len(rollout.completions) / update.seconds if update.seconds > 0 else 0.0,
            gpu_memory_gb=update.gpu_memory_gb,
            logprob_diff_mean=update.logprob_diff_mean,
            logprob_diff_max=update.logprob_diff_max,
            duplicate_share=rollout.duplicate_share,
        )

    def _sample(self) -> dict[str, object]:
        sample = self._current().completions[0]
        return {
            "prompt_id": sample.prompt_id,
            "prompt": _cut(sample.prompt),
            "completion": _cut(sample.completion),
            "answer": _cut(sample.answer),
            "rewards": dict(sample.rewards),
            "reward_total": sample.reward_total,
        }

    def _current(self) -> _Rollout:
        assert self._rollout is not None, "an engine must record the rollout before the update"
        return self._rollout

    def _require_finite(self, update: Update) -> None:
        numbers = {
            "loss": update.loss,
            "gradient norm": update.grad_norm,
            "mean difference of log-probabilities": update.logprob_diff_mean,
            "largest difference of log-probabilities": update.logprob_diff_max,
        }
        for name, value in numbers.items():
            if value is not None and not math.isfinite(value):
                raise diverged(f"The {name} of step {update.step} is {value}.")

    def _require_no_runaway(self, update: Update) -> None:
        for (name, runaway), value in zip(self._runaways.items(), (update.loss, update.grad_norm), strict=True):
            if runaway.add(abs(value)):
                raise diverged(
                    f"The {name} was above {runaway.limit:.3g} in each of the last {RUNAWAY_STEPS} steps; in the "
                    f"run's first steps it was {runaway.usual:.3g}.",
                    code="runaway",
                )

    def _require_one_policy(self, update: Update) -> None:
        """What is sampled must be the model that is trained: else the loss corrects for another policy's choices."""
        found, limit = update.logprob_diff_mean, self._spec.guards.max_logprob_diff
        if found is None or not limit:
            return
        if found > limit:
            raise JobFailure(
                "diverged",
                "rollouts_differ",
                f"In step {update.step} the rollout engine's log-probabilities differ from the trainer's by "
                f"{found:.3g} on average; at most {limit:g} is accepted.",
                hint="Set model.precision to 16bit if the weights fit the card; a larger guards.max_logprob_diff "
                "accepts the difference, and 0 turns this guard off.",
            )
        if self._is_worth_a_warning(found) and not self._told_mismatch:
            self._told_mismatch = True
            self._events.warning(
                "rollouts_differ",
                f"In step {update.step} the rollout engine's log-probabilities differ from the trainer's by "
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
                "no_signal",
                "no_reward_variance",
                f"In each of the last {limit} steps all completions of a prompt were paid the same: nothing is learnt.",
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


def diverged(message: str, *, code: str = "not_finite") -> JobFailure:
    """The failure of a run whose numbers are no longer finite, or far out of their range."""
    return JobFailure(
        "diverged",
        code,
        message,
        hint="Lower optimizer.learning_rate (the recipe uses 5e-6) or optimizer.max_grad_norm, and start from an "
        "earlier checkpoint.",
    )


def _summarise(completions: Sequence[Completion], generations: int) -> _Rollout:
    totals = [c.reward_total for c in completions]
    groups = [totals[start : start + generations] for start in range(0, len(totals), generations)]
    tokens = [c.completion_tokens for c in completions]
    return _Rollout(
        reward=statistics.fmean(totals),
        reward_std=statistics.fmean(statistics.stdev(group) for group in groups),
        rewards={name: statistics.fmean(c.rewards[name] for c in completions) for name in completions[0].rewards},
        rewards_std={name: statistics.stdev(c.rewards[name] for c in completions) for name in completions[0].rewards},
        # The tolerance is for weighted sums that differ only by rounding.
        zero_variance_share=statistics.fmean(max(group) - min(group) < 1e-9 for group in groups),
        tokens=(statistics.fmean(tokens), min(tokens), max(tokens)),
        truncated_share=statistics.fmean(c.finish_reason == "length" for c in completions),
        duplicate_share=_duplicate_share([c.completion for c in completions], generations),
        completions=completions,
    )


def _duplicate_share(texts: Sequence[str], generations: int) -> float:
    """Share of the texts that occur again in their group of `generations`."""
    groups = [Counter(texts[start : start + generations]) for start in range(0, len(texts), generations)]
    return sum(count for group in groups for count in group.values() if count > 1) / len(texts)


def _cut(text: str) -> str:
    return text if len(text) <= MAX_SAMPLE_CHARACTERS else text[: MAX_SAMPLE_CHARACTERS - 1] + "…"

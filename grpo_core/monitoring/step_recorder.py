"""Records each step in two calls: its completions, and later its update.

Owns the step's statistics and which steps become events, and passes every step to `stop_rules` and `audits`. Every
engine calls it in the same two places. Invariant: its state can be rebuilt from the metrics and the last completions,
so that a resumed run behaves like one that never stopped.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from grpo_core.evaluation.paired_stats import ends_of
from grpo_core.monitoring.audits import Auditor
from grpo_core.monitoring.stop_rules import StopRules
from grpo_core.reasons import EventType, FinishReason
from grpo_core.run_dir.layout import RunFolder
from grpo_core.run_dir.metrics import StepMetrics, StepSeconds
from grpo_core.run_dir.records import Completion, EventWriter, MetricsWriter, write_rollouts
from grpo_core.spec import JobSpec

MAX_SAMPLE_CHARACTERS = 4000
"""Longer texts are cut in a `sample` event, which is sent to every watcher; the rollouts hold them whole."""


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

    @property
    def numbers(self) -> dict[str, float | None]:
        """What must be finite, by its name for people."""
        return {
            "loss": self.loss,
            "gradient norm": self.grad_norm,
            "mean difference of log-probabilities": self.logprob_diff_mean,
            "largest difference of log-probabilities": self.logprob_diff_max,
        }


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
    unscored_share: float | None
    skipped_share: float | None
    completions: Sequence[Completion]


_OF_GRADERS: Final = ("skipped", "grader_errors", "grader_details")


class StepRecorder:
    """Called by an engine at each rollout and after each update; raises `JobFailure` where a guard says stop."""

    def __init__(
        self,
        *,
        spec: JobSpec,
        folder: RunFolder,
        events: EventWriter,
        metrics: MetricsWriter,
        epoch: int,
        keeps_rollouts: bool = True,
    ) -> None:
        """`keeps_rollouts`: whether it is this process that writes the completions down, and no other."""
        self._keeps_rollouts = keeps_rollouts
        self._spec, self._folder, self._events, self._metrics, self._epoch = spec, folder, events, metrics, epoch
        self._rollout: _Rollout | None = None
        self._generation_seconds = 0.0
        self._reward_seconds = 0.0
        self._rewards: list[float] = []
        self._stop_rules = StopRules(spec, events)
        self._auditor = Auditor(spec)
        self._latest: StepMetrics | None = None

    def record_rollout(
        self, step: int, completions: Sequence[Completion], *, generation_seconds: float, reward_seconds: float
    ) -> None:
        """Write down the completions that update `step` learns from (and later ones, if `loss.iterations` > 1)."""
        if self._keeps_rollouts:
            write_rollouts(self._folder.rollout(step), completions, step=step, epoch=self._epoch)
        self._rollout = _summarise(completions, self._spec)
        self._generation_seconds, self._reward_seconds = generation_seconds, reward_seconds

    def record_update(self, update: Update) -> None:
        """Write down a finished step, then end the run if a guard says so."""
        self._stop_rules.require_finite(update.step, update.numbers)
        metrics = self._join(update)
        self._rewards.append(metrics.reward)
        self._metrics.write(metrics)
        self._latest = metrics
        if update.step % self._spec.training.log_every == 0 or update.step == self._spec.training.steps:
            self._events.emit(EventType.METRIC, metrics.as_dict(), step=update.step)
            self._events.emit(EventType.SAMPLE, self._sample(), step=update.step)
        ended = len(self._auditor.endings)
        for finding in self._auditor.add(metrics.as_dict(), self.latest_completions()):
            self._events.emit(EventType.WARNING, finding.as_dict(), step=update.step)
        for ending in self._auditor.endings[ended:]:
            self._events.emit(EventType.LOG, ending.as_dict(), step=update.step)
        self._stop_rules.check(metrics)

    def state(self) -> dict[str, Any]:
        """What `go_on` needs besides the metrics of the steps so far, as JSON."""
        return {"completions": [_known_before(asdict(completion)) for completion in self.latest_completions()]}

    def go_on(self, lines: Sequence[Mapping[str, Any]], state: Mapping[str, Any]) -> None:
        """Know what another run's recorder knew, from its lines of `metrics.jsonl` and its `state`."""
        self._rewards += [line["reward"] for line in lines]
        self._stop_rules.replay(lines)
        self._auditor.replay(lines)  # its findings were reported then
        completions = [Completion(**item) for item in state["completions"]]
        if completions:
            self._rollout = _summarise(completions, self._spec)

    def latest_completions(self) -> Sequence[Completion]:
        """The completions of the last rollout; none before the first."""
        return self._rollout.completions if self._rollout else ()

    def latest_metrics(self) -> StepMetrics | None:
        """What was written down of the last step; None before the first."""
        return self._latest

    def reward_summary(self) -> dict[str, float | int | None]:
        """Mean total reward over the first and the last steps."""
        if not self._rewards:
            return {"start": None, "end": None, "steps_averaged": 0}
        start, end = ends_of(self._rewards)
        return {"start": statistics.fmean(start), "end": statistics.fmean(end), "steps_averaged": len(end)}

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
            unscored_share=rollout.unscored_share,
            skipped_share=rollout.skipped_share,
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


def _known_before(completion: dict[str, Any]) -> dict[str, Any]:
    """Without the fields of graders, where there were none: version 0.1 refuses a checkpoint that has them."""
    return {name: value for name, value in completion.items() if value or name not in _OF_GRADERS}


def _summarise(completions: Sequence[Completion], spec: JobSpec) -> _Rollout:
    generations, has_graders = spec.sampling.generations, bool(spec.rewards.graders)
    scored = _scored(completions)
    totals = [c.reward_total for c in completions]
    groups = [totals[start : start + generations] for start in range(0, len(totals), generations)]
    tokens = [c.completion_tokens for c in completions]
    return _Rollout(
        reward=statistics.fmean(totals),
        reward_std=statistics.fmean(statistics.stdev(group) for group in groups),
        rewards={name: statistics.fmean(values) for name, values in scored.items()},
        rewards_std={name: statistics.stdev(values) if len(values) > 1 else 0.0 for name, values in scored.items()},
        # The tolerance is for weighted sums that differ only by rounding.
        zero_variance_share=statistics.fmean(max(group) - min(group) < 1e-9 for group in groups),
        tokens=(statistics.fmean(tokens), min(tokens), max(tokens)),
        truncated_share=statistics.fmean(c.finish_reason == FinishReason.LENGTH for c in completions),
        duplicate_share=_duplicate_share([c.completion for c in completions], generations),
        unscored_share=statistics.fmean(None in c.rewards.values() for c in completions) if has_graders else None,
        skipped_share=statistics.fmean(c.skipped for c in completions[::generations]) if has_graders else None,
        completions=completions,
    )


def _scored(completions: Sequence[Completion]) -> dict[str, list[float]]:
    """The values of each reward, without those that a grader failed to give."""
    names = completions[0].rewards
    values = {name: [v for c in completions if (v := c.rewards[name]) is not None] for name in names}
    return {name: found for name, found in values.items() if found}


def _duplicate_share(texts: Sequence[str], generations: int) -> float:
    """Share of the texts that occur again in their group of `generations`."""
    groups = [Counter(texts[start : start + generations]) for start in range(0, len(texts), generations)]
    return sum(count for group in groups for count in group.values() if count > 1) / len(texts)


def _cut(text: str) -> str:
    return text if len(text) <= MAX_SAMPLE_CHARACTERS else text[: MAX_SAMPLE_CHARACTERS - 1] + "…"

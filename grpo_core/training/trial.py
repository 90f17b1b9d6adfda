"""A trial: completions of the model before any training, and whether training on their rewards would teach anything.

A trial runs the steps of a job with a learning rate of 0, so it draws, scores and times them exactly as training would.
Owns what is concluded from the metrics of these steps. Invariant: the conclusion follows from the metrics alone, so
that a trial that was paused concludes the same.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Final

from grpo_core.rewards.graders.formula import Formula
from grpo_core.rewards.tags import FORMAT_PAYS
from grpo_core.spec import JobSpec

GOOD_SHARE: Final = 0.2
"""Share of groups with a signal from which most jobs learn at a useful speed."""
MUCH_TRUNCATED: Final = 0.5
MUCH_UNSCORED: Final = 0.2
_FORMATS: Final = ("strict_format", "soft_format")
_SAME: Final = 1e-9


def without_learning(spec: JobSpec) -> JobSpec:
    """The spec as a trial carries it out: every step leaves the adapter as it is."""
    if spec.kind != "try":
        return spec
    return spec.model_copy(update={"optimizer": spec.optimizer.model_copy(update={"learning_rate": 0.0})})


def conclude(spec: JobSpec, steps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The result of a trial from its lines of `metrics.jsonl`."""
    groups = len(steps) * spec.sampling.prompts_per_step
    signal = 1 - _mean(steps, "zero_variance_share")
    found: dict[str, Any] = {
        "prompts": groups,
        "completions": groups * spec.sampling.generations,
        "signal_share": round(signal, 4),
        "reward_mean": _mean(steps, "reward"),
        "reward_std": _mean(steps, "reward_std"),
        "rewards": _rewards(steps),
        "format_share": _format_share(spec, steps),
        "completion_tokens_mean": _mean(steps, "completion_tokens_mean"),
        "completion_tokens_max": max(line["completion_tokens_max"] for line in steps),
        "truncated_share": _mean(steps, "truncated_share"),
        "duplicate_share": _mean(steps, "duplicate_share"),
        "unscored_share": _mean(steps, "unscored_share"),
        # The first step also warms up kernels and caches.
        "step_seconds": statistics.median([line["seconds"]["total"] for line in steps[1:] or steps]),
    }
    verdict = "yes" if signal >= GOOD_SHARE else "slowly" if signal > _SAME else "no"
    return {**found, "will_learn": verdict, "sentence": _sentence(verdict, round(signal * groups), groups, found)}


def _sentence(verdict: str, with_signal: int, groups: int, found: Mapping[str, Any]) -> str:
    """The answer to: will this learn anything?"""
    share = f"{with_signal} of {groups} questions"
    if verdict == "yes":
        return f"Yes: completions of {share} got different rewards, so training has something to learn from."
    if verdict == "slowly":
        return (
            f"Slowly: completions of only {share} got different rewards, and the others teach nothing. {_advice(found)}"
        )
    return (
        f"No: for each of {groups} questions all completions got the same reward, so nothing is learnt. "
        f"{_advice(found)}"
    )


def _advice(found: Mapping[str, Any]) -> str:
    """What to change, by what most likely keeps the rewards alike."""
    if (found["unscored_share"] or 0.0) > MUCH_UNSCORED:
        return f"Graders failed to score {found['unscored_share']:.0%} of completions: correct them first."
    if found["truncated_share"] > MUCH_TRUNCATED:
        return (
            f"{found['truncated_share']:.0%} of completions were cut off: raise sampling.max_completion_tokens, or "
            "show short answers in data.examples."
        )
    if (found["duplicate_share"] or 0.0) > MUCH_TRUNCATED:
        return "Most completions of a question are the same text: raise sampling.temperature."
    if found["format_share"] is not None and found["format_share"] < _SAME:
        return "No completion has the required format: add worked examples (data.examples)."
    return (
        "Look at the completions: if all are right, use harder questions; if all are wrong, use easier ones, add "
        "worked examples (data.examples), or a reward for being partly right."
    )


def _rewards(steps: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean raw reward by name, over the steps that have it."""
    names = dict.fromkeys(name for line in steps for name in line["rewards"])
    return {
        name: statistics.fmean(line["rewards"][name] for line in steps if name in line["rewards"]) for name in names
    }


def _format_share(spec: JobSpec, steps: Sequence[Mapping[str, Any]]) -> float | None:
    """Share of completions in the format that the recipe's rewards ask for; None where none of those counts."""
    rewards = spec.rewards
    used = {name for name, weight in rewards.weights.by_name.items() if weight}
    if rewards.formula is not None:
        used = set(Formula(rewards.formula, rewards.names).used)
    if used.isdisjoint(_FORMATS):
        return None
    return max(_rewards(steps)[name] for name in _FORMATS) / FORMAT_PAYS


def _mean(steps: Sequence[Mapping[str, Any]], name: str) -> Any:
    """The mean of a metric, None where a step lacks it; every step has as many completions."""
    values = [line[name] for line in steps]
    return None if None in values else statistics.fmean(values)

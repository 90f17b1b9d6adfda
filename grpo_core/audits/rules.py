"""The rules of the audits: what each measures, when that is too much, and which rollouts show it.

A rule divides what it finds by its threshold, so that 1 is where it speaks up. Thresholds are the spec's `audits`, and
docs/audits.md gives the reason for each. Invariant: a rule that lacks a number it needs (`correctness` that is not
paid for, a KL that is not computed) finds nothing.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from grpo_core.audits.history import History
from grpo_core.records import Completion

SURE_ERRORS: Final = 4.0
"""Standard errors a rise of the reward must be beyond: it is looked at again in each of hundreds of steps."""
LEARNING_ERRORS: Final = 3.0
"""Standard errors of a rise of correctness that excuses shorter or longer answers."""
CLIMBING_ERRORS: Final = 2.0
"""Standard errors of a rise of the reward from one window to the next that excuses repeated completions."""
LEAST_RISE: Final = 0.1
"""Least rise of all rewards but correctness, as a share of the most they can pay, that is looked at."""

Query = dict[str, str | int | float]
"""Parameters of `GET /jobs/{id}/rollouts`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """What a rule found after a step; it is worth telling from a severity of 1."""

    severity: float
    steps: tuple[int, int]
    values: Mapping[str, float]
    message: str


Measuring = Callable[[History, float], Measure | None]
Showing = Callable[[History, Sequence[Completion]], Query]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One audit. `measure` is given the threshold, which is never 0: that turns a rule off."""

    name: str
    measure: Measuring
    show: Showing
    patience: float = 0.0
    """Windows through which it must be found in every step before it is told."""


def _no_variance(history: History, limit: float) -> Measure | None:
    steps = history.silent_steps
    reward = history.recent[-1].reward
    return Measure(
        severity=steps / limit,
        steps=history.span(max(1, steps)),
        values={"steps": steps, **({} if reward is None else {"reward": reward})},
        message=f"In each of the last {steps} steps all completions of a prompt were paid the same: nothing is learnt "
        f"from them. {_why_the_same(history)}",
    )


def _why_the_same(history: History) -> str:
    if history.is_solved:
        return "Nearly all answers are right: use harder questions, or stop here."
    return (
        "If none is ever right or in the format, show the format with worked examples (data.examples) or ask easier "
        "questions; more sampling.generations or a higher sampling.temperature makes a difference more likely."
    )


def _format_gaming(history: History, limit: float) -> Measure | None:
    reward, correctness = history.rise("reward"), history.rise("correctness")
    if reward is None or correctness is None or not history.other_rewards_pay or history.is_solved:
        return None
    # Each as a share of the most it can be, so that weights do not matter.
    form = (reward.by - correctness.by) / history.other_rewards_pay
    answers = max(0.0, correctness.by / history.correctness_pays)
    gamed = reward.is_beyond(SURE_ERRORS) and form > 0 and form >= limit * (form + answers)
    return Measure(
        severity=form / LEAST_RISE if gamed else 0.0,
        steps=history.span(),
        values={
            "reward_first": reward.before,
            "reward_now": reward.after,
            "correctness_first": correctness.before,
            "correctness_now": correctness.after,
        },
        message=f"The mean reward rose by {reward.by:.2f} since the first {history.window} steps, and what correctness "
        f"pays by {correctness.by:+.2f}: the form is learnt, not the answers. Read the best-paid wrong completions; if "
        "this goes on, lower the weights of the other rewards or ask easier questions.",
    )


def _truncation(history: History, limit: float) -> Measure | None:
    shares = history.recent_values("truncated_share")
    if shares is None:
        return None
    share = statistics.fmean(shares)
    return Measure(
        severity=share / limit,
        steps=history.span(),
        values={"truncated_share": share},
        message=f"{share:.0%} of the completions of the last {history.window} steps were cut off at "
        "sampling.max_completion_tokens, most of them before they gave an answer. Raise it if they were getting "
        "somewhere; if they ramble, show short answers in data.examples.",
    )


def _length_collapse(history: History, limit: float) -> Measure | None:
    tokens = history.rise("tokens")
    if tokens is None:
        return None
    return Measure(
        severity=0.0 if _answers_improved(history) else tokens.before / max(tokens.after, 1e-9) / limit,
        steps=history.span(),
        values={"tokens_first": tokens.before, "tokens_now": tokens.after},
        message=f"Completions fell from {tokens.before:.0f} tokens to {tokens.after:.0f} on average, and correctness "
        "did not rise with it. Look whether the reasoning is gone: a reward that pays for form alone is paid soonest "
        "for little text. Lower that weight, or optimizer.learning_rate.",
    )


def _length_growth(history: History, limit: float) -> Measure | None:
    tokens = history.rise("tokens")
    if tokens is None:
        return None
    return Measure(
        severity=0.0 if _answers_improved(history) else tokens.after / max(tokens.before, 1e-9) / limit,
        steps=history.span(),
        values={"tokens_first": tokens.before, "tokens_now": tokens.after},
        message=f"Completions grew from {tokens.before:.0f} tokens to {tokens.after:.0f} on average, and correctness "
        "did not rise with it. Look whether they repeat themselves or go on after the answer; loss.type dr_grpo or "
        "dapo does not favour long wrong answers as grpo does.",
    )


def _answers_improved(history: History) -> bool:
    """Whether correctness rose since the run began, or had no room to."""
    correctness = history.rise("correctness")
    return history.is_solved or (correctness is not None and correctness.is_beyond(LEARNING_ERRORS))


def _duplicates(history: History, limit: float) -> Measure | None:
    shares, reward = history.recent_values("duplicate_share"), history.climb("reward")
    if shares is None or reward is None:
        return None
    share = statistics.fmean(shares)
    learning = history.is_solved or reward.is_beyond(CLIMBING_ERRORS)
    return Measure(
        severity=0.0 if learning else share / limit,
        steps=history.span(),
        values={"duplicate_share": share},
        message=f"{share:.0%} of the completions of the last {history.window} steps are the same text as another of "
        "their group, and the reward is not rising: they cost time and show nothing new. Raise sampling.temperature, "
        "turn sampling.top_k and top_p off, or lower optimizer.learning_rate if it was not so at the start.",
    )


def _entropy_collapse(history: History, limit: float) -> Measure | None:
    entropy = history.rise("entropy")
    if entropy is None:
        return None
    factor = min(entropy.before / max(entropy.after, 1e-9), 1e9)
    return Measure(
        severity=0.0 if history.is_solved else factor / limit,
        steps=history.span(),
        values={"entropy_first": entropy.before, "entropy_now": entropy.after},
        message=f"The entropy of the next token fell from {entropy.before:.3g} to {entropy.after:.3g} nats, and not "
        "all answers are right: the model is sure of what it does and will hardly try anything else. Lower "
        "optimizer.learning_rate, raise sampling.temperature or loss.beta, and start from an earlier checkpoint.",
    )


def _kl_runaway(history: History, limit: float) -> Measure | None:
    kl = history.recent_values("kl")
    if kl is None:
        return None
    median = statistics.median(kl)
    return Measure(
        severity=median / limit,
        steps=history.span(),
        values={"kl": median},
        message=f"The KL divergence from the base model was {median:.3g} nats a token in the middle one of the last "
        f"{history.window} steps: the model is leaving what it knew. Read whether the text still makes sense; lower "
        "optimizer.learning_rate or raise loss.beta.",
    )


def _show_step(**order: str) -> Showing:
    """The rollouts of the last step, in some order."""

    def show(history: History, _: Sequence[Completion]) -> Query:
        return {"step": history.rollout_step(history.last_step), **order}

    return show


def _show_best_paid_wrong(history: History, completions: Sequence[Completion]) -> Query:
    wrong = [c for c in completions if c.rewards.get("correctness", 0.0) <= 0]
    best = max(wrong, key=lambda c: c.reward_total, default=None)
    query: Query = {"step": history.rollout_step(history.last_step), "order": "-reward"}
    return query if best is None else {**query, "prompt": best.prompt_id}


def _show_most_duplicated(history: History, completions: Sequence[Completion]) -> Query:
    texts = Counter((c.prompt_id, c.completion) for c in completions)
    query: Query = {"step": history.rollout_step(history.last_step)}
    if not texts:
        return query
    (prompt_id, _), _ = texts.most_common(1)[0]
    return {**query, "prompt": prompt_id}


def _show_highest_kl(history: History, _: Sequence[Completion]) -> Query:
    worst = max(history.recent, key=lambda reading: reading.kl or 0.0)
    return {"step": history.rollout_step(worst.step), "order": "reward"}


RULES: Final = (
    Rule(name="no_variance", measure=_no_variance, show=_show_step()),
    Rule(name="format_gaming", measure=_format_gaming, show=_show_best_paid_wrong, patience=0.5),
    Rule(name="truncation", measure=_truncation, show=_show_step(finish="length", order="reward")),
    Rule(name="length_collapse", measure=_length_collapse, show=_show_step(order="length")),
    Rule(name="length_growth", measure=_length_growth, show=_show_step(order="-length")),
    Rule(name="duplicates", measure=_duplicates, show=_show_most_duplicated),
    Rule(name="entropy_collapse", measure=_entropy_collapse, show=_show_step(order="-reward")),
    Rule(name="kl_runaway", measure=_kl_runaway, show=_show_highest_kl),
)
"""Every rule; its name is its field in the spec's `audits`."""

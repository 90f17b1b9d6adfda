"""The rules of the audits: what each measures, its threshold, and which rollouts show the problem.

A rule divides its measurement by its threshold, so that it warns from 1 on. The thresholds are in the spec's `audits`;
docs/why/audits.md gives the reason for each. Invariant: a rule that lacks a number it needs (`correctness` without a
positive weight, a KL that is not computed) finds nothing.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from grpo_core.monitoring.audits.history import History
from grpo_core.reasons import Reason
from grpo_core.run_dir.records import Completion

SURE_ERRORS: Final = 4.0
"""Standard errors that a rise of the reward must exceed. It is tested again in each of hundreds of steps."""
LEARNING_ERRORS: Final = 3.0
"""Standard errors of a rise in correctness that excuses shorter or longer answers."""
CLIMBING_ERRORS: Final = 2.0
"""Standard errors of a rise in the reward from one window to the next that excuses repeated completions."""
LEAST_RISE: Final = 0.1
"""Smallest rise of all rewards except correctness, as a share of their maximum, that is tested."""

Query = dict[str, str | int | float]
"""Parameters of `GET /jobs/{id}/rollouts`."""


class Audit(Reason):
    """What a rule finds, by the rule's name."""

    NO_VARIANCE = "no_variance", "Groups have no variance", "组内奖励零方差"
    FORMAT_GAMING = "format_gaming", "Format improves, answers do not", "格式得分上升，正确性未提高"
    TRUNCATION = "truncation", "Completions hit the limit", "回答触及长度上限"
    LENGTH_COLLAPSE = "length_collapse", "Completions collapse", "回答长度骤减"
    LENGTH_GROWTH = "length_growth", "Completions grow", "回答长度不断增长"
    DUPLICATES = "duplicates", "Completions repeat each other", "回答高度重复"
    ENTROPY_COLLAPSE = "entropy_collapse", "Entropy collapses", "熵坍缩"
    KL_RUNAWAY = "kl_runaway", "KL runs away", "KL 散度失控"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """What a rule found after a step; it is reported from a severity of 1."""

    severity: float
    steps: tuple[int, int]
    values: Mapping[str, float]
    message: str


Measuring = Callable[[History, float], Measure | None]
Showing = Callable[[History, Sequence[Completion]], Query]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One audit. `measure` receives the threshold, which is never 0, because 0 turns a rule off."""

    name: Audit
    measure: Measuring
    show: Showing
    past: str
    """What it found, of a stretch of steps that is over."""
    patience: float = 0.0
    """Number of windows in which every step must show it before it is reported."""


def _no_variance(history: History, limit: float) -> Measure | None:
    steps = history.silent_steps
    reward = history.recent[-1].reward
    return Measure(
        severity=steps / limit,
        steps=history.span(max(1, steps)),
        values={"steps": steps, **({} if reward is None else {"reward": reward})},
        message=f"In each of the last {steps} steps all completions of a prompt had the same reward, so nothing was "
        f"learnt. {_why_the_same(history)}",
    )


def _why_the_same(history: History) -> str:
    if history.is_solved:
        return "Nearly all answers are correct: use harder questions, or stop here."
    return (
        "If none is correct or in the format, show the format with worked examples (data.examples) or use easier "
        "questions. More sampling.generations or a higher sampling.temperature makes differences more likely."
    )


def _format_gaming(history: History, limit: float) -> Measure | None:
    reward, correctness = history.rise("reward"), history.rise("correctness")
    if reward is None or correctness is None or not history.other_rewards_pay or history.is_solved:
        return None
    # Each as a share of its maximum, so that weights do not matter.
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
        message=f"The mean reward rose by {reward.by:.2f} since the first {history.window} steps, and that of "
        f"correctness by {correctness.by:+.2f}: the format is learnt, not the answers. Read the wrong completions with "
        "the highest rewards. If this continues, lower the weights of the other rewards or use easier questions.",
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
        "sampling.max_completion_tokens, most of them before they gave an answer. Raise the limit if their "
        "reasoning makes progress; if they ramble, show short answers in data.examples.",
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
        "did not rise. Check whether the reasoning is gone: a reward for format alone is easiest to get with little "
        "text. Lower its weight, or optimizer.learning_rate.",
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
        "did not rise. Check whether they repeat themselves or continue after the answer. Unlike grpo, loss.type "
        "dr_grpo and dapo do not favour long wrong answers.",
    )


def _answers_improved(history: History) -> bool:
    """Whether correctness rose since the start of the run, or could not rise."""
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
        message=f"{share:.0%} of the completions of the last {history.window} steps repeat the text of another in "
        "their group, and the reward is not rising: they cost time and add no information. Raise sampling.temperature, "
        "turn off sampling.top_k and top_p, or lower optimizer.learning_rate if they did not repeat at the start.",
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
        "all answers are correct: the model has become certain and hardly tries anything else. Lower "
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
        message=f"The KL divergence from the base model was {median:.3g} nats per token (median of the last "
        f"{history.window} steps): the model is moving away from what it knew. Check whether its text still makes "
        "sense; lower optimizer.learning_rate or raise loss.beta.",
    )


def _show_step(**order: str) -> Showing:
    """The rollouts of the last step, in the given order."""

    def show(history: History, _: Sequence[Completion]) -> Query:
        return {"step": history.rollout_step(history.last_step), **order}

    return show


def _show_best_paid_wrong(history: History, completions: Sequence[Completion]) -> Query:
    wrong = [c for c in completions if (c.rewards.get(history.measure) or 0.0) <= 0]
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
    Rule(
        name=Audit.NO_VARIANCE,
        measure=_no_variance,
        show=_show_step(),
        past="no group had a signal: all completions of a prompt had the same reward",
    ),
    Rule(
        name=Audit.FORMAT_GAMING,
        measure=_format_gaming,
        show=_show_best_paid_wrong,
        past="the reward rose and correctness hardly did: the format was learnt, not the answers",
        patience=0.5,
    ),
    Rule(
        name=Audit.TRUNCATION,
        measure=_truncation,
        show=_show_step(finish="length", order="reward"),
        past="many completions were cut off at sampling.max_completion_tokens",
    ),
    Rule(
        name=Audit.LENGTH_COLLAPSE,
        measure=_length_collapse,
        show=_show_step(order="length"),
        past="completions were far shorter than at the start, and correctness had not risen",
    ),
    Rule(
        name=Audit.LENGTH_GROWTH,
        measure=_length_growth,
        show=_show_step(order="-length"),
        past="completions were far longer than at the start, and correctness had not risen",
    ),
    Rule(
        name=Audit.DUPLICATES,
        measure=_duplicates,
        show=_show_most_duplicated,
        past="many completions repeated another of their group, and the reward was not rising",
    ),
    Rule(
        name=Audit.ENTROPY_COLLAPSE,
        measure=_entropy_collapse,
        show=_show_step(order="-reward"),
        past="the model was nearly certain of each token, and not all answers were correct",
    ),
    Rule(
        name=Audit.KL_RUNAWAY,
        measure=_kl_runaway,
        show=_show_highest_kl,
        past="the model was far from its base (KL divergence)",
    ),
)
"""Every rule; its name is its field in the spec's `audits`."""

"""Asks the adapter on its base and the exported model the same questions, and refuses an export that answers otherwise.

Owns the questions, the figures and what rounding excuses; the log-probabilities are the self-test's. The exported model
is read by transformers, which shares no code with what wrote it. Invariant: there are never two models in memory.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

import torch

from grpo_core.errors import fault
from grpo_core.evaluation.generate import Sampling, ask
from grpo_core.reasons import FailureCode
from grpo_core.selftest.logprob_probes import LogprobProbe, LogProbs, difference, make_probes, token_logprobs

if TYPE_CHECKING:
    from grpo_core.hardware.models import Precision
    from grpo_core.spec import DataSection

QUESTIONS: Final = (
    "Tom has 12 apples and buys 7 more. How many apples does he have now?",
    "A train travels 60 km in 45 minutes. How fast is it in km/h?",
    "小明有15个苹果，送走了6个，还剩几个？",
    "Write a Python function that returns the n-th Fibonacci number.",
    "What is the capital of Australia, and why is it not Sydney?",
    "Solve for x: 3x - 5 = 16. Show each step.",
    "Explain in two sentences why the sky is blue.",
    "A box has 9 red and 14 blue balls. How many balls are in 3 such boxes?",
)
ANSWER_TOKENS: Final = 96
BOUNDS: Final[Mapping[str, float]] = {"f32": 1e-4, "f16": 0.02, "bf16": 0.02, "q8_0": 0.05}
"""Mean absolute difference of log-probabilities that rounding the weights to a type explains."""
CLOSER: Final = 0.5
"""Where the adapter changes more than rounding explains, the export may be away from it by this share of the change."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What the adapter on its base answered."""

    probes: list[LogprobProbe]
    answers: list[str]
    adapter: LogProbs
    base: LogProbs


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The figures of one comparison, in nats per token."""

    questions: int
    tokens: int
    same_answers: int
    """Greedy answers that are equal, character for character."""
    mean: float
    """Mean absolute difference of the log-probabilities of the adapter's answers."""
    max: float
    bound: float
    """The largest mean that is accepted."""
    adapter_effect: float
    """The same mean between the base without and with the adapter."""

    def as_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)


def ask_adapter(model: Any, tokenizer: Any, data: DataSection, precision: Precision) -> Asked:
    """Ask a `PeftModel` the questions with and without its adapter."""
    answers = _answers(model, tokenizer, data)
    probes = make_probes(list(zip(QUESTIONS, answers, strict=True)), data, tokenizer, count=len(QUESTIONS))
    with model.disable_adapter():
        base = token_logprobs(model, probes, precision)
    return Asked(probes, answers, token_logprobs(model, probes, precision), base)


def require_same(
    asked: Asked, model: Any, tokenizer: Any, data: DataSection, precision: Precision, kind: str
) -> Comparison:
    """Ask the exported model and return the figures. Raises an `internal` failure if it answers otherwise."""
    answers = _answers(model, tokenizer, data)
    exported = token_logprobs(model, asked.probes, precision)
    apart, effect = difference(exported, asked.adapter), difference(asked.base, asked.adapter)
    found = Comparison(
        questions=len(answers),
        tokens=sum(len(probe.completion) for probe in asked.probes),
        same_answers=sum(one == other for one, other in zip(answers, asked.answers, strict=True)),
        mean=apart.mean,
        max=apart.max,
        bound=_bound(kind, effect.mean),
        adapter_effect=effect.mean,
    )
    if not found.mean <= found.bound:  # so that NaN fails too
        raise fault(
            FailureCode.EXPORT_DIFFERS,
            f"The exported model's log-probabilities are {found.mean:.3g} from the adapter's on average "
            f"({found.max:.3g} at most), and {found.bound:.3g} is accepted as rounding to {kind}. The adapter itself "
            f"changes {found.adapter_effect:.3g}. Nothing was published.",
        )
    return found


def release() -> None:
    """Free the memory of a model that nothing refers to any longer, before the next one is loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _bound(kind: str, effect: float) -> float:
    """An export without the adapter differs from it by the whole effect, and must fail wherever that exceeds
    rounding."""
    allowed = BOUNDS[kind]
    return min(allowed, CLOSER * effect) if effect > 2 * allowed else allowed


def _answers(model: Any, tokenizer: Any, data: DataSection) -> list[str]:
    sampling = Sampling(max_new_tokens=ANSWER_TOKENS, batch_size=len(QUESTIONS))
    return [answer.text for answer, _ in ask(model, tokenizer, list(QUESTIONS), data, sampling)]

"""Texts for which two programs compute log-probabilities, and the difference of the results.

Owns the choice of texts and the computation; the self-test decides which difference is acceptable. Invariants: probes
are computed one at a time, so padding makes no difference, and in the arithmetic of training, so rounding makes little.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch

from grpo_core.datasets.prompts import messages_for
from grpo_core.datasets.templates import encode

if TYPE_CHECKING:
    from grpo_core.hardware.models import Precision
    from grpo_core.spec import DataSection

PROBES: Final = 4
PROBE_TOKENS: Final = 128
"""Number of tokens of a completion to compare."""

LogProbs = list[list[float]]
"""For each probe, the log-probability of each token of its completion, at temperature 1."""

Texts = Sequence[tuple[str, str]]
"""Questions, each with something that was answered to it."""


@dataclass(frozen=True, slots=True)
class LogprobProbe:
    """Token ids of a templated prompt and of a completion."""

    prompt: list[int]
    completion: list[int]


@dataclass(frozen=True, slots=True)
class Difference:
    """How far two sets of log-probabilities are apart."""

    mean: float
    max: float


def make_probes(texts: Texts, data: DataSection, tokenizer: Any, *, count: int = PROBES) -> list[LogprobProbe]:
    """At most `count` texts as token ids, their answers cut; each question comes once before any comes twice."""
    given = [(question, answer) for question, answer in texts if answer]
    first_of_each = {question: (question, answer) for question, answer in reversed(given)}
    chosen = list(dict.fromkeys([*reversed(first_of_each.values()), *given]))[:count]
    probes: list[LogprobProbe] = []
    for question, answer in chosen:
        prompt = encode(tokenizer, [messages_for(question, data)])[0]
        completion = tokenizer(answer, add_special_tokens=False)["input_ids"][:PROBE_TOKENS]
        probes.append(LogprobProbe(prompt, list(completion)))
    return probes


def token_logprobs(model: Any, probes: Sequence[LogprobProbe], precision: Precision) -> LogProbs:
    """The model's log-probabilities, one probe at a time.

    Where weights have 16 bits or fewer, the adapter's 32 meet activations of 16 as in training. In 32 they would add
    differently rounded numbers in every layer: on a model with random weights that alone is as much as an adapter of
    a few steps changes.
    """
    mixed = torch.autocast(model.device.type, getattr(torch, precision.dtype), enabled=precision.dtype != "float32")
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), mixed:
            return [_logprobs_of(model, probe) for probe in probes]
    finally:
        model.train(was_training)


def difference(one: LogProbs, other: LogProbs) -> Difference:
    """Mean and largest absolute difference over all tokens."""
    apart = [abs(a - b) for xs, ys in zip(one, other, strict=True) for a, b in zip(xs, ys, strict=True)]
    return Difference(sum(apart) / len(apart), max(apart))


def _logprobs_of(model: Any, probe: LogprobProbe) -> list[float]:
    ids = torch.tensor([probe.prompt + probe.completion], device=model.device)
    # Each position foretells the next token.
    logits = model(input_ids=ids, use_cache=False).logits[0, len(probe.prompt) - 1 : -1]
    wanted = torch.tensor(probe.completion, device=logits.device).unsqueeze(-1)
    return logits.float().log_softmax(-1).gather(-1, wanted).squeeze(-1).tolist()

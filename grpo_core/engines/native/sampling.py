"""Samples a token from logits with a seed for each row, by a counter and without the state of a generator.

Owns the random numbers and the filters. Invariant: the token of a row depends only on its logits, its seed and its
number of tokens so far; on no other row, and not on the position in the batch. The Triton kernel has the same random
numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch

from grpo_core.engines.native.model import wide

_WORD: Final = 0xFFFFFFFF
INVERSE_TEMPERATURE, NOISE, PENALTY = range(3)
"""Positions in the tensor `knobs`, which is on the device so that a CUDA graph reads its current values."""


@dataclass(frozen=True, slots=True)
class Filters:
    """Limits on the tokens that can be sampled. They are fixed for a decoder, because its graphs depend on them."""

    top_k: int = 0
    """Number of most likely tokens to sample from; 0: all."""
    top_p: float = 1.0

    @property
    def on(self) -> bool:
        return self.top_k > 0 or self.top_p < 1


def draw(
    logits: torch.Tensor,
    seeds: torch.Tensor,
    counts: torch.Tensor,
    knobs: torch.Tensor,
    filters: Filters,
    seen: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample a token for each row of `logits` (rows × vocabulary). Returns the tokens and their log-probabilities.

    The log-probability is at the temperature and of the whole distribution, as in the trainer: without the filters and
    without the repetition penalty, which applies to the tokens in `seen`.
    """
    scores = wide(logits)
    scaled = scores * knobs[INVERSE_TEMPERATURE]
    if seen is not None:
        penalised = torch.where(scores < 0, scores * knobs[PENALTY], scores / knobs[PENALTY])
        allowed = torch.where(seen, penalised, scores) * knobs[INVERSE_TEMPERATURE]
    else:
        allowed = scaled
    if filters.on:
        allowed = _filtered(allowed, filters)
    noise = exponential(seeds, counts, logits.shape[1]).log()
    tokens = (allowed - knobs[NOISE] * noise).argmax(1)
    return tokens, scaled.gather(1, tokens[:, None])[:, 0] - scaled.logsumexp(1)


def exponential(seeds: torch.Tensor, counts: torch.Tensor, words: int) -> torch.Tensor:
    """Return an exponential variate for each row and token of the vocabulary (rows × vocabulary).

    Divided by the probabilities, the smallest one selects a token with its probability.
    """
    one = mix((seeds & _WORD) ^ mix(counts & _WORD))
    other = mix(((seeds >> 32) & _WORD) ^ ((one + 0x9E3779B9) & _WORD))
    numbers = torch.arange(words, device=seeds.device)
    mixed = mix((mix(numbers ^ one[:, None]) + other[:, None]) & _WORD)
    uniform = (mixed.float() * 2.0**-32 + 2.0**-33).clamp_max(1 - 2.0**-24)
    # -log(1 - u), by its series where the formula would lose digits.
    near = uniform * (1 + uniform * (0.5 + uniform / 3))
    return torch.where(uniform < 2.0**-7, near, -torch.log(1 - uniform))


def mix(x: torch.Tensor) -> torch.Tensor:
    """Return a 32-bit hash of 32-bit numbers."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _WORD
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _WORD
    return x ^ (x >> 16)


def _filtered(scores: torch.Tensor, filters: Filters) -> torch.Tensor:
    if filters.top_k:
        least = scores.topk(min(filters.top_k, scores.shape[1]), 1).values[:, -1:]
        scores = scores.masked_fill(scores < least, -math.inf)
    if filters.top_p < 1:
        values, at = scores.sort(1, descending=True)
        likely = values.softmax(1)
        beyond = likely.cumsum(1) - likely >= filters.top_p
        scores = scores.masked_fill(torch.zeros_like(beyond).scatter(1, at, beyond), -math.inf)
    return scores

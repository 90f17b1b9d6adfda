"""What a sampler is asked for and what it returns. A sampler is a way to generate: the native decoder, transformers or
vLLM.

Owns the two records and the protocols. Invariant: a completion depends on its prompt, its seed and the model, and on no
other completion, except for rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Request:
    """A completion to generate."""

    prompt: Sequence[int]
    seed: int


@dataclass(frozen=True, slots=True)
class Drawn:
    """A generated completion, including its stop token, and the log-probability of each token."""

    tokens: list[int]
    logprobs: list[float]


class Sampler(Protocol):
    """A way to generate completions."""

    def generate(
        self, requests: Sequence[Request], *, tokens: int, temperature: float = 1.0, penalty: float = 1.0
    ) -> list[Drawn]:
        """Return a completion of at most `tokens` tokens for each request, in order. Temperature 0 is greedy."""
        ...


class ServingSampler(Sampler, Protocol):
    """A sampler of the base model or of the adapter in training."""

    is_apart: bool
    """Whether it is another program than the trainer, so that their log-probabilities are compared."""

    def serving(self, *, adapter: bool) -> AbstractContextManager[None]:
        """Generate with the present adapter in this block, or with the base model."""
        ...

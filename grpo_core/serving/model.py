"""What a served model computes: the logits of the next token, for rows that each have their own cache.

Owns the protocol of both engines and the way a row's next token is sampled, which is the trainer's. Invariant: a token
depends only on its row's logits, seed and number of tokens so far.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from grpo_core.engines.native.model import wide
from grpo_core.engines.native.sampling import Filters, draw
from grpo_core.serving.guide import Guide, constrain


class Model(Protocol):
    """A base model with its adapters. Used from one thread."""

    name: str
    """The engine."""
    tokenizer: Any
    stops: frozenset[int]
    context: int
    """Largest number of tokens of prompt and answer together."""
    rows: int
    """Largest number of answers that are generated at the same time."""
    prompt_tokens: int
    """Prompts that are read together have at most this many tokens; one prompt may have more."""
    cache_tokens: int | None
    """Tokens that fit into all caches together; None: as many as there are rows."""

    def reserve(self, tokens: int) -> Any | None:
        """Return an empty cache with room for `tokens`; None if there is no room now."""
        ...

    def release(self, cache: Any) -> None:
        """Give a cache's room back."""
        ...

    def prefill(self, prompts: Sequence[tuple[str, Sequence[int], Any]]) -> torch.Tensor:
        """Read each prompt, given as adapter, tokens and empty cache. Returns the logits (prompts × vocabulary) of the
        next tokens."""
        ...

    def copy(self, cache: Any, into: Any) -> None:
        """Fill an empty cache with what another has read, for another answer to the same prompt."""
        ...

    def step(self, rows: Sequence[tuple[str, int, Any]]) -> torch.Tensor:
        """Add a token to each row, given as adapter, token and cache. Returns the logits (rows × vocabulary) of the
        next ones."""
        ...


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a row's tokens are sampled."""

    temperature: float
    top_p: float
    seed: int
    guide: Guide | None = None


@dataclass(frozen=True, slots=True)
class Token:
    """A sampled token, with the log-probabilities of the model's own distribution, at temperature 1."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens, if they were asked for."""


def sample(
    logits: torch.Tensor, rows: Sequence[Sampling], counts: Sequence[int], tops: Sequence[int | None]
) -> list[Token]:
    """Sample the next token of each row of `logits` (rows × vocabulary).

    `counts` are the numbers of tokens so far; `tops` the numbers of alternatives, None for no log-probabilities.
    """
    allowed = constrain(logits, [row.guide for row in rows])
    alike: defaultdict[tuple[float, float], list[int]] = defaultdict(list)
    for at, row in enumerate(rows):
        alike[row.temperature, row.top_p].append(at)
    chosen = [0] * len(rows)
    for (temperature, top_p), places in alike.items():
        for at, token in zip(places, _draw(allowed, rows, counts, places, temperature, top_p), strict=True):
            chosen[at] = token
    return [_token(logits[at], chosen[at], tops[at]) for at in range(len(rows))]


def _draw(
    logits: torch.Tensor,
    rows: Sequence[Sampling],
    counts: Sequence[int],
    places: Sequence[int],
    temperature: float,
    top_p: float,
) -> list[int]:
    device = logits.device
    knobs = [1 / temperature, 1.0, 1.0] if temperature else [1.0, 0.0, 1.0]
    tokens, _ = draw(
        logits[list(places)],
        torch.tensor([rows[at].seed for at in places], device=device),
        torch.tensor([counts[at] for at in places], device=device),
        torch.tensor(knobs, dtype=wide(logits[:1]).dtype, device=device),
        Filters(top_p=top_p if temperature else 1.0),
    )
    return tokens.tolist()


def _token(logits: torch.Tensor, chosen: int, top: int | None) -> Token:
    if top is None:
        return Token(chosen, 0.0)
    logprobs = wide(logits).log_softmax(0)
    best = logprobs.topk(top) if top else None
    likely = () if best is None else tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return Token(chosen, float(logprobs[chosen]), likely)

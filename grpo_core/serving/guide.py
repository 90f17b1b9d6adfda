"""Answers that match a JSON Schema: which tokens each of them may have next.

Owns the state of each answer in its schema's grammar and the masks of logits. Schemas are those that
`schemas.fault_of` found nothing wrong with. Invariant: an answer that ended by itself matches its schema; one that was
cut off at its limit begins like such an answer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from llguidance import LLMatcher, LLTokenizer
from torch.nn import functional

from grpo_core.serving.schemas import matcher


class GuideError(Exception):
    """An answer cannot be made to match its schema."""


class Guide:
    """What one answer may say next."""

    def __init__(self, made: LLMatcher) -> None:
        self._matcher = made

    def copy(self) -> Guide:
        """A guide for another answer that has said the same so far."""
        return Guide(self._matcher.deep_copy())

    def mask(self) -> bytes:
        """A bit for each token of the tokenizer, set for those that may come next."""
        return self._matcher.compute_bitmask()

    def take(self, token: int) -> None:
        """Add a token. Raises `GuideError` where the schema needs more work for one token than it may."""
        self._matcher.consume_token(token)
        if self._matcher.is_error():
            raise GuideError(f"The schema is too complex to continue the answer: {_first_line(self._matcher)}")


class Guides:
    """Makes the guides of one session."""

    def __init__(self, tokenizer: Any, stops: Sequence[int]) -> None:
        self._tokenizer, self._stops = tokenizer, list(stops)

    @cached_property
    def _tokens(self) -> LLTokenizer:
        """Made for the first schema, because it takes a second for 150,000 tokens."""
        from llguidance.hf import from_tokenizer

        return from_tokenizer(self._tokenizer, eos_token=self._stops)

    def make(self, schema: Mapping[str, Any]) -> Guide:
        """Raises `GuideError` for a schema or a tokenizer that cannot guide answers."""
        try:
            made = matcher(json.dumps(schema), self._tokens)
        except ValueError as error:
            raise GuideError(f"This model's tokenizer cannot be guided: {error}") from error
        if made.is_error():
            raise GuideError(f"The schema cannot guide an answer: {_first_line(made)}")
        return Guide(made)


def constrain(logits: torch.Tensor, guides: Sequence[Guide | None]) -> torch.Tensor:
    """Return logits (rows × vocabulary) without the tokens that each row's guide forbids; the given ones stay."""
    guided = [(at, guide) for at, guide in enumerate(guides) if guide is not None]
    if not guided:
        return logits
    packed = bytearray(b"".join(guide.mask() for _, guide in guided))
    bits = torch.frombuffer(packed, dtype=torch.uint8).view(len(guided), -1, 1).to(logits.device)
    allowed = ((bits >> torch.arange(8, dtype=torch.uint8, device=logits.device)) & 1).flatten(1)
    # A model may have more logits than its tokenizer has tokens.
    more = logits.shape[1] - allowed.shape[1]
    allowed = functional.pad(allowed, (0, more)) if more > 0 else allowed[:, : logits.shape[1]]
    rows = [at for at, _ in guided]
    constrained = logits.clone()
    constrained[rows] = constrained[rows].masked_fill(allowed == 0, -math.inf)
    return constrained


def _first_line(made: LLMatcher) -> str:
    return made.get_error().partition("\n")[0]

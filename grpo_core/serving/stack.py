"""All adapters of a session as one: their matrices side by side, and a mask that leaves each token its own.

So one pass serves rows of several adapters and of the base: the base's weights, which take nearly all of the time, are
read once for all. Owns the adapters' numbers and joined matrices. Invariant: for a token, every other adapter adds
exact zeros.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch.nn import functional

from grpo_core.engines.native.adapter import Pair, Pairs
from grpo_core.engines.native.architecture import LINEARS
from grpo_core.engines.native.model import Halves, apply, halves_of
from grpo_core.engines.native.weights import Weights

NONE: Final = 0
"""The number of the base, which has no adapter."""


class Stack:
    """Adapters of the same rank, scale and targets; `adapters` are the pairs of all layers by name."""

    def __init__(self, weights: Weights, adapters: Mapping[str, Sequence[Pairs]]) -> None:
        self._architecture, self._dtype = weights.architecture, weights.dtype
        self._numbers = {name: number for number, name in enumerate(adapters, NONE + 1)}
        self._of = torch.arange(NONE + 1, NONE + 1 + len(adapters), device=weights.device)
        """The numbers in the order of the joined matrices."""
        self._layers = [_join([pairs[layer] for pairs in adapters.values()]) for layer in range(len(weights.layers))]

    def number(self, name: str) -> int:
        """The number of an adapter, or of the base."""
        return self._numbers.get(name, NONE)

    def pairs(self, layer: int) -> Pairs:
        """The joined matrices of a layer."""
        return self._layers[layer]

    def halves(self, numbers: torch.Tensor) -> Halves:
        """The halves of a layer for tokens with these adapters (tokens)."""
        if not self._numbers:
            return halves_of(self._architecture)
        has = (numbers[:, None] == self._of).to(self._dtype)
        masks: dict[int, torch.Tensor] = {}

        def linear(
            x: torch.Tensor, weight: Any, scales: Any, bias: Any, a: torch.Tensor | None, b: Any, scale: float
        ) -> torch.Tensor:
            y = apply(x, weight, scales, bias, None, None, scale)
            if a is None:
                return y
            width = a.shape[0]
            if width not in masks:
                masks[width] = has.repeat_interleave(width // len(self._of), 1)
            return torch.addmm(y, functional.linear(x, a) * masks[width], b.t(), alpha=scale)

        return halves_of(self._architecture, linear)


def _join(layers: Sequence[Pairs]) -> Pairs:
    """One layer's matrices of all adapters: A below each other, B side by side."""
    return {kind: _join_linear([pairs[kind] for pairs in layers]) for kind in LINEARS}


def _join_linear(pairs: Sequence[Pair]) -> Pair:
    below = [a for a, _, _ in pairs if a is not None]
    beside = [b for _, b, _ in pairs if b is not None]
    return (torch.cat(below), torch.cat(beside, 1), pairs[0][2]) if below else (None, None, 1.0)

"""The arithmetic of a decoder layer before and after attention, which both modes share.

Attention and the layout of tokens differ between the modes, so they are elsewhere. Every function is plain torch, and
autograd differentiates it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from grpo_core import eight_bits
from grpo_core.engines.native.adapter import Pairs
from grpo_core.engines.native.architecture import LINEARS, Architecture
from grpo_core.engines.native.weights import Weights

Attend = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
"""Attention of a layer: takes its number, queries, and keys with values; returns the outputs of all heads,
concatenated."""
NO_PAIRS: Final[Pairs] = dict.fromkeys(LINEARS, (None, None, 1.0))
"""Pairs for a layer without adapter."""
Halves = tuple[Callable[..., tuple[torch.Tensor, torch.Tensor]], Callable[..., torch.Tensor]]
Linear = Callable[..., torch.Tensor]
"""A linear layer with its adapter, as `apply`."""


def hidden(
    weights: Weights,
    x: torch.Tensor,
    angles: tuple[torch.Tensor, ...],
    pairs: Callable[[int], Pairs],
    attend: Attend,
    halves: Halves | None = None,
    *,
    sparing: bool = False,
) -> torch.Tensor:
    """Return the normed output of the last layer for embedded tokens `x`; both are tokens × hidden size.

    `halves` are those of `halves_of`, or compiled. `sparing`: keep only each layer's input for the backward pass.
    """
    architecture = weights.architecture
    before, after = halves or halves_of(architecture)

    def through(x: torch.Tensor, number: int) -> torch.Tensor:
        layer, adapter = weights.layer(number), pairs(number)
        own = {
            kind: (linear.weight, linear.scales, linear.bias, *adapter[kind]) for kind, linear in layer.linears.items()
        }
        q, kv = before(x, *angles, layer.input_norm, *own["qkv"], layer.query_norm, layer.key_norm)
        attended = attend(number, q, kv)
        return after(x, attended, layer.output_norm, *own["o"], *own["gate_up"], *own["down"])

    for number in range(architecture.layers):
        x = checkpoint(through, x, number, use_reentrant=False) if sparing else through(x, number)
    return functional.rms_norm(x, (architecture.hidden,), weights.norm, architecture.epsilon)


def halves_of(architecture: Architecture, linear: Linear | None = None) -> Halves:
    """Return the two halves of a layer as functions of tensors alone, for which `torch.compile` has the least overhead.

    `linear` is what applies a linear layer with its adapter; `apply` if it is None.

    `before` returns queries (tokens × heads × head size) and keys with values (tokens × 2 × key heads × head size).
    `after` returns the layer's output from its input and the heads' outputs (tokens × (heads · head size)).
    """
    size, head, epsilon = architecture.hidden, architecture.head, architecture.epsilon
    widths = [architecture.queries, architecture.keys, architecture.keys]
    linear = linear or apply

    def before(
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        norm: torch.Tensor,
        weight: torch.Tensor,
        scales: torch.Tensor | None,
        bias: torch.Tensor | None,
        a: torch.Tensor | None,
        b: torch.Tensor | None,
        scale: float,
        query_norm: torch.Tensor | None,
        key_norm: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        y = linear(functional.rms_norm(x, (size,), norm, epsilon), weight, scales, bias, a, b, scale)
        q, k, v = (part.unflatten(1, (-1, head)) for part in y.split(widths, 1))
        if query_norm is not None:
            q = functional.rms_norm(q, (head,), query_norm, epsilon)
            k = functional.rms_norm(k, (head,), key_norm, epsilon)
        return turn(q, cos, sin), torch.stack([turn(k, cos, sin), v], 1)

    def after(x: torch.Tensor, attended: torch.Tensor, norm: torch.Tensor, *linears: Any) -> torch.Tensor:
        x = x + linear(attended, *linears[:6])
        gate, up = linear(functional.rms_norm(x, (size,), norm, epsilon), *linears[6:12]).chunk(2, 1)
        return x + linear(functional.silu(gate) * up, *linears[12:])

    return before, after


def apply(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor | None,
    bias: torch.Tensor | None,
    a: torch.Tensor | None,
    b: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """Apply a linear layer and its adapter, if it has one, to `x` (tokens × inputs). With `scales`, the weight has 8
    bits."""
    if scales is None:
        y = functional.linear(x, weight, bias)
    else:
        y = eight_bits.linear(x, weight, scales)
        y = y if bias is None else y + bias
    return y if a is None or b is None else torch.addmm(y, functional.linear(x, a), b.t(), alpha=scale)


def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply the rotary embedding to `x` (tokens × heads × head size); `cos` and `sin` have half the head size."""
    cos, sin = (torch.cat([half, half], 1)[:, None] for half in (cos, sin))
    one, other = x.chunk(2, -1)
    return x * cos + torch.cat([-other, one], -1) * sin


def wide(x: torch.Tensor) -> torch.Tensor:
    """Convert to at least 32 bits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))

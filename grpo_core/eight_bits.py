"""Matrix products in 8-bit floating point (E4M3): weights with a scale a row, activations with a scale a token.

Owns the numbers and their scales, on a card by torch's own kernel and on a CPU by its plain twin; which matrices are
held so is their engine's to say. Invariant: equal activations give equal numbers wherever they are asked for, so that
what draws, what trains and what is tested have the same model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch.nn import functional

FP8: Final = torch.float8_e4m3fn
LARGEST: Final = 448.0
"""What the format can hold."""
SMALLEST: Final = 1e-12
CAPABILITY: Final = (8, 9)
"""The first compute capability whose tensor cores multiply such numbers."""


@dataclass(frozen=True, slots=True)
class Quantised:
    """A matrix as numbers of 8 bits and a scale for each row, in 32."""

    values: torch.Tensor
    scales: torch.Tensor
    """One column."""

    def wide(self, dtype: torch.dtype) -> torch.Tensor:
        """What it stands for."""
        return (self.values.float() * self.scales).to(dtype)


def quantise(x: torch.Tensor) -> Quantised:
    """A matrix in 8 bits, its largest number in each row being the format's."""
    wide = x.float()
    scales = wide.abs().amax(1, keepdim=True).clamp_min(SMALLEST) / LARGEST
    return Quantised((wide / scales).clamp(-LARGEST, LARGEST).to(FP8), scales)


def product(x: Quantised, values: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x W' for the numbers of W (outputs, inputs) and its scales (outputs, 1)."""
    if x.values.is_cuda:
        kernel: Any = torch._scaled_mm  # noqa: SLF001  # pyright: ignore - it has no other name
        return kernel(x.values, values.t(), scale_a=x.scales, scale_b=scales.t(), out_dtype=dtype, use_fast_accum=True)
    wide = torch.promote_types(dtype, torch.float32)
    return (functional.linear(x.values.to(wide), values.to(wide)) * x.scales * scales.t()).to(dtype)


def linear(x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """x W' with both in 8 bits, and so is its gradient by x."""
    return _Linear.apply(x, values, scales)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(values, scales)
        return product(quantise(x), values, scales, x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        values, scales = ctx.saved_tensors
        # The weight's scales lie along what is summed over, so they go into the gradient before it gets its own.
        (gradient,) = gradients
        scaled = quantise(gradient.float() * scales.t())
        ones = torch.ones(values.shape[1], 1, device=values.device)
        # The kernel wants what it sums over to lie together: turned anew each time, it takes no memory in between.
        turned = values.view(torch.uint8).t().contiguous().view(FP8)
        return product(scaled, turned, ones, gradient.dtype), None, None

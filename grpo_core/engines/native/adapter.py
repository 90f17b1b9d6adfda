"""The trained LoRA adapter: one flat tensor (leaf) per layer, of which PEFT's parameters are views.

Owns the position of each matrix in its leaf, the pairs (A, B) of a fused linear layer, and the views. Invariants: only
the leaf holds values, so PEFT saves, loads and optimizes what is trained; the trainer clears the leaf's gradient.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional

from grpo_core.engines.native.architecture import LINEARS, MODULES, Architecture

Pair = tuple[torch.Tensor | None, torch.Tensor | None, float]
"""A of all projections of a linear, one below the other, their B, block by block on the diagonal, and the scale."""
Pairs = dict[str, Pair]


class Adapter:
    """A LoRA adapter on some projections of every layer."""

    def __init__(
        self,
        architecture: Architecture,
        *,
        rank: int,
        scale: float,
        targets: Sequence[str],
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.rank, self._scale = rank, scale
        self._widths = {kind: architecture.widths(kind) for kind in LINEARS}
        self._kept = {kind: [name for name in self._widths[kind] if name in targets] for kind in LINEARS}
        self._shapes = {
            (name, matrix): (rank, architecture.inputs(kind)) if matrix == "A" else (self._widths[kind][name], rank)
            for kind in LINEARS
            for matrix in "AB"
            for name in self._kept[kind]
        }
        size = sum(map(math.prod, self._shapes.values()))
        self.leaves = [
            torch.zeros(size, device=device, dtype=dtype, requires_grad=True) for _ in range(architecture.layers)
        ]
        self._views: list[list[tuple[torch.nn.Parameter, int]]] = []
        self.enabled = True
        """Whether it is the adapter that answers, and not the base."""

    def named(self, layer: int) -> dict[str, torch.Tensor]:
        """Return views of a layer's matrices by PEFT's names."""
        module = {name: MODULES[kind] for kind in LINEARS for name in self._kept[kind]}
        return {
            f"base_model.model.model.layers.{layer}.{module[name]}.{name}.lora_{matrix}.weight": view
            for (name, matrix), view in self._split(self.leaves[layer].detach()).items()
        }

    def pairs(self, layer: int, dtype: torch.dtype) -> Pairs:
        """Return the pair (A, B) and the scale for each linear layer, in `dtype`; gradients flow to the leaf."""
        views = self._split(self.leaves[layer].to(dtype))
        pairs: Pairs = {}
        for kind, kept in self._kept.items():
            if not kept:
                pairs[kind] = None, None, 1.0
                continue
            blocks: list[torch.Tensor] = []
            for name, width in self._widths[kind].items():
                if name in kept:
                    at = kept.index(name) * self.rank
                    blocks.append(functional.pad(views[name, "B"], (at, (len(kept) - 1) * self.rank - at)))
                else:
                    blocks.append(views[kept[0], "B"].new_zeros(width, len(kept) * self.rank))
            a = [views[name, "A"] for name in kept]
            pairs[kind] = _joined(a), _joined(blocks), self._scale
        return pairs

    def matrices(self, layer: int) -> Iterator[tuple[str, str, str, torch.Tensor]]:
        """Yield linear layer, projection, "A" or "B", and the values of each matrix of a layer; B includes the
        scale."""
        of = {name: kind for kind, kept in self._kept.items() for name in kept}
        for (name, matrix), view in self._split(self.leaves[layer].detach()).items():
            yield of[name], name, matrix, view if matrix == "A" else view * self._scale

    def adopt(self, model: Any) -> None:
        """Copy the adapter of a `PeftModel`, and make its parameters views of the leaves.

        So does its `disable_adapter`: PEFT's own asks every layer first, a twentieth of a small step.
        """
        parameters = dict(model.named_parameters())
        model.disable_adapter = self.disabled
        for layer, leaf in enumerate(self.leaves):
            views: list[tuple[torch.nn.Parameter, int]] = []
            for name, view in self.named(layer).items():
                parameter = parameters[name.replace(".weight", ".default.weight")]
                view.copy_(parameter.data)
                parameter.data = view
                views.append((parameter, int(view.storage_offset() - leaf.storage_offset())))
            self._views.append(views)
            leaf.register_post_accumulate_grad_hook(self._show_gradients(views))

    @contextmanager
    def disabled(self) -> Generator[None]:
        """Use the base model in this block."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    def begin(self) -> None:
        """Clear gradients that the trainer has cleared. Call it before a forward pass that will be differentiated."""
        for leaf, views in zip(self.leaves, self._views, strict=True):
            if views and views[0][0].grad is None:
                leaf.grad = None

    def gradients(self) -> list[torch.Tensor]:
        """Return each leaf's gradient tensor itself; zeros if there was nothing to learn from."""
        for leaf, views in zip(self.leaves, self._views, strict=True):
            if leaf.grad is None:
                leaf.grad = torch.zeros_like(leaf)
                self._show_gradients(views)(leaf)
        return [leaf.grad for leaf in self.leaves if leaf.grad is not None]

    def _split(self, leaf: torch.Tensor) -> dict[tuple[str, str], torch.Tensor]:
        parts = leaf.split([math.prod(shape) for shape in self._shapes.values()])
        return {key: part.view(shape) for (key, shape), part in zip(self._shapes.items(), parts, strict=True)}

    @staticmethod
    def _show_gradients(views: list[tuple[torch.nn.Parameter, int]]) -> Any:
        def show(leaf: torch.Tensor) -> None:
            assert leaf.grad is not None
            for parameter, offset in views:
                if parameter.grad is None:
                    part = leaf.grad[offset : offset + parameter.numel()]
                    parameter.grad = part.view(parameter.shape)

        return show


def _joined(blocks: list[torch.Tensor]) -> torch.Tensor:
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)

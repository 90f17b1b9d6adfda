"""Loads a base model's weights from safetensors directly to their device.

Owns their layout in memory: projections with the same input are one matrix, either in 16 bits with spare rows for the
adapter's A, so that the decoder multiplies once, or in 8 bits with scales. Embedding, norms and head are never in 8
bits. Invariant: the parameters that transformers names are views of these matrices and never copies.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import torch
from safetensors import safe_open

from grpo_core.eight_bits import FP8, quantise
from grpo_core.engines.native.architecture import LINEARS, MODULES, Architecture

SCALES: Final = ".weight_scales"
"""What a projection's scales are called, behind its name; transformers has no such tensor."""


@dataclass(slots=True)
class Linear:
    """Some projections of the same input as one matrix."""

    stored: torch.Tensor
    """The weight, and below it the spare rows."""
    outputs: int
    bias: torch.Tensor | None = None
    scales: torch.Tensor | None = None
    """Of each output's weights, where they are in 8 bits."""

    @property
    def weight(self) -> torch.Tensor:
        return self.stored[: self.outputs]


@dataclass(slots=True)
class Layer:
    """One decoder layer."""

    input_norm: torch.Tensor
    output_norm: torch.Tensor
    linears: dict[str, Linear]
    query_norm: torch.Tensor | None = None
    key_norm: torch.Tensor | None = None


@dataclass(slots=True)
class Weights:
    """A whole model."""

    architecture: Architecture
    embedding: torch.Tensor
    head: torch.Tensor
    norm: torch.Tensor
    layers: list[Layer] = field(default_factory=list[Layer])

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    def named(self) -> dict[str, torch.Tensor]:
        """Every tensor by transformers' name."""
        names = {"model.embed_tokens.weight": self.embedding, "model.norm.weight": self.norm}
        names["lm_head.weight"] = self.head
        for number, layer in enumerate(self.layers):
            at = f"model.layers.{number}."
            names[f"{at}input_layernorm.weight"] = layer.input_norm
            names[f"{at}post_attention_layernorm.weight"] = layer.output_norm
            if layer.query_norm is not None and layer.key_norm is not None:
                names[f"{at}self_attn.q_norm.weight"] = layer.query_norm
                names[f"{at}self_attn.k_norm.weight"] = layer.key_norm
            for kind, linear in layer.linears.items():
                widths = self.architecture.widths(kind)
                pieces = linear.weight.split(list(widths.values()))
                if linear.scales is not None:
                    for name, piece in zip(widths, linear.scales.split(list(widths.values())), strict=True):
                        names[f"{at}{MODULES[kind]}.{name}{SCALES}"] = piece
                biases = [None] * len(widths) if linear.bias is None else linear.bias.split(list(widths.values()))
                for name, piece, bias in zip(widths, pieces, biases, strict=True):
                    names[f"{at}{MODULES[kind]}.{name}.weight"] = piece
                    if bias is not None:
                        names[f"{at}{MODULES[kind]}.{name}.bias"] = bias
        return names


def load_weights(
    architecture: Architecture,
    folder: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    spare_rank: int = 0,
    eight_bits: bool = False,
) -> Weights:
    """The weights in the folder's `*.safetensors`, one file or many; `spare_rank` rows for each projection.

    `require_tensors` must have passed.
    """
    names = _names_in(folder)
    weights = empty_weights(
        architecture, names.keys(), device=device, dtype=dtype, spare_rank=spare_rank, eight_bits=eight_bits
    )
    wanted = weights.named()
    for name, tensor in _read(names, wanted.keys(), str(device)):
        fill(wanted, name, tensor.to(dtype))
    return weights


def require_tensors(architecture: Architecture, folder: Path) -> None:
    """Raises `ValueError` if the files lack a tensor or have one of another shape; reads their headers only."""
    names = _names_in(folder)
    on_meta = empty_weights(architecture, names.keys(), device=torch.device("meta"), dtype=torch.float32)
    wanted = {name: tuple(tensor.shape) for name, tensor in on_meta.named().items()}
    missing = wanted.keys() - names.keys() - ({"lm_head.weight"} if architecture.tied else set[str]())
    if missing:
        raise ValueError(f"the files lack {len(missing)} tensors, {min(missing)} among them")
    for file in sorted(set(names.values())):
        with safe_open(file, "pt") as opened:
            for name in opened.keys() & wanted.keys():
                shape = tuple(opened.get_slice(name).get_shape())
                if shape != wanted[name]:
                    raise ValueError(f"{name} has the shape {shape}, not {wanted[name]}")


def fill(wanted: Mapping[str, torch.Tensor], name: str, tensor: torch.Tensor) -> None:
    """Put a tensor into its place, in 8 bits where that is one."""
    place = wanted[name]
    if place.dtype == FP8:
        quantised = quantise(tensor)
        place.copy_(quantised.values)
        wanted[name.removesuffix(".weight") + SCALES].copy_(quantised.scales)
    else:
        place.copy_(tensor)


def empty_weights(
    architecture: Architecture,
    names: Collection[str],
    *,
    device: torch.device,
    dtype: torch.dtype,
    spare_rank: int = 0,
    eight_bits: bool = False,
) -> Weights:
    """Room for the weights; `names` are the tensors that the model has, by which biases and norms are known."""

    def room(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, device=device, dtype=dtype)

    def linear(at: str, kind: str) -> Linear:
        widths = architecture.widths(kind)
        outputs, inputs = sum(widths.values()), architecture.inputs(kind)
        biased = any(f"{at}{MODULES[kind]}.{name}.bias" in names for name in widths)
        bias = room(outputs) if biased else None
        if eight_bits:
            scales = torch.ones(outputs, 1, device=device)
            return Linear(torch.zeros(outputs, inputs, device=device, dtype=FP8), outputs, bias, scales)
        return Linear(room(outputs + spare_rank * len(widths), inputs), outputs, bias)

    embedding = room(architecture.vocabulary, architecture.hidden)
    head = embedding if architecture.tied else room(architecture.vocabulary, architecture.hidden)
    weights = Weights(architecture, embedding, head, room(architecture.hidden))
    for number in range(architecture.layers):
        at = f"model.layers.{number}."
        normed = f"{at}self_attn.q_norm.weight" in names
        weights.layers.append(
            Layer(
                room(architecture.hidden),
                room(architecture.hidden),
                {kind: linear(at, kind) for kind in LINEARS},
                room(architecture.head) if normed else None,
                room(architecture.head) if normed else None,
            )
        )
    return weights


def _names_in(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= dict.fromkeys(opened.keys(), file)
    return found


def _read(names: Mapping[str, Path], wanted: Collection[str], device: str) -> Iterator[tuple[str, torch.Tensor]]:
    for file in sorted(set(names.values())):
        with safe_open(file, "pt", device=device) as opened:
            for name in opened.keys():  # noqa: SIM118 - no mapping
                if name in wanted:
                    yield name, opened.get_tensor(name)

"""Loads a base model's weights from safetensors directly to their device.

Owns their layout in memory: projections with the same input are one matrix, either in 16 bits with spare rows for the
adapter's A, so that the decoder multiplies once, or in 8 bits with scales. Embedding, norms and head are never in 8
bits. With `shards`, this rank holds a part of each matrix. Invariant: the parameters that transformers names are views
of these matrices and never copies.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Final

import torch
from safetensors import safe_open

from grpo_core.eight_bits import FP8, quantise
from grpo_core.engines.native.architecture import LINEARS, MODULES, Architecture
from grpo_core.engines.native.shards import EMBEDDING, HEAD, Peers, Shards, aligned, buffer_bytes

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


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor that transformers names is."""

    unit: int | None
    """The layer, `EMBEDDING` or `HEAD` that it is a matrix of; None: a small tensor, whole on every rank."""
    tensor: torch.Tensor
    scales: torch.Tensor | None = None


@dataclass(slots=True)
class Weights:
    """A whole model. A pass over it calls `begin`, `layer` for each layer and `end`, in this order."""

    architecture: Architecture
    embedding: torch.Tensor
    head: torch.Tensor
    norm: torch.Tensor
    layers: list[Layer] = field(default_factory=list[Layer])
    shards: Shards | None = None
    """What gathers the matrices, if ranks hold parts of them; a matrix then has values only where a pass uses it."""

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @property
    def nbytes(self) -> int:
        """Memory of this rank's weights; spare rows count only where they are gathered."""
        whole = {t.data_ptr(): t.nbytes for t in self.named().values() if not (self.shards and self.shards.covers(t))}
        return sum(whole.values()) + (self.shards.nbytes if self.shards else 0)

    def begin(self) -> torch.Tensor:
        """Return the embedding."""
        if self.shards is not None:
            self.shards.begin()
        return self.embedding

    def layer(self, number: int) -> Layer:
        """Return a layer."""
        if self.shards is not None:
            self.shards.layer(number)
        return self.layers[number]

    def end(self) -> torch.Tensor:
        """Return the head."""
        if self.shards is not None:
            self.shards.end()
        return self.head

    def keep_step(self, passes: int, *, back: bool = False, head: bool = True) -> None:
        """Before a number of passes, accompany other ranks in those that they make beyond it."""
        if self.shards is not None:
            self.shards.accompany(self.shards.most(passes)[0] - passes, back=back, head=head)

    def keeping(self) -> AbstractContextManager[None]:
        """In this block, a forward pass can be differentiated."""
        return nullcontext() if self.shards is None else self.shards.kept_apart()

    def write(self, number: int, place: torch.Tensor, values: torch.Tensor) -> None:
        """Write into a matrix of a layer, on every rank."""
        if self.shards is not None and self.shards.covers(place):
            self.shards.write(number, place, values)
        else:
            place.copy_(values)

    def named(self) -> dict[str, torch.Tensor]:
        """Every tensor by transformers' name."""
        named: dict[str, torch.Tensor] = {}
        for name, place in self.places().items():
            named[name] = place.tensor
            if place.scales is not None:
                named[name.removesuffix(".weight") + SCALES] = place.scales
        return named

    def places(self) -> dict[str, Place]:
        """The place of every tensor by transformers' name."""
        places = {
            "model.embed_tokens.weight": Place(EMBEDDING, self.embedding),
            "model.norm.weight": Place(None, self.norm),
            "lm_head.weight": Place(HEAD, self.head),
        }
        for number, layer in enumerate(self.layers):
            at = f"model.layers.{number}."
            places[f"{at}input_layernorm.weight"] = Place(None, layer.input_norm)
            places[f"{at}post_attention_layernorm.weight"] = Place(None, layer.output_norm)
            if layer.query_norm is not None and layer.key_norm is not None:
                places[f"{at}self_attn.q_norm.weight"] = Place(None, layer.query_norm)
                places[f"{at}self_attn.k_norm.weight"] = Place(None, layer.key_norm)
            for kind, linear in layer.linears.items():
                widths = self.architecture.widths(kind)
                pieces = linear.weight.split(list(widths.values()))
                scales, biases = (
                    [None] * len(widths) if whole is None else whole.split(list(widths.values()))
                    for whole in (linear.scales, linear.bias)
                )
                for name, piece, scale, bias in zip(widths, pieces, scales, biases, strict=True):
                    places[f"{at}{MODULES[kind]}.{name}.weight"] = Place(number, piece, scale)
                    if bias is not None:
                        places[f"{at}{MODULES[kind]}.{name}.bias"] = Place(None, bias)
        return places

    def rows_of(self, place: Place) -> range:
        """Return the rows of a tensor that this rank reads."""
        if self.shards is None or place.unit is None:
            return range(len(place.tensor))
        own, width = self.shards.own(place.unit, place.tensor), place.tensor.shape[1]
        return range(own.start // width, -(-own.stop // width) if own else own.start // width)

    def fill(self, place: Place, values: torch.Tensor, row: int = 0) -> None:
        """Put a tensor, or its rows from `row` on, into its place, in 8 bits where that is one."""
        scales = None
        if place.tensor.dtype == FP8:
            quantised = quantise(values)
            values, scales = quantised.values, quantised.scales
        if self.shards is not None and place.unit is not None:
            skipped = row * place.tensor.shape[1]
            self.shards.write(place.unit, place.tensor, values, skipped)
        else:
            place.tensor[row : row + len(values)].copy_(values)
        if place.scales is not None and scales is not None:
            place.scales[row : row + len(values)].copy_(scales)


def load_weights(
    architecture: Architecture,
    folder: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    spare_rank: int = 0,
    eight_bits: bool = False,
    peers: Peers | None = None,
) -> Weights:
    """The weights in the folder's `*.safetensors`, one file or many; `spare_rank` rows for each projection.

    `peers`: the ranks that share the matrices out, of which each reads its part. `require_tensors` must have passed.
    """
    names = _names_in(folder)
    weights = empty_weights(
        architecture,
        names.keys(),
        device=device,
        dtype=dtype,
        spare_rank=spare_rank,
        eight_bits=eight_bits,
        peers=peers,
    )
    places = weights.places()
    for file in sorted(set(names.values())):
        with safe_open(file, "pt", device=str(device)) as opened:
            for name in opened.keys():  # noqa: SIM118 - no mapping
                if name in places and (rows := weights.rows_of(places[name])):
                    values = opened.get_slice(name)[rows.start : rows.stop]
                    weights.fill(places[name], values.to(dtype), rows.start)
    if weights.shards is not None:
        for place in places.values():
            _share_scales(weights.shards, place)
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


def empty_weights(
    architecture: Architecture,
    names: Collection[str],
    *,
    device: torch.device,
    dtype: torch.dtype,
    spare_rank: int = 0,
    eight_bits: bool = False,
    peers: Peers | None = None,
) -> Weights:
    """Room for the weights, or for this rank's part of them; `names` are the tensors that the model has, by which
    biases and norms are known."""
    matrix_dtype = FP8 if eight_bits else dtype
    shapes = _layer_shapes(architecture, 0 if eight_bits else spare_rank)
    sizes = [math.prod(shape) * matrix_dtype.itemsize for shape in shapes.values()]
    words = (architecture.vocabulary, architecture.hidden)
    shards = None
    if peers is not None:
        shards = Shards(
            peers,
            layers=architecture.layers,
            layer=sizes,
            words=math.prod(words) * dtype.itemsize,
            tied=architecture.tied,
            device=device,
        )
    begins = dict(zip(shapes, accumulate(map(aligned, sizes), initial=0), strict=False))

    def room(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, device=device, dtype=dtype)

    def matrix(unit: int, shape: tuple[int, int], begin: int = 0, dtype: torch.dtype = dtype) -> torch.Tensor:
        if shards is not None:
            return shards.room(unit, begin, shape, dtype)
        return torch.zeros(shape, device=device, dtype=dtype)

    def linear(number: int, kind: str) -> Linear:
        widths = architecture.widths(kind)
        outputs = sum(widths.values())
        biased = any(f"model.layers.{number}.{MODULES[kind]}.{name}.bias" in names for name in widths)
        bias = room(outputs) if biased else None
        scales = torch.ones(outputs, 1, device=device) if eight_bits else None
        return Linear(matrix(number, shapes[kind], begins[kind], matrix_dtype), outputs, bias, scales)

    embedding = matrix(EMBEDDING, words)
    head = embedding if architecture.tied else matrix(HEAD, words)
    weights = Weights(architecture, embedding, head, room(architecture.hidden), shards=shards)
    for number in range(architecture.layers):
        normed = f"model.layers.{number}.self_attn.q_norm.weight" in names
        weights.layers.append(
            Layer(
                room(architecture.hidden),
                room(architecture.hidden),
                {kind: linear(number, kind) for kind in LINEARS},
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


def matrix_bytes(
    architecture: Architecture, *, ranks: int, dtype: torch.dtype, spare_rank: int = 0, eight_bits: bool = False
) -> int:
    """Return the memory that all matrices take on each of `ranks` that share them out."""
    size = 1 if eight_bits else dtype.itemsize
    layer = [math.prod(shape) * size for shape in _layer_shapes(architecture, 0 if eight_bits else spare_rank).values()]
    words, tables = architecture.vocabulary * architecture.hidden * dtype.itemsize, 1 if architecture.tied else 2
    if ranks == 1:
        return architecture.layers * sum(layer) + tables * words
    buffers = buffer_bytes(layer, words, ranks)
    return (architecture.layers * buffers[0] + tables * buffers[2]) // ranks + sum(buffers)


def _share_scales(shards: Shards, place: Place) -> None:
    """Let every rank have the scales of a matrix in 8 bits, each from the rank that has the row's begin."""
    if place.scales is None or place.unit is None:
        return
    own, width = shards.own(place.unit, place.tensor), place.tensor.shape[1]
    place.scales[: -(-own.start // width)] = 0
    place.scales[-(-own.stop // width) :] = 0
    shards.peers.sum(place.scales)


def _layer_shapes(architecture: Architecture, spare_rank: int) -> dict[str, tuple[int, int]]:
    """Return rows and columns of a layer's matrices, spare rows included."""
    widths = {kind: architecture.widths(kind) for kind in LINEARS}
    return {
        kind: (sum(own.values()) + spare_rank * len(own), architecture.inputs(kind)) for kind, own in widths.items()
    }

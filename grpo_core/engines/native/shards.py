"""The base's matrices shared out: each rank holds a part of every unit, and a whole unit only while it is used.

A unit is a layer's matrices, the embedding or the head. Owns the parts, the buffers that units are gathered into and
the order in which they come; `weights` has the places of matrices in a unit, and small tensors are whole on every rank.
Layers take turns in two buffers, so that the next one comes while one is used; embedding and head have a third.
Invariants: the units that are gathered depend only on the kinds of passes so far, and all ranks make the same ones; a
buffer is written only after everything that reads it was queued on the device.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch
from torch.autograd.graph import saved_tensors_hooks

EMBEDDING, HEAD = -1, -2
"""The units that are no layers; a layer is called by its number."""
ALIGNED: Final = 256
"""Bytes of which a matrix's position and a part's size are multiples: what kernels and NCCL like."""
_WORDS: Final = 2
"""The buffer of embedding and head."""


class Peers(Protocol):
    """The ranks that hold the other parts."""

    size: int
    number: int

    def gather(self, whole: torch.Tensor, part: torch.Tensor) -> Any:
        """Begin to put all ranks' parts into `whole`, in order, after what was queued before. Returns how to finish."""
        ...

    def finish(self, coming: Any) -> None:
        """Let everything queued from now on see the result."""
        ...

    def exchange(self, *values: int) -> list[list[int]]:
        """Return the values of every rank."""
        ...

    def sum(self, *tensors: torch.Tensor) -> None:
        """Sum each tensor over the ranks, in place."""
        ...


def aligned(size: int, to: int = ALIGNED) -> int:
    """Return the next multiple."""
    return -(-size // to) * to


def buffer_bytes(layer: Sequence[int], words: int, ranks: int) -> list[int]:
    """Return the sizes of the three buffers, by the bytes of a layer's matrices and of the embedding."""
    one = aligned(sum(map(aligned, layer)), ALIGNED * ranks)
    return [one, one, aligned(words, ALIGNED * ranks)]


@dataclass(frozen=True, slots=True)
class _Kept:
    """A tensor that autograd keeps for the backward pass and that is in a layer's unit."""

    layer: int
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class Shards:
    """One rank's parts, and the buffers."""

    def __init__(
        self, peers: Peers, *, layers: int, layer: Sequence[int], words: int, tied: bool, device: torch.device
    ) -> None:
        """`layer` are the bytes of a layer's matrices in their order, and `words` those of the embedding."""
        self.peers, self._layers, self._tied = peers, layers, tied
        sizes = buffer_bytes(layer, words, peers.size)
        self._buffers = [torch.zeros(size, dtype=torch.uint8, device=device) for size in sizes]
        units = [*range(layers), EMBEDDING, *([] if tied else [HEAD])]
        self._parts = {
            unit: torch.zeros(sizes[self._at(unit)] // peers.size, dtype=torch.uint8, device=device) for unit in units
        }
        self._of_storage = {buffer.untyped_storage().data_ptr(): at for at, buffer in enumerate(self._buffers)}
        self._held: list[int | None] = [None, None, None]
        self._coming: list[Any] = [None, None, None]
        self._ahead = 1

    @property
    def nbytes(self) -> int:
        """The memory that this rank needs for all of it."""
        return sum(tensor.nbytes for tensor in (*self._parts.values(), *self._buffers))

    def room(self, unit: int, begin: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return the view of a matrix that begins at a byte of its unit; it has values while the unit is held."""
        size = torch.Size(shape).numel() * dtype.itemsize
        return self._buffers[self._at(unit)][begin : begin + size].view(dtype).view(shape)

    def begin(self) -> None:
        """Have the embedding, with which a pass over all layers begins."""
        self._ahead = 1
        self._have(EMBEDDING, 0)

    def layer(self, number: int) -> None:
        """Have a layer, and let the next one come: the one before it after `end`, as in a backward pass."""
        following = number + self._ahead
        self._have(number, None if following < 0 else HEAD if following == self._layers else following)

    def end(self) -> None:
        """Have the head, after which layers come in reverse."""
        self._have(HEAD, None)
        self._ahead = -1

    def accompany(self, passes: int, *, back: bool = False, head: bool = True) -> None:
        """Give other ranks what they need for a number of passes in which this rank computes nothing."""
        for _ in range(passes):
            self.begin()
            for number in range(self._layers):
                self.layer(number)
            if head:
                self.end()
            if back:
                self.accompany_back()

    def accompany_back(self) -> None:
        """The same for the backward pass after a forward pass."""
        for number in reversed(range(self._layers)):
            self.layer(number)

    def most(self, *counts: int) -> list[int]:
        """Return the largest of each count over the ranks."""
        return [max(column) for column in zip(*self.peers.exchange(*counts), strict=True)]

    def forget(self) -> None:
        """Gather every unit anew: before and after a CUDA graph, whose replays change buffers unseen."""
        for at in range(len(self._buffers)):
            self._finish(at)
        self._held = [None, None, None]

    def covers(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is a view of a unit."""
        return self._buffer_of(tensor) is not None

    def own(self, unit: int, place: torch.Tensor) -> range:
        """Return the elements of a matrix that are in this rank's part, in the matrix's order."""
        size, begin = place.element_size(), place.storage_offset() * place.element_size()
        first = self.peers.number * len(self._parts[self._unit(unit)])
        last = first + len(self._parts[self._unit(unit)])
        low, high = (min(max(edge - begin, 0), place.nbytes) // size for edge in (first, last))
        return range(low, high)

    def write(self, unit: int, place: torch.Tensor, values: torch.Tensor, skipped: int = 0) -> None:
        """Write values that begin after `skipped` elements of a matrix, as far as they are in this rank's part."""
        own, at = self.own(unit, place), self._at(unit)
        self._finish(at)
        if self._held[at] == self._unit(unit):
            self._held[at] = None
        low, high = max(own.start, skipped), min(own.stop, skipped + values.numel())
        if low < high:
            raw = values.to(place.dtype).contiguous().view(-1)[low - skipped : high - skipped].view(torch.uint8)
            begin = self._offset(unit, place) + low * place.element_size()
            self._parts[self._unit(unit)][begin : begin + len(raw)] = raw

    def read(self, unit: int, place: torch.Tensor) -> torch.Tensor:
        """Return the bytes of a matrix that are in this rank's part."""
        own, begin = self.own(unit, place), self._offset(unit, place)
        size = place.element_size()
        return self._parts[self._unit(unit)][begin + own.start * size : begin + own.stop * size]

    @contextmanager
    def kept_apart(self) -> Generator[None]:
        """In this block autograd keeps no views of units, and the backward pass has them gathered again."""
        with saved_tensors_hooks(self._pack, self._unpack):
            yield

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | _Kept:
        at = self._buffer_of(tensor)
        if at is None or at == _WORDS:
            return tensor
        layer = self._held[at]
        assert layer is not None
        return _Kept(layer, tensor.dtype, tensor.size(), tensor.stride(), int(tensor.storage_offset()))

    def _unpack(self, kept: torch.Tensor | _Kept) -> torch.Tensor:
        if isinstance(kept, torch.Tensor):
            return kept
        self.layer(kept.layer)
        return self._buffers[self._at(kept.layer)].view(kept.dtype).as_strided(kept.size, kept.stride, kept.offset)

    def _have(self, unit: int, following: int | None) -> None:
        self._fetch(unit)
        self._finish(self._at(unit))
        if following is not None:
            self._fetch(following)

    def _fetch(self, unit: int) -> None:
        """Let a unit come, unless its buffer holds it."""
        unit, at = self._unit(unit), self._at(unit)
        if self._held[at] != unit:
            self._finish(at)
            self._held[at] = unit
            self._coming[at] = self.peers.gather(self._buffers[at], self._parts[unit])

    def _finish(self, at: int) -> None:
        coming, self._coming[at] = self._coming[at], None
        if coming is not None:
            self.peers.finish(coming)

    def _unit(self, unit: int) -> int:
        return EMBEDDING if unit == HEAD and self._tied else unit

    def _at(self, unit: int) -> int:
        return _WORDS if unit < 0 else unit % 2

    def _offset(self, unit: int, place: torch.Tensor) -> int:
        """Return where a matrix begins in this rank's part, in bytes; below 0 if before it."""
        begin = int(place.storage_offset()) * place.element_size()
        return begin - self.peers.number * len(self._parts[self._unit(unit)])

    def _buffer_of(self, tensor: torch.Tensor) -> int | None:
        return self._of_storage.get(tensor.untyped_storage().data_ptr())

"""A base that ranks share out: every byte that it computes is that of a whole base, whatever each rank has to do.

The ranks are threads here; `tests/integration/native/test_shards.py` has processes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.lazy import lazy
from tests.unit.native.families import ALPHA, FAMILIES, RANK, SIZES, make_twin
from tests.unit.native.test_decode import prompts
from tests.unit.native.test_packed import flat, ragged, weighted

torch = lazy("torch")
Adapter = lazy("grpo_core.engines.native.adapter", "Adapter")
read_architecture = lazy("grpo_core.engines.native.architecture", "read_architecture")
Decoder, Request = lazy("grpo_core.engines.native.decode", "Decoder Request")
lay_out = lazy("grpo_core.engines.native.layout", "lay_out")
Packed = lazy("grpo_core.engines.native.packed", "Packed")
Weights, load_weights = lazy("grpo_core.engines.native.weights", "Weights load_weights")

LAYERS = 5


class Meeting:
    """What threads that play ranks exchange. All must do the same, or the barrier breaks."""

    def __init__(self, size: int) -> None:
        self.size, self.barrier = size, threading.Barrier(size, timeout=60)
        self.told: list[Any] = [None] * size

    def swap(self, number: int, told: Any) -> list[Any]:
        self.told[number] = told
        self.barrier.wait()
        found = list(self.told)
        self.barrier.wait()
        return found


class Peer:
    """One rank of a meeting."""

    def __init__(self, meeting: Meeting, number: int) -> None:
        self.size, self.number, self._meeting = meeting.size, number, meeting
        self.gathered = 0

    def gather(self, whole: torch.Tensor, part: torch.Tensor) -> None:
        self.gathered += 1
        parts = self._meeting.swap(self.number, part)
        assert {one.shape for one in parts} == {part.shape}
        whole.copy_(torch.cat(parts))

    def finish(self, coming: None) -> None: ...

    def exchange(self, *values: int) -> list[list[int]]:
        return [list(theirs) for theirs in self._meeting.swap(self.number, values)]

    def sum(self, *tensors: torch.Tensor) -> None:
        for tensor in tensors:
            total = torch.stack(self._meeting.swap(self.number, tensor.clone())).sum(0)
            self._meeting.swap(self.number, None)
            tensor.copy_(total)


def on_ranks(count: int, what: Callable[[Peer], Any]) -> list[Any]:
    meeting = Meeting(count)

    def run(number: int) -> Any:
        try:
            return what(Peer(meeting, number))
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(count) as threads:
        futures = [threads.submit(run, number) for number in range(count)]
        failed = [future.exception() for future in futures if future.exception() is not None]
        for error in failed:
            if not isinstance(error, threading.BrokenBarrierError):
                raise error
        return [future.result() for future in futures]


class Model:
    """A base, whole or a rank's part, with an adapter, and what a rank of a job does with both."""

    def __init__(
        self, folder: Path, values: list[torch.Tensor], peer: Peer | None, *, eight_bits: bool = False
    ) -> None:
        architecture, cpu = read_architecture(folder), torch.device("cpu")
        self.weights = load_weights(
            architecture, folder, device=cpu, dtype=torch.float32, spare_rank=3, eight_bits=eight_bits, peers=peer
        )
        self.adapter = Adapter(architecture, rank=RANK, scale=ALPHA / RANK, targets=("q_proj", "down_proj"), device=cpu)
        for leaf, value in zip(self.adapter.leaves, values, strict=True):
            leaf.data.copy_(value)
        self.packed = Packed(self.weights)

    def draw(self, texts: list[list[int]], **options: Any) -> list[Any]:
        decoder = Decoder(self.weights, buckets=(2, 4), stops=(7, 9), **options)
        decoder.set_adapter(self.adapter)
        requests = [Request(text, seed) for seed, text in enumerate(texts)]
        return [(one.tokens, one.logprobs) for one in decoder.generate(requests, tokens=12)]

    def update(self, groups: list[Any], *, sparing: bool) -> list[torch.Tensor]:
        lengths, tokens, targets = flat(groups)
        with torch.no_grad():
            base = self.packed.logprobs(lay_out(lengths), tokens, targets, None)[0]
        told, entropy = self.packed.logprobs(lay_out(lengths), tokens, targets, self.adapter, 0.8, sparing=sparing)
        weighted(told).backward()
        gradients = [leaf.grad for leaf in self.adapter.leaves if leaf.grad is not None]
        for leaf in self.adapter.leaves:
            leaf.grad = None
        return [base, told.detach(), entropy, *gradients]


def values_for(layers: int, folder: Path) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    adapter = Adapter(
        read_architecture(folder), rank=RANK, scale=1.0, targets=("q_proj", "down_proj"), device=torch.device("cpu")
    )
    return [torch.randn(leaf.shape, generator=generator) * 0.05 for leaf in adapter.leaves[:layers]]


def assert_same(one: Any, other: Any) -> None:
    assert len(one) == len(other)
    for left, right in zip(one, other, strict=True):
        assert torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right


@pytest.mark.parametrize("family", FAMILIES)
def test_every_byte_is_that_of_a_whole_base(family: str, tmp_path: Path) -> None:
    """Rows of unequal number and length, drawn in turns; activations kept or not; a rank without any work."""
    make_twin(family, tmp_path, dtype=torch.float32, num_hidden_layers=LAYERS)
    values, groups, texts = values_for(LAYERS, tmp_path), ragged(SIZES["vocab_size"]), prompts()
    own_texts, own_groups = [texts, texts[1:2], []], [groups[:3], groups[3:], []]
    whole = Model(tmp_path, values, None)
    drawn = [whole.draw(own, cache_tokens=40) for own in own_texts]
    updated = [whole.update(own, sparing=False) if own else [] for own in own_groups]
    assert drawn[0] != drawn[1]

    def work(peer: Peer) -> tuple[list[Any], list[torch.Tensor]]:
        model = Model(tmp_path, values, peer)
        shards = model.weights.shards
        assert shards is not None
        found: list[torch.Tensor] = []
        for again in range(2):
            if own := own_groups[peer.number]:
                found = model.update(own, sparing=(peer.number + again) % 2 == 0)
            else:
                shards.accompany(1)
                shards.accompany(1, back=True)
        said = model.draw(own_texts[peer.number], cache_tokens=40)
        return said, found

    for number, (said, found) in enumerate(on_ranks(3, work)):
        assert_same(said, drawn[number])
        assert_same(found, updated[number])


def test_no_rank_holds_more_than_its_part_and_three_buffers(tmp_path: Path) -> None:
    make_twin("qwen2", tmp_path, dtype=torch.float32, num_hidden_layers=LAYERS, hidden_size=64, intermediate_size=128)
    whole = load_weights(read_architecture(tmp_path), tmp_path, device=torch.device("cpu"), dtype=torch.float32)
    layer = sum(linear.stored.nbytes for linear in whole.layers[0].linears.values())

    def held(peer: Peer) -> int:
        weights = load_weights(
            whole.architecture, tmp_path, device=torch.device("cpu"), dtype=torch.float32, peers=peer
        )
        return weights.nbytes

    for size in (2, 4):
        for found in on_ranks(size, held):
            small, padding = 20_000, 256 * size * (LAYERS + 5)
            most = whole.nbytes / size + 2 * layer + whole.embedding.nbytes + small + padding
            assert whole.nbytes / size < found < most


@pytest.mark.parametrize("size", [2, 3])
def test_8_bits_are_those_of_a_whole_base(size: int, tmp_path: Path) -> None:
    make_twin("llama-biased", tmp_path, dtype=torch.float32, num_hidden_layers=LAYERS)
    values, groups = values_for(LAYERS, tmp_path), ragged(SIZES["vocab_size"])
    whole = Model(tmp_path, values, None, eight_bits=True)
    drawn, updated = whole.draw(prompts()), whole.update(groups, sparing=False)

    def work(peer: Peer) -> tuple[list[Any], list[torch.Tensor]]:
        model = Model(tmp_path, values, peer, eight_bits=True)
        return model.draw(prompts()), model.update(groups, sparing=False)

    for said, found in on_ranks(size, work):
        assert_same(said, drawn)
        assert_same(found, updated)


def test_what_is_written_into_spare_rows_is_gathered(tmp_path: Path) -> None:
    """As the kernels' copy of an adapter is, which lies below the weights it belongs to."""
    make_twin("qwen2", tmp_path, dtype=torch.float32, num_hidden_layers=LAYERS)
    values = values_for(LAYERS, tmp_path)
    inner = torch.arange(3.0 * SIZES["hidden_size"]).view(3, -1)

    def work(peer: Peer) -> None:
        weights = Model(tmp_path, values, peer).weights
        before = weights.layer(2).linears["qkv"].weight.clone()
        for kind, row in (("qkv", 3), ("o", 0)):
            linear = weights.layers[2].linears[kind]
            weights.write(2, linear.stored[linear.outputs + row :][:3], inner[:, : linear.stored.shape[1]])
        layer = weights.layer(2)
        assert torch.equal(layer.linears["qkv"].weight, before)
        for kind, row in (("qkv", 3), ("o", 0)):
            linear = layer.linears[kind]
            assert torch.equal(linear.stored[linear.outputs + row :][:3], inner)

    on_ranks(2, work)


def test_layers_come_ahead_in_the_order_of_their_use(tmp_path: Path) -> None:
    """A forward pass gathers each unit once; the backward pass all layers but the two that are there."""
    make_twin("qwen2", tmp_path, dtype=torch.float32, num_hidden_layers=LAYERS)
    values, groups = values_for(LAYERS, tmp_path), ragged(SIZES["vocab_size"])

    def work(peer: Peer) -> None:
        model = Model(tmp_path, values, peer)
        lengths, tokens, targets = flat(groups)
        told = model.packed.logprobs(lay_out(lengths), tokens, targets, model.adapter)[0]
        assert peer.gathered == LAYERS + 2
        weighted(told).backward()
        assert peer.gathered == LAYERS + 2 + LAYERS - 2

    on_ranks(2, work)

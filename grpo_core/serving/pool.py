"""Keys and values of all rows in one tensor, and a step of all rows as one CUDA graph.

Owns which tokens of the pool belong to which row, and the graphs: one for each number of rows, captured when it is
first needed. Attention is the decoder's kernel, or the same in plain torch where there is no GPU.
Invariants: two rows never share a token of the pool; the rows that fill a graph up write to the spare token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch.nn import functional

from grpo_core.engines.native.decode import COUNT, OWN_AT, TOKEN
from grpo_core.engines.native.model import hidden
from grpo_core.engines.native.weights import Weights
from grpo_core.serving.stack import Stack

ADAPTER: Final = 7
"""The column of a row's state that has the number of its adapter; the decoder leaves it empty."""
BUCKETS: Final = (1, 4, 16, 32, 64, 128)
"""Numbers of rows for which a graph is captured."""
POOL_TOKENS: Final = 2**18
"""Largest number of tokens in the pool."""
FREE_SHARE: Final = 0.6
"""Share of the free memory that the pool may take; the rest is for prompts and graphs."""
HEADS: Final = (32, 64, 128, 256)
"""Head sizes that the attention kernel knows."""


def can_pool(weights: Weights) -> bool:
    """Whether the attention kernel knows these weights."""
    is_half = weights.dtype in (torch.bfloat16, torch.float16)
    return weights.device.type == "cuda" and is_half and weights.architecture.head in HEADS


class Pool:
    """Room for tokens: layers × tokens × 2 × key heads × head size. One more token is nobody's."""

    def __init__(self, weights: Weights, tokens: int) -> None:
        a = weights.architecture
        self.tokens = tokens
        shape = (a.layers, tokens + 1, 2, a.kv_heads, a.head)
        self.values = torch.zeros(shape, dtype=weights.dtype, device=weights.device)
        self._taken: dict[int, int] = {}
        """The ends of the stretches in use, by their beginnings, in order."""

    @classmethod
    def for_memory(cls, weights: Weights, context: int) -> Pool:
        """A pool that fits into the GPU's free memory, with room for one conversation at least."""
        a = weights.architecture
        each = a.layers * 2 * a.kv_heads * a.head * weights.dtype.itemsize
        free, _ = torch.cuda.mem_get_info(weights.device)
        return cls(weights, max(context, min(POOL_TOKENS, int(FREE_SHARE * free) // each)))

    def take(self, tokens: int) -> int | None:
        """Reserve a stretch. Returns its beginning, or None if no gap is long enough."""
        begin = 0
        for taken, end in self._taken.items():
            if taken - begin >= tokens:
                break
            begin = end
        if begin + tokens > self.tokens:
            return None
        self._taken = dict(sorted([*self._taken.items(), (begin, begin + tokens)]))
        return begin

    def give(self, begin: int) -> None:
        """Free the stretch that begins there."""
        del self._taken[begin]


class GraphStep:
    """The step of rows in a pool. `angles` are those of all positions."""

    def __init__(self, weights: Weights, stack: Stack, angles: tuple[torch.Tensor, ...], pool: Pool, rows: int) -> None:
        self._weights, self._stack, self._angles, self._pool = weights, stack, angles, pool
        self._state = torch.zeros(rows, 8, dtype=torch.long, device=weights.device)
        """As the decoder's, without a prompt apart: key `j` of a row is at `OWN_AT + j`."""
        self._steps: dict[int, Callable[[], torch.Tensor]] = {}
        self._graph_memory = torch.cuda.graph_pool_handle() if weights.device.type == "cuda" else None

    def __call__(self, rows: Sequence[tuple[int, int, int, int]]) -> torch.Tensor:
        """Return the logits (rows × vocabulary) after each row's token, given as adapter's number, token, beginning and
        length; they are overwritten by the next step."""
        size = next(size for size in BUCKETS if size >= len(rows))
        state = torch.zeros(size, 8, dtype=torch.long)
        state[:, OWN_AT] = self._pool.tokens
        state[: len(rows), [ADAPTER, TOKEN, OWN_AT, COUNT]] = torch.tensor(rows)
        self._state[:size] = state.to(self._state.device)
        if size not in self._steps:
            self._steps[size] = self._prepare(size)
        return self._steps[size]()[: len(rows)]

    def _prepare(self, size: int) -> Callable[[], torch.Tensor]:
        if self._weights.device.type == "cpu":
            return lambda: self._compute(size)
        # Run before it is captured, so that kernels are compiled; this writes what the graph will write again.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self._compute(size)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._graph_memory):
            logits = self._compute(size)

        def replay() -> torch.Tensor:
            graph.replay()
            return logits

        return replay

    def _compute(self, size: int) -> torch.Tensor:
        weights, state = self._weights, self._state[:size]
        places = state[:, COUNT]
        attention = self._attention()

        def attend(number: int, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
            keys = self._pool.values[number]
            keys.index_copy_(0, state[:, OWN_AT] + places, kv)
            return attention(q.flatten(1).contiguous(), keys, state)

        angles = tuple(half[places] for half in self._angles)
        halves = self._stack.halves(state[:, ADAPTER])
        x = hidden(weights, weights.embedding[state[:, TOKEN]], angles, self._stack.pairs, attend, halves)
        return functional.linear(x, weights.head)

    def _attention(self) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
        if self._weights.device.type == "cpu":
            return self._plain_attention
        from grpo_core.engines.native.fused import attend

        a, longest = self._weights.architecture, self._angles[0].shape[0]
        return lambda q, keys, state: attend(a, q, keys, state, longest)

    def _plain_attention(self, q: torch.Tensor, keys: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """The kernel's twin: one query a row, `q` (rows × (heads · head size)), over the row's keys in the pool."""
        a = self._weights.architecture
        at = torch.arange(int(state[:, COUNT].max()) + 1)
        k, v = keys[(state[:, OWN_AT, None] + at).clamp_max(self._pool.tokens)].permute(2, 0, 3, 1, 4)
        mask = (at <= state[:, COUNT, None])[:, None, None]
        queries, grouped = q.unflatten(1, (a.heads, 1, a.head)), a.heads != a.kv_heads
        return functional.scaled_dot_product_attention(queries, k, v, mask, enable_gqa=grouped).flatten(1)

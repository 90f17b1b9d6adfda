"""The `native` engine's model for serving: one matrix product for all rows, whatever their adapters (`stack`).

Owns the caches. On a GPU they share one pool, and a step of all rows is one CUDA graph (`pool`); on a CPU each row has
its own tensors and its attention is computed alone, with the arithmetic of the engine's decoder: there a greedy answer
is the one that an evaluation of the same checkpoint gave. Invariant: a cache belongs to one row and has room for all of
its tokens from the start.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Final

import torch
from safetensors import safe_open
from torch.nn import functional

from grpo_core.adapters import LocalAdapter
from grpo_core.engines.native.adapter import Adapter, Pairs
from grpo_core.engines.native.architecture import Architecture, rotary_angles
from grpo_core.engines.native.layout import Group, lay_out
from grpo_core.engines.native.model import Attend, hidden
from grpo_core.engines.native.packed import attention_for
from grpo_core.engines.native.weights import Weights
from grpo_core.errors import JobFailure
from grpo_core.reasons import FailureCode
from grpo_core.serving.pool import GraphStep, Pool, can_pool
from grpo_core.serving.stack import Stack
from grpo_core.serving.wire import CPU_ROWS, GPU_ROWS
from grpo_core.spec import JobSpec

MAX_CONTEXT: Final = 8192
"""Longest conversation, for the memory of its keys and values."""
PROMPT_TOKENS: Final = 4096
"""Tokens of prompts that a GPU reads between two steps."""


@dataclass(slots=True, eq=False)
class RowCache:
    """Keys and values of one row: layers × tokens × 2 × key heads × head size."""

    values: torch.Tensor
    begin: int = 0
    """The place of its first token in the pool, if there is one."""
    length: int = 0


class NativeModel:
    """A dense Llama-like model with its adapters."""

    name = "native"

    def __init__(
        self, spec: JobSpec, weights: Weights, adapters: Sequence[LocalAdapter], tokenizer: Any, stops: Sequence[int]
    ) -> None:
        self.tokenizer, self.stops, self._weights = tokenizer, frozenset(stops), weights
        a = weights.architecture
        longest: int = getattr(a.config, "max_position_embeddings", MAX_CONTEXT)
        self.context = min(MAX_CONTEXT, longest, a.window or MAX_CONTEXT)
        self._stack = Stack(weights, {adapter.name: _pairs_of(adapter, spec, weights) for adapter in adapters})
        positions = torch.arange(self.context, device=weights.device)
        self._angles = rotary_angles(a, positions, weights.dtype)
        self._attention = attention_for(weights.device, weights.dtype, a.heads // a.kv_heads)
        self.rows, self.prompt_tokens = CPU_ROWS, 0
        self.cache_tokens: int | None = None
        self._pool: Pool | None = None
        if can_pool(weights):
            self._use(Pool.for_memory(weights, self.context))

    def _use(self, pool: Pool) -> None:
        self._pool, self.cache_tokens = pool, pool.tokens
        self.rows, self.prompt_tokens = GPU_ROWS, PROMPT_TOKENS
        self._graphs = GraphStep(self._weights, self._stack, self._angles, pool, self.rows)

    def reserve(self, tokens: int) -> RowCache | None:
        """Return an empty cache, or None."""
        if self._pool is None:
            a, weights = self._weights.architecture, self._weights
            shape = (a.layers, tokens, 2, a.kv_heads, a.head)
            return RowCache(torch.empty(shape, dtype=weights.dtype, device=weights.device))
        begin = self._pool.take(tokens)
        return None if begin is None else RowCache(self._pool.values[:, begin : begin + tokens], begin)

    def release(self, cache: RowCache) -> None:
        """Give a cache's room back."""
        if self._pool is not None:
            self._pool.give(cache.begin)

    @torch.no_grad()
    def prefill(self, prompts: Sequence[tuple[str, Sequence[int], RowCache]]) -> torch.Tensor:
        """Read each prompt."""
        weights = self._weights
        layout = lay_out([Group(len(ids), ()) for _, ids, _ in prompts]).to(weights.device)
        ends = list(accumulate(len(ids) for _, ids, _ in prompts))

        def attend(number: int, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
            for end, (_, ids, cache) in zip(ends, prompts, strict=True):
                cache.values[number, : len(ids)] = kv[end - len(ids) : end]
            k, v = kv.unbind(1)
            return self._attention(q, k, v, layout).flatten(1)

        number = self._stack.number
        given = [(token, place, number(name)) for name, ids, _ in prompts for place, token in enumerate(ids)]
        x = self._hidden(torch.tensor(given, device=weights.device), attend)
        for _, ids, cache in prompts:
            cache.length = len(ids)
        return functional.linear(x[[end - 1 for end in ends]], weights.head)

    def _hidden(self, given: torch.Tensor, attend: Attend) -> torch.Tensor:
        """The normed output of the last layer for each token, given as token, position and adapter's number."""
        weights = self._weights
        tokens, places, numbers = given.unbind(1)
        angles = tuple(half[places] for half in self._angles)
        return hidden(
            weights, weights.embedding[tokens], angles, self._stack.pairs, attend, self._stack.halves(numbers)
        )

    def copy(self, cache: RowCache, into: RowCache) -> None:
        """Copy a cache."""
        into.values[:, : cache.length] = cache.values[:, : cache.length]
        into.length = cache.length

    @torch.no_grad()
    def step(self, rows: Sequence[tuple[str, int, RowCache]]) -> torch.Tensor:
        """Add a token to each row."""
        if self._pool is None:
            logits = self._step(rows)
        else:
            number = self._stack.number
            logits = self._graphs([(number(name), token, cache.begin, cache.length) for name, token, cache in rows])
        for _, _, cache in rows:
            cache.length += 1
        return logits

    def _step(self, rows: Sequence[tuple[str, int, RowCache]]) -> torch.Tensor:
        weights, a = self._weights, self._weights.architecture
        caches = [cache for _, _, cache in rows]

        def attend(number: int, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
            return torch.cat([_attend_row(cache, number, q[at], kv[at], a) for at, cache in enumerate(caches)])

        given = [(token, cache.length, self._stack.number(name)) for name, token, cache in rows]
        return functional.linear(self._hidden(torch.tensor(given, device=weights.device), attend), weights.head)


def _attend_row(cache: RowCache, number: int, q: torch.Tensor, kv: torch.Tensor, a: Architecture) -> torch.Tensor:
    """Attention of a row's newest token: `q` is heads × head size. Returns 1 × (heads · head size)."""
    cache.values[number, cache.length] = kv
    k, v = cache.values[number, : cache.length + 1].permute(1, 2, 0, 3)
    grouped = a.heads != a.kv_heads
    out = functional.scaled_dot_product_attention(q[None, :, None], k[None], v[None], enable_gqa=grouped)
    return out.flatten()[None]


def _pairs_of(adapter: LocalAdapter, spec: JobSpec, weights: Weights) -> list[Pairs]:
    """The matrices of a stored adapter. Raises a `user_config` failure if it is not one of this job's."""
    made = Adapter(
        weights.architecture,
        rank=spec.lora.rank,
        scale=spec.lora.alpha / spec.lora.rank,
        targets=spec.lora.target_modules,
        device=weights.device,
    )
    layers = range(weights.architecture.layers)
    wanted = {name: view for layer in layers for name, view in made.named(layer).items()}
    try:
        with safe_open(adapter.weights, "pt", device=str(weights.device)) as stored:
            if set(stored.keys()) != wanted.keys():
                raise unfit(adapter)
            for name, view in wanted.items():
                tensor: torch.Tensor = stored.get_tensor(name)
                if tensor.shape != view.shape:
                    raise unfit(adapter)
                view.copy_(tensor)
    except (OSError, ValueError) as error:
        raise unfit(adapter) from error
    with torch.no_grad():
        return [made.pairs(layer, weights.dtype) for layer in layers]


def unfit(adapter: LocalAdapter) -> JobFailure:
    """The failure of an adapter that does not fit the model or the settings of its job."""
    return JobFailure(
        FailureCode.ADAPTER_UNREADABLE,
        f"The adapter {adapter.name} does not have the matrices of this model and these settings.",
        hint="Serve another step of the job.",
    )

"""Generates completions one token at a time, each with its own seed.

Owns the key-value cache and the state of the rows, both on the device. A step computes the next token of each row in
one CUDA graph, which is captured for a number of rows; rows that end are removed, and fewer rows use a smaller graph. A
CPU runs the same step without a graph. Where ranks share out the weights, all of them make the same number of passes,
with rows or without. Invariant: a prompt's keys are computed and stored once for all its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.nn import functional

from grpo_core.engines.completions import Drawn, Request
from grpo_core.engines.native.adapter import Adapter, Pairs
from grpo_core.engines.native.architecture import rotary_angles
from grpo_core.engines.native.layout import Group, lay_out, parts_within
from grpo_core.engines.native.model import NO_PAIRS, hidden, wide
from grpo_core.engines.native.packed import attention_for
from grpo_core.engines.native.sampling import Filters, draw
from grpo_core.engines.native.weights import Weights

if TYPE_CHECKING:
    from grpo_core.engines.native.fused import FusedStep

BUCKETS: Final = (8, 16, 32, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)
"""Numbers of rows for which a graph is captured. Further rows wait until others end."""
POLL: Final = 8
"""Number of tokens between two checks of which rows have ended; each check waits for the device."""
PREFILL_TOKENS: Final = 16384
MAX_STOPS: Final = 8

TOKEN, COUNT, LIMIT, PROMPT_AT, PROMPT, OWN_AT, SEED = range(7)
"""Columns of a row's state: its next input token, the numbers of generated and allowed tokens, position and number of
its prompt's keys in the cache, position of the row's keys, and its seed. Key `j` is at `PROMPT_AT + j`, and for `j >=
PROMPT` at `OWN_AT + j - PROMPT`."""


class Decoder:
    """Generates completions with a model's weights and the adapter that was set last."""

    def __init__(
        self,
        weights: Weights,
        *,
        stops: Sequence[int] = (),
        filters: Filters | None = None,
        penalises: bool = False,
        buckets: Sequence[int] = BUCKETS,
        cache_tokens: int | None = None,
        fused: bool | None = None,
        rank: int = 1,
    ) -> None:
        """Prepare a decoder.

        `penalises`: whether a repetition penalty may be used. `cache_tokens`: the largest size of the cache; rows that
        do not fit are generated in turns. `fused`: whether to use the Triton kernels; None: if possible. `rank`: the
        rank of the largest adapter.
        """
        if len(stops) > MAX_STOPS:
            raise ValueError(f"there are {len(stops)} stop tokens; at most {MAX_STOPS} are supported")
        self._weights, self._filters, self._buckets = weights, filters or Filters(), sorted(buckets)
        self._penalises, self._cache_tokens = penalises, cache_tokens
        self._pairs: list[Pairs] = [NO_PAIRS for _ in weights.layers]
        self._room = (0, 0, 0)
        self._graphs: dict[int, Any] = {}
        device = weights.device
        self._stops = torch.tensor([*stops, *[-1] * (MAX_STOPS - len(stops))], device=device)
        self._knobs = wide(torch.ones(3, dtype=weights.dtype, device=device))
        self._fused = self._fused_step(fused, rank)

    def set_adapter(self, adapter: Adapter | None) -> None:
        """Generate with the adapter's present values from now on; None: with the base model."""
        with torch.no_grad():
            now = [
                NO_PAIRS if adapter is None else adapter.pairs(number, self._weights.dtype)
                for number in range(len(self._weights.layers))
            ]
            if self._fused is not None:
                self._fused.set_adapter(adapter)
                self._pairs = now
            else:
                self._take(now)

    def _take(self, now: list[Pairs]) -> None:
        """Copy the values, to the same addresses if graphs hold these."""
        pairs = [(old[kind], new[kind]) for old, new in zip(self._pairs, now, strict=True) for kind in new]
        if self._graphs and all((one[0] is None) == (other[0] is None) for one, other in pairs):
            for old, new in pairs:
                for kept, value in zip(old[:2], new[:2], strict=True):
                    if kept is not None and value is not None:
                        kept.copy_(value)
        else:
            self._graphs, self._pairs = {}, now

    @torch.no_grad()
    def generate(
        self, requests: Sequence[Request], *, tokens: int, temperature: float = 1.0, penalty: float = 1.0
    ) -> list[Drawn]:
        """Return a completion of at most `tokens` tokens for each request, in order. Temperature 0 is greedy."""
        knobs = [1 / temperature, 1.0, penalty] if temperature else [1.0, 0.0, penalty]
        self._knobs.copy_(torch.tensor(knobs, dtype=torch.float64))
        drawn: list[Drawn] = []
        turns = list(self._turns(requests, tokens))
        for turn in [*turns, *[range(0)] * (self._most(len(turns))[0] - len(turns))]:
            drawn += self._draw([requests[at] for at in turn], tokens)
        return drawn

    def reserve(self, prompt_tokens: int, rows: int, tokens: int) -> None:
        """Allocate the cache for a rollout. If it grows, graphs are dropped, because they hold addresses."""
        need = self._most(prompt_tokens, rows + 1, tokens + 1)  # graphs are captured by all ranks or none
        if all(a <= b for a, b in zip(need, self._room, strict=True)):
            return
        self._graphs = {}
        self._room = tuple(map(max, need, self._room))  # pyright: ignore[reportAttributeAccessIssue]
        prompts, places, width = self._room
        weights, device = self._weights, self._weights.device
        a = weights.architecture
        shape = (a.layers, prompts + places * width, 2, a.kv_heads, a.head)
        self._cache = torch.empty(0)  # releases the old one first
        self._cache = torch.zeros(shape, dtype=weights.dtype, device=device)
        self._state = torch.zeros(places, 8, dtype=torch.long, device=device)
        # The last row fills graphs up to their number of rows; it never starts or ends.
        self._state[-1, OWN_AT] = prompts + (places - 1) * width
        self._active = torch.full((self._buckets[-1],), places - 1, device=device)
        self._tokens = torch.zeros(places, width, dtype=torch.long, device=device)
        self._logprobs = wide(torch.zeros(places, width, dtype=weights.dtype, device=device))
        self._seen = torch.zeros(places if self._penalises else 0, a.vocabulary, dtype=torch.bool, device=device)
        self._angles = rotary_angles(a, torch.arange(prompts + width, device=device), weights.dtype)
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def _turns(self, requests: Sequence[Request], tokens: int) -> Iterator[range]:
        """Yield ranges of requests whose keys fit into the cache together."""
        start, needed = 0, 0
        for at, request in enumerate(requests):
            more = len(request.prompt) + tokens + 1
            if self._cache_tokens is not None and at > start and needed + more > self._cache_tokens:
                yield range(start, at)
                start, needed = at, 0
            needed += more
        if requests:
            yield range(start, len(requests))

    def _draw(self, requests: Sequence[Request], tokens: int) -> list[Drawn]:
        prompts = list(dict.fromkeys(tuple(request.prompt) for request in requests))
        self.reserve(sum(map(len, prompts)), len(requests), tokens)
        begins = dict(zip(prompts, self._prefill(prompts), strict=True))
        base, width = self._room[0], self._room[2]
        rows = [
            [prompt[-1], 0, tokens, begins[prompt], len(prompt) - 1, base + row * width, request.seed, 0]
            for row, request in enumerate(requests)
            for prompt in [tuple(request.prompt)]
        ]
        self._state[: len(rows)] = torch.tensor(rows, dtype=torch.long, device=self._state.device).view(-1, 8)
        if self._penalises:
            self._seen.zero_()
            for row, request in enumerate(requests):
                self._seen[row, torch.tensor(request.prompt, device=self._seen.device)] = True
        self._run(len(rows), tokens)
        counts = self._state[: len(rows), COUNT].tolist()
        said, told = self._tokens[: len(rows)].tolist(), self._logprobs[: len(rows)].tolist()
        return [Drawn(s[:count], t[:count]) for s, t, count in zip(said, told, counts, strict=True)]

    def _run(self, rows: int, tokens: int) -> None:
        """Run steps until every row has ended."""
        waiting, active, before = list(range(rows)), list[int](), list[int]()
        left, spare = [tokens] * rows, self._state.shape[0] - 1
        while active or waiting or self._weights.shards is not None:
            free = self._buckets[-1] - len(active)
            active, waiting = active + waiting[:free], waiting[free:]
            if active != before:
                self._active.copy_(torch.tensor(active + [spare] * (len(self._active) - len(active))))
                before = list(active)
            bucket = next(size for size in self._buckets if size >= len(active))
            steps = min(POLL, max((left[row] for row in active), default=0))
            steps, buckets = self._in_step(steps, bucket)
            if not steps:
                break
            step = [self._step_of(size) for size in buckets][buckets.index(bucket)]
            for _ in range(steps):
                step()
            left = (self._state[:rows, LIMIT] - self._state[:rows, COUNT]).tolist()  # the only wait for the device
            active = [row for row in active if left[row]]
        if self._weights.shards is not None:
            self._weights.shards.forget()

    def _in_step(self, steps: int, bucket: int) -> tuple[int, list[int]]:
        """Return the number of steps that all ranks run now, and the buckets of all, whose graphs all ranks capture."""
        if self._weights.shards is None:
            return steps, [bucket]
        told = self._weights.shards.peers.exchange(steps, bucket)
        return max(most for most, _ in told), sorted({size for _, size in told})

    def _most(self, *counts: int) -> tuple[int, ...]:
        """Return the largest of each count over the ranks that share out the weights."""
        return counts if self._weights.shards is None else tuple(self._weights.shards.most(*counts))

    def _prefill(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        """Compute the keys of each prompt except its last token, which is a row's first input.

        Returns the position of each prompt's keys.
        """
        begins: list[int] = []
        at = 0
        for prompt in prompts:
            begins.append(at)
            at += len(prompt) - 1
        some = [(begin, prompt[:-1]) for begin, prompt in zip(begins, prompts, strict=True) if len(prompt) > 1]
        groups = [Group(len(prompt), ()) for _, prompt in some]
        parts = parts_within(groups, PREFILL_TOKENS) if some else []
        self._weights.keep_step(len(parts), head=False)
        for part in parts:
            self._prefill_part([some[at][1] for at in part], some[part.start][0])
        return begins

    def _prefill_part(self, prompts: Sequence[Sequence[int]], begin: int) -> None:
        weights, a = self._weights, self._weights.architecture
        layout = lay_out([Group(len(prompt), ()) for prompt in prompts]).to(weights.device)
        ids = torch.tensor([token for prompt in prompts for token in prompt], device=weights.device)
        kernel = attention_for(weights.device, weights.dtype, a.heads // a.kv_heads)

        def attend(number: int, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
            self._cache[number, begin : begin + len(ids)] = kv
            k, v = kv.unbind(1)
            return kernel(q, k, v, layout).flatten(1)

        angles = rotary_angles(a, layout.positions, weights.dtype)
        hidden(weights, weights.begin()[ids], angles, self._pairs.__getitem__, attend)

    def _step(self, bucket: int) -> None:
        active = self._active[:bucket]
        state = self._state.index_select(0, active)
        seen = self._seen.index_select(0, active) if self._penalises else None
        if self._fused is not None:
            logits, squares = self._fused.logits(state, self._cache, self._angles)
            if not self._filters.on and seen is None:
                tokens, logprobs = self._fused.draw(logits, squares, state, self._knobs)
            else:
                scores = self._fused.normed(logits, squares)
                tokens, logprobs = draw(scores, state[:, SEED], state[:, COUNT], self._knobs, self._filters, seen)
        else:
            tokens, logprobs = draw(
                self._logits(state), state[:, SEED], state[:, COUNT], self._knobs, self._filters, seen
            )
        counts, limits = state[:, COUNT], state[:, LIMIT]
        # A row that has ended writes behind its end.
        self._tokens.index_put_((active, counts), tokens)
        self._logprobs.index_put_((active, counts), logprobs)
        if self._penalises:
            self._seen.index_put_((active, tokens), torch.ones_like(tokens, dtype=torch.bool))
        stopped = (tokens[:, None] == self._stops).any(1)
        limits = torch.where(stopped, torch.minimum(limits, counts + 1), limits)
        self._state[:, :3].index_copy_(0, active, torch.stack([tokens, torch.minimum(counts + 1, limits), limits], 1))

    def _logits(self, state: torch.Tensor) -> torch.Tensor:
        weights, a = self._weights, self._weights.architecture
        places = state[:, PROMPT] + state[:, COUNT]
        longest = self._angles[0].shape[0]
        if weights.device.type == "cpu":
            longest = int(places.max()) + 1  # not possible inside a graph
        keys = torch.arange(longest, device=weights.device)
        own = state[:, OWN_AT, None] - state[:, PROMPT, None] + keys
        rows = torch.where(keys < state[:, PROMPT, None], state[:, PROMPT_AT, None] + keys, own)
        rows = rows.clamp_max(self._cache.shape[1] - 1)
        mask = (keys <= places[:, None])[:, None, None]

        def attend(number: int, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
            self._cache[number].index_copy_(0, state[:, OWN_AT] + state[:, COUNT], kv)
            k, v = self._cache[number][rows].permute(2, 0, 3, 1, 4)
            grouped = a.heads != a.kv_heads
            return functional.scaled_dot_product_attention(q[:, :, None], k, v, mask, enable_gqa=grouped).flatten(1)

        angles = tuple(half[places] for half in self._angles)
        x = hidden(weights, weights.begin()[state[:, TOKEN]], angles, self._pairs.__getitem__, attend)
        return functional.linear(x, weights.end())

    def _step_of(self, bucket: int) -> Callable[[], None]:
        if self._weights.device.type == "cpu":
            return lambda: self._step(bucket)
        if bucket not in self._graphs:
            self._graphs[bucket] = self._capture(bucket)
        return self._graphs[bucket].replay

    def _capture(self, bucket: int) -> Any:
        shards = self._weights.shards
        if shards is not None:
            shards.forget()
        kept = self._active.clone()
        self._active.fill_(self._state.shape[0] - 1)  # the warm-up uses the spare row
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._step(bucket)
            self._step(bucket)
        torch.cuda.current_stream().wait_stream(side)
        if shards is not None:
            shards.forget()  # the graph gathers all that it uses
        graph = torch.cuda.CUDAGraph()
        # Of this thread only: NCCL has others, which ask how far earlier work is.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local" if shards else "global"):
            self._step(bucket)
        if shards is not None:
            shards.forget()
        self._active.copy_(kept)
        return graph

    def _fused_step(self, wanted: bool | None, rank: int) -> FusedStep | None:
        if wanted is False or self._weights.device.type == "cpu":
            return None
        from grpo_core.engines.native.fused import FusedStep, can_fuse

        if can_fuse(self._weights):
            return FusedStep(self._weights, rank)
        if wanted:
            raise ValueError("the kernels do not support these weights")
        return None

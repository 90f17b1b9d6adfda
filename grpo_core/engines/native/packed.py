"""Runs the model over a packed stream of tokens, for training, scoring and evaluation.

Owns the gathering of keys, attention over segments of any length, and the log-probabilities of the completions. On a
GPU, attention is torch's varlen kernel with a deterministic backward pass; on a CPU, it is plain torch. Invariant: no
tensor with the size of the vocabulary is kept for the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final, NamedTuple

import torch
from torch.nn import functional

from grpo_core.engines.native.adapter import Adapter, Pairs
from grpo_core.engines.native.architecture import rotary_angles
from grpo_core.engines.native.layout import Copies, Layout
from grpo_core.engines.native.model import NO_PAIRS, Halves, halves_of, hidden, wide
from grpo_core.engines.native.weights import Weights

HEAD_LOGITS: Final = 2**28
"""Largest number of logits in memory: 1 GB in 32 bits."""
PADDED: Final = 2**20
"""Largest number of pairs of query and key in one call of the plain attention: fewer calls save more time than the
padding takes."""


@dataclass
class Packed:
    """Computes log-probabilities for a layout and its tokens."""

    weights: Weights
    compiled: bool = False
    """Whether a layer's halves are compiled with `torch.compile`, which takes a while and is faster on a GPU."""
    _halves: Halves | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.compiled:
            before, after = halves_of(self.weights.architecture)
            self._halves = _compiled(before, 3), _compiled(after, 2)

    def logprobs(
        self,
        layout: Layout,
        tokens: torch.Tensor,
        targets: torch.Tensor,
        adapter: Adapter | None,
        temperature: float = 1.0,
        *,
        sparing: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return log-probability and entropy of each completion token, in the layout's order; the latter has no
        gradient.

        `tokens` are those of the stream (N), and `targets` those of the completions (M); both results have M values.
        Without an adapter, the base model is used. `sparing`: keep only each layer's input for the backward pass.
        """
        with torch.autocast(self.weights.device.type, enabled=False):
            with self.weights.keeping():
                states = self._hidden(layout, tokens, adapter, sparing=sparing)
            return Head.apply(Gathered.apply(states, layout.predictors), self.weights.end(), targets, temperature)

    def _hidden(self, layout: Layout, tokens: torch.Tensor, adapter: Adapter | None, *, sparing: bool) -> torch.Tensor:
        weights, learning = self.weights, torch.is_grad_enabled()
        a = weights.architecture
        kernel = attention_for(weights.device, weights.dtype, a.heads // a.kv_heads)
        x = weights.begin()[tokens]
        if adapter is not None and learning:
            x.requires_grad_()  # so that the first layer is compiled like all others

        def attend(_: int, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
            k, v = Gathered.apply(kv, layout.keys).unbind(1)
            return kernel(q, k, v, layout).flatten(1)

        def pairs(layer: int) -> Pairs:
            return NO_PAIRS if adapter is None else adapter.pairs(layer, weights.dtype)

        angles = rotary_angles(a, layout.positions, weights.dtype)
        return hidden(
            weights, x, angles, pairs, attend, self._halves if learning else None, sparing=sparing and learning
        )


def _compiled(half: Callable[..., Any], dynamic: int) -> Callable[..., Any]:
    """Compile a half of a layer once for all numbers of tokens, the first dimension of its first `dynamic` arguments.

    Kernels are chosen by rules and not by timing, so that another process computes the same.
    """
    fast = torch.compile(half, options={"deterministic": True})

    def run(*tensors: Any) -> Any:
        for tensor in tensors[:dynamic]:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
        return fast(*tensors)

    return run


class Gathered(torch.autograd.Function):
    """Gathers rows with copies. A row's gradient is the sum over its copies, in 32 bits and in a fixed order."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, copies: Copies) -> torch.Tensor:
        ctx.copies, ctx.rows = copies, x.shape[0]
        return x.index_select(0, copies.rows)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (g,), copies = gradients, ctx.copies
        out = g.new_zeros(ctx.rows, *g.shape[1:])
        out.index_copy_(0, copies.rows.index_select(0, copies.once), g.index_select(0, copies.once))
        at = copies.places
        each = g.index_select(0, at.clamp_min(0).flatten()).view(*at.shape, *g.shape[1:])
        each = each.masked_fill(at.lt(0).view(*at.shape, *[1] * (g.ndim - 1)), 0)
        total = each.sum(1, dtype=torch.promote_types(g.dtype, torch.float32))
        out.index_copy_(0, copies.shared, total.to(g.dtype))
        return out, None


class Head(torch.autograd.Function):
    """Log-probability of each target, and the entropy, from `states` (tokens × hidden size).

    The gradient with respect to the hidden state is known up to a factor per row, so it is computed together with the
    logits: this takes two products with the head instead of three.
    """

    @staticmethod
    def forward(
        ctx: Any, states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = max(1, HEAD_LOGITS // weight.shape[0])
        chosen: list[torch.Tensor] = []
        entropies: list[torch.Tensor] = []
        gradients: list[torch.Tensor] = []
        for some, wanted in zip(states.split(rows), targets.split(rows), strict=True):
            told, entropy, likely = softmax_for(some)(functional.linear(some, weight), wanted, temperature)
            chosen.append(told)
            entropies.append(entropy)
            if ctx.needs_input_grad[0]:
                expected = likely @ weight
                gradients.append((weight.index_select(0, wanted) - expected) / temperature)
        if gradients:
            ctx.save_for_backward(torch.cat(gradients))
        entropy = torch.cat(entropies)
        ctx.mark_non_differentiable(entropy)
        return torch.cat(chosen), entropy

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (known,) = ctx.saved_tensors
        return gradients[0][:, None].to(known.dtype) * known, None, None, None


def softmax_for(states: torch.Tensor) -> Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Return the kernel for a device, or the version in plain torch."""
    if states.is_cuda and states.dtype in (torch.bfloat16, torch.float16):
        from grpo_core.engines.native.fused import softmax

        return softmax
    return plain_softmax


def plain_softmax(
    logits: torch.Tensor, wanted: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the log-probability of each row's `wanted` token, the entropy, and all probabilities in the logits' dtype.

    `logits` are rows × vocabulary.
    """
    scaled = wide(logits) / temperature
    total = scaled.logsumexp(1)
    likely = (scaled - total[:, None]).exp_()
    entropy = total - torch.linalg.vecdot(likely, scaled)
    return scaled.gather(1, wanted[:, None])[:, 0] - total, entropy, likely.to(logits.dtype)


Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Layout], torch.Tensor]


def attention_for(device: torch.device, dtype: torch.dtype, repeats: int) -> Attention:
    """Return the kernel for a device, or the version in plain torch. `repeats` query heads share a key head."""
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        return _varlen_shared if repeats == 1 or _knows_groups() else _varlen_repeated
    return plain_attention


def plain_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Compute causal attention in each segment, with its last query aligned to its last key.

    `q` is queries × heads × head size; `k` and `v` are keys × key heads × head size. Short segments are padded
    together.
    """
    ends = list(zip(layout.query_ends.tolist(), layout.key_ends.tolist(), strict=True))
    spans = [_Span(q0, q1 - q0, k0, k1 - k0) for (q0, k0), (q1, k1) in pairwise(ends)]
    return torch.cat([_padded_attention(q, k, v, spans[at.start : at.stop]) for at in _runs_within(spans, PADDED)])


class _Span(NamedTuple):
    """The position of a segment in the stream."""

    query_at: int
    queries: int
    key_at: int
    keys: int


def _runs_within(spans: Sequence[_Span], most: int) -> Iterator[range]:
    """Runs of segments that have at most `most` pairs of query and key when padded, or of one segment."""
    start = queries = keys = 0
    for at, span in enumerate(spans):
        queries, keys = max(queries, span.queries), max(keys, span.keys)
        if at > start and (at + 1 - start) * queries * keys > most:
            yield range(start, at)
            start, queries, keys = at, span.queries, span.keys
    if spans:
        yield range(start, len(spans))


def _padded_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: Sequence[_Span]) -> torch.Tensor:
    queries_at, queries, keys_at, keys = (
        torch.tensor(column, device=q.device)[:, None] for column in zip(*spans, strict=True)
    )
    query, key = (torch.arange(int(lengths.max()), device=q.device) for lengths in (queries, keys))
    # Beyond its end a segment is filled up with its last token.
    query_rows = queries_at + query.minimum(queries - 1)
    key_rows = keys_at + key.minimum(keys - 1)
    mask = (key <= (query + keys - queries)[:, :, None]) & (key < keys)[:, None]

    def padded(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return x.index_select(0, rows.flatten()).unflatten(0, rows.shape).transpose(1, 2)

    out = functional.scaled_dot_product_attention(
        padded(q, query_rows), padded(k, key_rows), padded(v, key_rows), attn_mask=mask[:, None], enable_gqa=True
    )
    own = (query < queries).flatten().nonzero()[:, 0]
    return out.transpose(1, 2).flatten(0, 1).index_select(0, own)


def _varlen_shared(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout) -> torch.Tensor:
    return _varlen(q, k, v, layout, **({"enable_gqa": True} if q.shape[1] != k.shape[1] else {}))


def _varlen_repeated(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout) -> torch.Tensor:
    times = q.shape[1] // k.shape[1]
    return _varlen(q, k.repeat_interleave(times, 1), v.repeat_interleave(times, 1), layout)


def _varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout, **more: Any) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    ends = layout.query_ends, layout.key_ends, layout.longest_query, layout.longest_key
    out: Any = varlen_attn(q, k, v, *ends, window_size=(-1, 0), **more)
    if out.grad_fn is not None:
        # The order of additions in its backward pass is not fixed, unless this is set while it runs.
        out.grad_fn.register_prehook(_begin_deterministic)
        out.grad_fn.register_hook(_end_deterministic)
    return out


def _begin_deterministic(*_: Any) -> None:
    torch.use_deterministic_algorithms(True)


def _end_deterministic(*_: Any) -> None:
    torch.use_deterministic_algorithms(False)


def _knows_groups() -> bool:
    """Whether this torch's varlen attention supports fewer key heads than query heads; that of 2.11 does not."""
    import inspect

    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters

"""A decoding step on a GPU: four matrix products per layer, with one kernel between two of them.

Owns the order of the kernels, their launch configurations and the adapter's copy that they read: A is appended to each
16-bit weight, so that one product computes both, and separate from an 8-bit weight. It computes the same as
`model.hidden` with one token per row, followed by `sampling.draw`.
"""

from __future__ import annotations

from typing import Any, Final

import torch
import triton  # pyright: ignore[reportMissingImports]
from torch.nn import functional

from grpo_core import eight_bits
from grpo_core.engines.native import kernels as compiled
from grpo_core.engines.native.adapter import Adapter
from grpo_core.engines.native.architecture import LINEARS, Architecture
from grpo_core.engines.native.weights import Weights

kernels: Any = compiled  # Triton's: launched with a grid in brackets
TILE: Final = 128
"""Columns of a program of the kernels between two products."""
WORDS: Final = 4096
"""Of the vocabulary, for one program of the sampler."""
LONGEST: Final = 2**15
"""Inputs that a program quantises at once."""
FEW: Final = 16
"""Rows up to which our own product is tried."""
PROGRAMS: Final = 132
"""Multiprocessors of the card the configurations were measured on."""


def can_fuse(weights: Weights) -> bool:
    """Whether the kernels know these weights: 16 bits, usual heads, biases on queries, keys and values alone."""
    a = weights.architecture
    return (
        weights.device.type == "cuda"
        and weights.dtype in (torch.bfloat16, torch.float16)
        and a.head in (32, 64, 128, 256)
        and all(
            (linear.bias is None or kind == "qkv")
            and (spare_rank(weights, kind) >= 16 or (linear.scales is not None and linear.stored.shape[1] <= LONGEST))
            for layer in weights.layers
            for kind, linear in layer.linears.items()
        )
    )


def spare_rank(weights: Weights, kind: str) -> int:
    """Rows for each projection's A below a weight."""
    linear = weights.layers[0].linears[kind]
    return (linear.stored.shape[0] - linear.outputs) // len(weights.architecture.widths(kind))


def padded_rank(rank: int) -> int:
    """The rank that kernels compute with: a power of two, 16 at least."""
    return max(16, triton.next_power_of_2(rank))


class FusedStep:
    """The step for some weights."""

    def __init__(self, weights: Weights, rank: int = 1) -> None:
        """`rank`: the largest of an adapter; where the weights have rows for it, those say it."""
        self._weights, a = weights, weights.architecture
        self._eight_bits = weights.layers[0].linears["qkv"].scales is not None
        self._rank = padded_rank(rank) if self._eight_bits else spare_rank(weights, "qkv")
        on: dict[str, Any] = {"device": weights.device, "dtype": weights.dtype}
        self._a = [
            {
                kind: torch.zeros(self._slots(kind) * self._rank, a.inputs(kind), **on)
                if self._eight_bits
                else linear.stored[linear.outputs :]
                for kind, linear in layer.linears.items()
            }
            for layer in weights.layers
        ]
        self._b = [
            {kind: torch.zeros(layer.linears[kind].outputs, self._slots(kind) * self._rank, **on) for kind in LINEARS}
            for layer in weights.layers
        ]
        self._none = torch.zeros(a.queries + 2 * a.keys, **on)
        self._beside = torch.cuda.Stream(weights.device)
        self._tiles = triton.cdiv(a.hidden, TILE)

    def set_adapter(self, adapter: Adapter | None) -> None:
        """Compute with the adapter's present values from now on."""
        for number, layer in enumerate(self._weights.layers):
            if adapter is None:
                for kind in layer.linears:
                    self._weights.write(number, self._a[number][kind], torch.zeros_like(self._a[number][kind]))
                    self._b[number][kind].zero_()
                continue
            for kind, name, matrix, values in adapter.matrices(number):
                widths = self._weights.architecture.widths(kind)
                slot = list(widths).index(name) * self._rank
                if matrix == "A":
                    self._weights.write(number, self._a[number][kind][slot : slot + adapter.rank], values)
                else:
                    begin = sum(list(widths.values())[: list(widths).index(name)])
                    self._b[number][kind][begin : begin + widths[name], slot : slot + adapter.rank].copy_(values)

    def logits(
        self, state: torch.Tensor, cache: torch.Tensor, angles: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits that are still to be normed, and the sums of squares to do it with."""
        weights, a, rows = self._weights, self._weights.architecture, state.shape[0]
        on: dict[str, Any] = {"device": state.device, "dtype": weights.dtype}
        embedding = weights.begin()
        x, g = torch.empty(rows, a.hidden, **on), torch.empty(rows, a.hidden, **on)
        q, h = torch.empty(rows, a.queries, **on), torch.empty(rows, a.inner, **on)
        up, tiles = triton.cdiv(rows, 16), self._tiles
        ss = torch.empty(tiles, rows, device=state.device)
        late = not self._eight_bits
        scale: dict[str, Any] = {"NT": tiles, "NT2": triton.next_power_of_2(tiles), "H": a.hidden, "LATE": late}

        def part(y: torch.Tensor, z: torch.Tensor) -> dict[str, Any]:
            return {"ld": y.stride(1), "S": y.shape[0], "lz": z.stride(1), "SZ": z.shape[0], "R": self._rank}

        def residual(
            y: torch.Tensor, z: torch.Tensor, b: torch.Tensor, norm: torch.Tensor, *, first: bool = False
        ) -> None:
            kernels.residual_kernel[up, tiles](
                x, g, ss, y, z, b, norm, embedding, state, rows, a.hidden, BN=TILE, FIRST=first, **part(y, z)
            )

        def multiply(
            of: torch.Tensor, number: int, kind: str, norm: torch.Tensor | None = None
        ) -> tuple[torch.Tensor, torch.Tensor]:
            return self._multiply(x if norm is not None and not late else of, number, kind, norm)

        residual(x[None], x[None], x, weights.layers[0].input_norm, first=True)
        for number in range(a.layers):
            layer = weights.layer(number)
            b, bias = self._b[number], layer.linears["qkv"].bias
            y, z = multiply(g, number, "qkv", layer.input_norm)
            kernels.rotary_kernel[up, a.heads + 2 * a.kv_heads](
                y, z, b["qkv"], self._none if bias is None else bias,
                self._none if layer.query_norm is None else layer.query_norm,
                self._none if layer.key_norm is None else layer.key_norm,
                ss, state, *angles, q, cache[number], rows, a.epsilon,
                NQ=a.heads, NKV=a.kv_heads, D=a.head, NORMED=layer.query_norm is not None, **scale, **part(y, z),
            )  # fmt: skip
            attended = attend(a, q, cache[number], state, angles[0].shape[0])
            residual(*multiply(attended, number, "o"), b["o"], layer.output_norm)
            y, z = multiply(g, number, "gate_up", layer.output_norm)
            kernels.silu_kernel[up, triton.cdiv(a.inner, TILE)](
                y, z, b["gate_up"], ss, h, rows, a.inner, a.epsilon, BN=TILE, **scale, **part(y, z)
            )
            last = number + 1 == len(weights.layers)
            norm = weights.norm if last else weights.layers[number + 1].input_norm
            residual(*multiply(h, number, "down"), b["down"], norm)
        return functional.linear(g, weights.end()), ss

    def _multiply(
        self, x: torch.Tensor, number: int, kind: str, norm: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x W' and x A' of a layer's linear, each as partial sums; in 8 bits x is normed first if there is a norm."""
        linear = self._weights.layers[number].linears[kind]
        if linear.scales is None:
            y = product(x, linear.stored)
            return y, y[:, :, linear.outputs :]
        given, quantised = self.quantise(x, norm)
        # The adapter's product is too small to fill the GPU, so it runs beside the weight's.
        here = torch.cuda.current_stream()
        self._beside.wait_stream(here)
        with torch.cuda.stream(self._beside):
            z = functional.linear(given, self._a[number][kind])
        y = eight_bits.product(quantised, linear.stored, linear.scales, x.dtype)
        here.wait_stream(self._beside)
        return y[None], z[None]

    def quantise(self, x: torch.Tensor, norm: torch.Tensor | None = None) -> tuple[torch.Tensor, eight_bits.Quantised]:
        """Rows in 8 bits, after their norm if one is given; those in 16 bits beside."""
        rows, inputs = x.shape
        normed = x if norm is None else torch.empty_like(x)
        values = torch.empty(rows, inputs, device=x.device, dtype=eight_bits.FP8)
        scales = torch.empty(rows, 1, device=x.device)
        kernels.quantise_kernel[(rows,)](
            x, x if norm is None else norm, normed, values, scales, inputs, self._weights.architecture.epsilon,
            NORMED=norm is not None, BLOCK=triton.next_power_of_2(inputs), num_warps=8,
        )  # fmt: skip
        return normed, eight_bits.Quantised(values, scales)

    def draw(
        self, logits: torch.Tensor, squares: torch.Tensor, state: torch.Tensor, knobs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A token of each row and its log-probability."""
        a, (rows, words), tiles = self._weights.architecture, logits.shape, self._tiles
        stretches = triton.cdiv(words, WORDS)
        numbers = torch.empty(4, rows, stretches, device=logits.device)
        places = torch.empty(rows, stretches, device=logits.device, dtype=torch.long)
        kernels.draw_kernel[rows, stretches](
            logits, squares, state, knobs, numbers, places, rows, words, stretches, a.epsilon,
            BLOCK=WORDS, NT=tiles, NT2=triton.next_power_of_2(tiles), H=a.hidden,
        )  # fmt: skip
        tops, sums, best, chosen = numbers
        top, winner = tops.amax(1, keepdim=True), best.argmax(1, keepdim=True)
        total = (sums * (tops - top).exp()).sum(1, keepdim=True).log() + top
        return places.gather(1, winner)[:, 0], (chosen.gather(1, winner) - total)[:, 0]

    def normed(self, logits: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
        """The logits with their norm."""
        a = self._weights.architecture
        return logits.float() * torch.rsqrt(squares.sum(0) / a.hidden + a.epsilon)[:, None]

    def _slots(self, kind: str) -> int:
        return len(self._weights.architecture.widths(kind))


def attend(a: Architecture, q: torch.Tensor, cache: torch.Tensor, state: torch.Tensor, longest: int) -> torch.Tensor:
    """Attention of one query a row over the row's keys in one layer's cache, of which a row has `longest` at most."""
    rows, splits = state.shape[0], 1
    while splits < 16 and rows * a.kv_heads * splits < PROGRAMS and longest > 512 * splits:
        splits *= 2
    o = torch.empty_like(q)
    po, pm = o, o
    if splits > 1:
        po = torch.empty(rows, a.heads, splits, a.head, device=q.device)
        pm = torch.empty(2, rows, a.heads, splits, device=q.device)
    group = a.heads // a.kv_heads
    kernels.attend_kernel[rows, a.kv_heads, splits](
        q, cache, state, o, po, pm, a.head**-0.5 * 1.4426950408889634, rows, a.heads, a.kv_heads, group,
        G2=max(16, triton.next_power_of_2(group)), D=a.head, BLOCK=64, SPLITS=splits, num_stages=2,
    )  # fmt: skip
    if splits > 1:
        kernels.merge_kernel[(rows * a.heads,)](po, pm, o, rows * a.heads, D=a.head, SPLITS=splits)
    return o


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x W' as partial sums (splits, rows, outputs): our own stream over the weight for few rows, else cuBLAS."""
    rows, outputs, inputs = x.shape[0], *weight.shape
    plan = plan_for(rows, outputs, inputs)
    if plan is None:
        return functional.linear(x, weight)[None]
    columns, depth, splits, warps, stages = plan
    y = torch.empty(splits, rows, outputs, device=x.device)
    kernels.stream_kernel[triton.cdiv(outputs, columns), splits](
        x, weight, y, rows, inputs, outputs, splits, BM=FEW, BN=columns, BK=depth, num_warps=warps, num_stages=stages
    )
    return y


def plan_for(rows: int, outputs: int, inputs: int) -> tuple[int, int, int, int, int] | None:
    """Columns and depth of a tile, parts of the sum, warps and stages; None where cuBLAS is as fast."""
    if rows > FEW or inputs % 128:
        return None
    columns, depth = 64, 128
    splits = next((s for s in (1, 2, 4) if triton.cdiv(outputs, columns) * s >= PROGRAMS), 4)
    while inputs % (depth * splits):
        splits //= 2
    return columns, depth, splits, 4, 4


def softmax(
    logits: torch.Tensor, wanted: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Twin of `packed.plain_softmax`; the probabilities are in the logits' memory afterwards."""
    rows, words = logits.shape
    chosen, entropy = torch.empty(2, rows, device=logits.device)
    kernels.softmax_kernel[(rows,)](logits, wanted, chosen, entropy, 1 / temperature, words, BLOCK=4096, num_warps=8)
    return chosen, entropy, logits

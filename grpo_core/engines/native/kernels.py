"""Triton kernels for a decoding step between its matrix products. Each kernel does all work on the values that it
reads.

Owns what one kernel computes; `fused` calls them in order and names the plain version of each. Rows are processed in
tiles of 16. Invariants: no atomic additions, so that equal inputs give equal bits; every configuration is fixed.

`ss` holds partial sums of squares of the residual stream, one row per tile. The reader of the next product applies the
norm's factor, unless the product is of normed values (`LATE` is off), as in 8 bits. `z` holds the adapter's inner
values x A': columns of the same product in 16 bits, of a separate product in 8 bits. `ld` and `lz` are the numbers of
columns in a row of y and of z; `S` and `SZ` are the numbers of partial sums of each.
"""

# pyright: basic
# ruff: noqa: N803 - constants of a kernel are in capitals
# Triton compiles these functions; their annotations are its own.

from __future__ import annotations

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]


@triton.jit
def _factor(ss, m, M, eps, H: tl.constexpr, NT: tl.constexpr, NT2: tl.constexpr):
    """1 / rms of the rows `m`."""
    t = tl.arange(0, NT2)
    squares = tl.load(ss + t[:, None] * M + m[None], mask=(t[:, None] < NT) & (m[None] < M), other=0.0)
    return tl.rsqrt(tl.sum(squares, 0) / H + eps)


@triton.jit
def _sum(y, at, ok, plane, S: tl.constexpr):
    """A product from its S partial sums."""
    v = tl.load(y + at, mask=ok, other=0.0).to(tl.float32)
    for s in tl.static_range(1, S):
        v += tl.load(y + s * plane + at, mask=ok, other=0.0)
    return v


@triton.jit
def _with_adapter(
    y, z, b, m, n, M, N, ld, lz, which, S: tl.constexpr, SZ: tl.constexpr, R: tl.constexpr, C: tl.constexpr
):
    """Columns `n` of x W' + (x A') B', from x W' in y and x A' in z. b is (N, C R); `which` is the block of it."""
    ok = m[:, None] < M
    v = _sum(y, m[:, None] * ld + n[None], ok & (n[None] < N), M * ld, S)
    r = which * R + tl.arange(0, R)
    inner = _sum(z, m[:, None] * lz + r[None], ok, M * lz, SZ)
    block = tl.load(b + n[None] * (C * R) + r[:, None], mask=n[None] < N, other=0.0)
    return tl.dot(inner.to(block.dtype), block, v, input_precision="ieee")


@triton.jit
def residual_kernel(
    x, g, ss, y, z, b, norm, embed, st, M, N, ld, lz,
    BN: tl.constexpr, FIRST: tl.constexpr, S: tl.constexpr, SZ: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """x += y; g = x times the norm's weight; ss = the tile's sum of squares. FIRST: x is the embedding of a token."""
    m, n = tl.program_id(0) * 16 + tl.arange(0, 16), tl.program_id(1) * BN + tl.arange(0, BN)
    ok, at = (m[:, None] < M) & (n[None] < N), m[:, None] * N + n[None]
    if FIRST:
        token = tl.load(st + m * 8, mask=m < M, other=0)[:, None]
        v = tl.load(embed + token * N + n[None], mask=ok, other=0.0).to(tl.float32)
    else:
        v = tl.load(x + at, mask=ok, other=0.0).to(tl.float32) + _with_adapter(
            y, z, b, m, n, M, N, ld, lz, 0, S, SZ, R, 1
        )
    v = v.to(x.dtype.element_ty)
    tl.store(x + at, v, mask=ok)
    v = v.to(tl.float32)
    tl.store(ss + tl.program_id(1) * M + m, tl.sum(v * v, 1), mask=m < M)
    weight = tl.load(norm + n, mask=n < N, other=0.0)[None]
    tl.store(g + at, (v * weight).to(x.dtype.element_ty), mask=ok)


@triton.jit
def rotary_kernel(
    y, z, b, bias, qn, kn, ss, st, cos, sin, q, kv, M, eps, ld, lz,
    NQ: tl.constexpr, NKV: tl.constexpr, D: tl.constexpr, NORMED: tl.constexpr, NT: tl.constexpr, NT2: tl.constexpr,
    H: tl.constexpr, LATE: tl.constexpr, S: tl.constexpr, SZ: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """One head: adapter, bias, norm, rotation; queries to q, keys and values to the row's place in the cache."""
    m, head, i = tl.program_id(0) * 16 + tl.arange(0, 16), tl.program_id(1), tl.arange(0, D // 2)
    ok, n = (m[:, None] < M) & (i[None] >= 0), head * D + i
    which = (head >= NQ).to(tl.int32) + (head >= NQ + NKV).to(tl.int32)
    width = (NQ + 2 * NKV) * D
    one = _with_adapter(y, z, b, m, n, M, width, ld, lz, which, S, SZ, R, 3)
    other = _with_adapter(y, z, b, m, n + D // 2, M, width, ld, lz, which, S, SZ, R, 3)
    if LATE:
        factor = _factor(ss, m, M, eps, H, NT, NT2)[:, None]
        one, other = factor * one, factor * other
    one, other = one + tl.load(bias + n)[None], other + tl.load(bias + n + D // 2)[None]
    if NORMED:  # noqa: SIM102 - known when it is compiled, and the other is not
        if which < 2:
            weight = qn
            if which == 1:
                weight = kn
            scale = tl.rsqrt((tl.sum(one * one, 1) + tl.sum(other * other, 1)) / D + eps)[:, None]
            one = one * scale * tl.load(weight + i)[None].to(tl.float32)
            other = other * scale * tl.load(weight + D // 2 + i)[None].to(tl.float32)
    count = tl.load(st + m * 8 + 1, mask=m < M, other=0)
    if which < 2:
        at = (tl.load(st + m * 8 + 4, mask=m < M, other=0) + count)[:, None] * (D // 2) + i[None]
        c, s = (
            tl.load(cos + at, mask=ok, other=0.0).to(tl.float32),
            tl.load(sin + at, mask=ok, other=0.0).to(tl.float32),
        )
        one, other = one * c - other * s, other * c + one * s
    if which == 0:
        to = q + m[:, None] * (NQ * D) + n[None]
        tl.store(to, one.to(q.dtype.element_ty), mask=ok)
        tl.store(to + D // 2, other.to(q.dtype.element_ty), mask=ok)
    else:
        place = tl.load(st + m * 8 + 5, mask=m < M, other=0) + count
        to = kv + place[:, None] * (2 * NKV * D) + ((head - NQ) * D + i)[None]
        tl.store(to, one.to(q.dtype.element_ty), mask=ok)
        tl.store(to + D // 2, other.to(q.dtype.element_ty), mask=ok)


@triton.jit
def attend_kernel(
    q, kv, st, o, po, pm, scale, M, NQ, NKV, G,
    G2: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """The G queries of one key head of one row, over a stretch of its keys: the prompt's, then its own."""
    r, h, split, g, d = tl.program_id(0), tl.program_id(1), tl.program_id(2), tl.arange(0, G2), tl.arange(0, D)
    prompt = tl.load(st + r * 8 + 4)
    begin, own = tl.load(st + r * 8 + 3), tl.load(st + r * 8 + 5) - prompt
    n = (prompt + tl.load(st + r * 8 + 1) + 1).to(tl.int32)
    head = r * NQ + h * G + g
    at, ok = head[:, None] * D + d[None], g[:, None] < G
    queries = tl.load(q + at, mask=ok, other=0.0)
    m, total = tl.full([G2], float("-inf"), tl.float32), tl.zeros([G2], tl.float32)
    acc = tl.zeros([G2, D], tl.float32)
    each = tl.cdiv(n, SPLITS * BLOCK) * BLOCK
    end = tl.minimum(n, (split + 1) * each)
    for start in range(split * each, end, BLOCK):
        j = start + tl.arange(0, BLOCK)
        key = (tl.where(j < prompt, begin, own) + j) * (2 * NKV * D) + h * D
        keys = tl.load(kv + key[None] + d[:, None], mask=j[None] < end, other=0.0)
        z = tl.dot(queries, keys, input_precision="ieee") * scale
        z = tl.where(j[None] < end, z, float("-inf"))
        top = tl.maximum(m, tl.max(z, 1))
        p, c = tl.exp2(z - top[:, None]), tl.exp2(m - top)
        values = tl.load(kv + key[:, None] + NKV * D + d[None], mask=j[:, None] < end, other=0.0)
        total = total * c + tl.sum(p, 1)
        acc = tl.dot(p.to(values.dtype), values, acc * c[:, None], input_precision="ieee")
        m = top
    if SPLITS == 1:
        tl.store(o + at, (acc / total[:, None]).to(o.dtype.element_ty), mask=ok)
    else:
        tl.store(po + (head[:, None] * SPLITS + split) * D + d[None], acc, mask=ok)
        tl.store(pm + head * SPLITS + split, m, mask=g < G)
        tl.store(pm + (M * NQ + head) * SPLITS + split, total, mask=g < G)


@triton.jit
def merge_kernel(po, pm, o, N, D: tl.constexpr, SPLITS: tl.constexpr):
    """A head's output from those over stretches of its keys."""
    h, s, d = tl.program_id(0), tl.arange(0, SPLITS), tl.arange(0, D)
    m = tl.load(pm + h * SPLITS + s)
    c = tl.exp2(m - tl.max(m, 0))
    v = tl.sum(tl.load(po + (h * SPLITS + s[:, None]) * D + d[None]) * c[:, None], 0)
    tl.store(o + h * D + d, (v / tl.sum(c * tl.load(pm + (N + h) * SPLITS + s), 0)).to(o.dtype.element_ty))


@triton.jit
def silu_kernel(
    y, z, b, ss, h, M, N, eps, ld, lz,
    BN: tl.constexpr, NT: tl.constexpr, NT2: tl.constexpr, H: tl.constexpr, LATE: tl.constexpr, S: tl.constexpr,
    SZ: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """silu(gate) * up, each with its adapter."""
    m, n = tl.program_id(0) * 16 + tl.arange(0, 16), tl.program_id(1) * BN + tl.arange(0, BN)
    ok = (m[:, None] < M) & (n[None] < N)
    # The second half's columns end at 2 N: what lies beyond N of the first is masked when it is stored.
    gate = _with_adapter(y, z, b, m, n, M, 2 * N, ld, lz, 0, S, SZ, R, 2)
    up = _with_adapter(y, z, b, m, N + n, M, 2 * N, ld, lz, 1, S, SZ, R, 2)
    if LATE:
        factor = _factor(ss, m, M, eps, H, NT, NT2)[:, None]
        gate, up = factor * gate, factor * up
    tl.store(h + m[:, None] * N + n[None], (gate / (1 + tl.exp(-gate)) * up).to(h.dtype.element_ty), mask=ok)


@triton.jit
def quantise_kernel(x, norm, n, q, scale, K, eps, NORMED: tl.constexpr, BLOCK: tl.constexpr):
    """One row in 8 bits with its scale; NORMED: after its norm, which also goes to n. Twin of `eight_bits.quantise`."""
    r, k = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    v = tl.load(x + r * K + k, mask=k < K, other=0.0).to(tl.float32)
    if NORMED:
        v = v * tl.rsqrt(tl.sum(v * v, 0) / K + eps) * tl.load(norm + k, mask=k < K, other=0.0).to(tl.float32)
        rounded = v.to(n.dtype.element_ty)
        tl.store(n + r * K + k, rounded, mask=k < K)
        v = rounded.to(tl.float32)
    s = tl.maximum(tl.max(tl.abs(v), 0), 1e-12) / 448.0
    v = tl.minimum(tl.maximum(v / s, -448.0), 448.0)
    tl.store(q + r * K + k, v.to(q.dtype.element_ty), mask=k < K)
    tl.store(scale + r, s)


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def draw_kernel(
    y, ss, st, knobs, pf, pi, M, V, NC, eps, BLOCK: tl.constexpr, NT: tl.constexpr, NT2: tl.constexpr, H: tl.constexpr
):
    """One row in one stretch of the vocabulary: largest logit, sum of exponentials, winner's score, logit, number."""
    r, c = tl.program_id(0), tl.program_id(1)
    n, t = c * BLOCK + tl.arange(0, BLOCK), tl.arange(0, NT2)
    z = tl.load(y + r.to(tl.int64) * V + n, mask=n < V, other=float("-inf")).to(tl.float32) * tl.load(knobs)
    z *= tl.rsqrt(tl.sum(tl.load(ss + t * M + r, mask=t < NT, other=0.0), 0) / H + eps)
    seed = tl.load(st + r * 8 + 6)
    a = _mix(seed.to(tl.uint32) ^ _mix(tl.load(st + r * 8 + 1).to(tl.uint32)))
    b = _mix((seed >> 32).to(tl.uint32) ^ (a + 0x9E3779B9))
    v = _mix(_mix(n.to(tl.uint32) ^ a) + b).to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    v = tl.minimum(v, 0.999999940395355)
    noise = tl.log(tl.where(v < 0.0078125, v * (1 + v * (0.5 + v / 3)), -tl.log(1 - v)))
    score = z - tl.load(knobs + 1) * noise
    top = tl.max(z, 0)
    best, i = tl.max(score, 0, return_indices=True)
    at = r * NC + c
    tl.store(pf + at, top)
    tl.store(pf + M * NC + at, tl.sum(tl.exp(z - top), 0))
    tl.store(pf + 2 * M * NC + at, best)
    tl.store(pf + 3 * M * NC + at, tl.sum(tl.where(n == c * BLOCK + i, z, 0.0), 0))
    tl.store(pi + at, (c * BLOCK + i).to(tl.int64))


@triton.jit
def stream_kernel(x, w, y, M, K, N, splits, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """y[split] = x W' for up to BM rows: a stream over W, which is read once."""
    n, s, m, k = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1), tl.arange(0, BM), tl.arange(0, BK)
    each = tl.cdiv(K, splits * BK) * BK
    begin, end = s * each, tl.minimum(K, (s + 1) * each)
    wp = w + tl.minimum(n, N - 1).to(tl.int64)[:, None] * K + k[None]
    xp = x + m[None] * K + k[:, None]
    acc = tl.zeros([BN, BM], tl.float32)
    for i in range(begin, end, BK):
        xt = tl.load(xp + i, mask=m[None] < M, other=0.0)
        acc = tl.dot(tl.load(wp + i, eviction_policy="evict_first"), xt, acc, input_precision="ieee")
    tl.store(y + (s * M + m[None]) * N + n[:, None], acc, mask=(n[:, None] < N) & (m[None] < M))


@triton.jit
def softmax_kernel(y, wanted, chosen, entropy, scale, V, BLOCK: tl.constexpr):
    """One row of logits becomes its probabilities; the wanted token's logarithm and the entropy beside."""
    r = tl.program_id(0).to(tl.int64)
    row, n = y + r * V, tl.arange(0, BLOCK)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total, mean = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        z = tl.load(row + start + n, mask=start + n < V, other=float("-inf")).to(tl.float32) * scale
        new = tl.maximum(top, z)
        shift = tl.where(new == float("-inf"), 0.0, new)  # a lane may have seen no word yet
        c, p = tl.exp(top - shift), tl.exp(z - shift)
        total, mean, top = total * c + p, mean * c + tl.where(p > 0, p * z, 0.0), new
    most = tl.max(top, 0)
    c = tl.exp(top - most)
    sums = tl.sum(total * c, 0)
    log_sum = most + tl.log(sums)
    token = tl.load(wanted + r)
    tl.store(chosen + r, tl.load(row + token).to(tl.float32) * scale - log_sum)
    tl.store(entropy + r, log_sum - tl.sum(mean * c, 0) / sums)
    tl.debug_barrier()  # all have read before any writes
    for start in range(0, V, BLOCK):
        z = tl.load(row + start + n, mask=start + n < V, other=float("-inf")).to(tl.float32) * scale
        tl.store(row + start + n, tl.exp(z - log_sum).to(y.dtype.element_ty), mask=start + n < V)

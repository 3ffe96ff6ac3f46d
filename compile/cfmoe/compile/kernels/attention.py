"""Grouped-query attention over plain KV buffers: q/k norm, rope, append and softmax in one kernel.

K is kept as [kv heads, context / 16, head_dim, 16], so that sixteen scores need no sum across lanes; V as [kv heads, context, head_dim].
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from cfmoe.compile.kernels.builder import (
    Buffer,
    Expr,
    build,
    exp,
    f32,
    i64,
    let,
    load,
    local,
    loop,
    reduce_max,
    reduce_sum,
    scalar,
    splat,
    store,
    symbol,
    tensor,
)

LANES = 16  # also the positions of one K block
NEGATIVE = -3.0e38
# Multiply-adds of a decoded token's scores above which its heads are shared out among the threads.
MIN_PARALLEL_SCORES = 1 << 18


@dataclass(frozen=True)
class AttentionShape:
    """One attention layer. `qk_norm`: none, head (a weight of head_dim) or vector (a weight over all heads)."""

    heads: int
    kv_heads: int
    head_dim: int
    qk_norm: str
    eps: float
    kv_dtype: str
    rows: int | None = None

    @property
    def qkv_width(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim


def attention(name: str, shape: AttentionShape) -> tirx.PrimFunc:
    """(qkv fp32 [n, …], [q_norm, k_norm fp32], rope fp32 [n, head_dim], k, v caches, position, out fp32 [n, heads * head_dim]).

    Writes keys and values of the n tokens at `position` into the caches, then attends to everything up to each token. `rope` is
    what `rope` below returns. Softmax is the online form (Milakov & Gimelshein 2018) over blocks of 16 positions, aligned to
    position 0, so chunking does not change a result.
    """
    heads, kv_heads, dim = shape.heads, shape.kv_heads, shape.head_dim
    half = dim // 2

    def body() -> None:
        n = i64(shape.rows) if shape.rows is not None else symbol()
        context, blocks = symbol(), symbol()
        qkv = tensor("qkv", (n, shape.qkv_width), "float32")
        norms: tuple[Buffer, Buffer] | None = None
        if shape.qk_norm != "none":
            scale = (1, 1) if shape.qk_norm == "head" else (heads, kv_heads)
            norms = (tensor("q_norm", (scale[0] * dim,), "float32"), tensor("k_norm", (scale[1] * dim,), "float32"))
        rope = tensor("rope", (n, dim), "float32")
        keys = tensor("k_cache", (kv_heads, blocks, dim, LANES), shape.kv_dtype)
        values = tensor("v_cache", (kv_heads, context, dim), shape.kv_dtype)
        position = scalar("position")
        out = tensor("out", (n, heads * dim), "float32")

        def inverse_rms(row: Expr, first: Expr, width: int) -> Expr:
            acc = local(LANES)
            store(acc, splat(f32(0.0), LANES), i64(0), lanes=LANES)
            with loop(width // LANES) as j:
                v = let(load(qkv, row, first + j * i64(LANES), lanes=LANES))
                store(acc, load(acc, i64(0), lanes=LANES) + v * v, i64(0), lanes=LANES)
            return let(f32(1.0) / T.sqrt(reduce_sum(load(acc, i64(0), lanes=LANES)) / f32(float(width)) + f32(shape.eps)))

        def rotated(row: Expr, first: Expr, head: Expr, which: int, at: Expr, whole: Expr | None) -> tuple[Expr, Expr]:
            """Elements at…at+lanes of both halves of a head, normalised and rotated."""
            a = load(qkv, row, first + at, lanes=LANES)
            b = load(qkv, row, first + i64(half) + at, lanes=LANES)
            if norms is not None:
                offset = i64(0) if shape.qk_norm == "head" else head * i64(dim)
                inverse = splat(whole, LANES)
                a = a * inverse * load(norms[which], offset + at, lanes=LANES)
                b = b * inverse * load(norms[which], offset + i64(half) + at, lanes=LANES)
            a, b = let(a), let(b)
            cos = let(load(rope, row, at, lanes=LANES))
            sin = let(load(rope, row, i64(half) + at, lanes=LANES))
            return let(a * cos - b * sin), let(b * cos + a * sin)

        def inverse_for(row: Expr, first: Expr, begin: int, count: int) -> Expr | None:
            if norms is None:
                return None
            if shape.qk_norm == "head":
                return inverse_rms(row, first, dim)
            return inverse_rms(row, i64(begin), count * dim)

        with loop(n, parallel=shape.rows != 1) as row:
            with loop(heads) as head:
                first = let(head * i64(dim))
                whole = inverse_for(row, first, 0, heads)
                with loop(half // LANES) as j:
                    at = let(j * i64(LANES))
                    a, b = rotated(row, first, head, 0, at, whole)
                    store(out, a, row, first + at, lanes=LANES)
                    store(out, b, row, first + i64(half) + at, lanes=LANES)
            place = let(position + row)
            block, lane = let(T.floordiv(place, i64(LANES))), let(T.floormod(place, i64(LANES)))
            with loop(kv_heads) as head:
                first = let((i64(heads) + head) * i64(dim))
                whole = inverse_for(row, first, heads * dim, kv_heads)
                with loop(half // LANES) as j:
                    at = let(j * i64(LANES))
                    pair = rotated(row, first, head, 1, at, whole)
                    staged = local(2 * LANES)
                    for part, value in enumerate(pair):
                        store(staged, value, i64(part * LANES), lanes=LANES)
                    for part in range(2):
                        for d in range(LANES):
                            element = T.Cast(shape.kv_dtype, staged[i64(part * LANES + d)])
                            T.buffer_store(keys, element, [head, block, i64(part * half) + at + i64(d), lane])
                with loop(dim // LANES) as j:
                    at = let(j * i64(LANES))
                    source = let(i64((heads + kv_heads) * dim) + head * i64(dim) + at)
                    value = load(qkv, row, source, lanes=LANES)
                    store(values, T.Cast(f"{shape.kv_dtype}x{LANES}", value), head, place, at, lanes=LANES)

        def attend_all(parallel: bool) -> None:
            with loop(n * i64(heads), parallel=parallel) as item:
                _attend(shape, out, keys, values, let(T.floordiv(item, i64(heads))), let(T.floormod(item, i64(heads))), position)

        if shape.rows != 1:
            attend_all(parallel=True)
            return
        with T.If(position < i64(max(1, MIN_PARALLEL_SCORES // (heads * dim)))):
            with T.Then():
                attend_all(parallel=False)
            with T.Else():
                attend_all(parallel=True)

    return build(name, {}, body)


def rope(name: str, rows: int | None, head_dim: int) -> tirx.PrimFunc:
    """(inverse frequencies fp32 [head_dim / 2], position, out fp32 [n, head_dim]): cosines, then sines, of n positions.

    Rotary position embedding, Su et al. 2021, in the half-split arrangement.
    """
    half = head_dim // 2

    def body() -> None:
        n = i64(rows) if rows is not None else symbol()
        frequencies = tensor("inverse_frequencies", (half,), "float32")
        position = scalar("position")
        out = tensor("out", (n, head_dim), "float32")
        with loop(n) as row, loop(half) as j:
            angle = let(T.Cast("float32", position + row) * frequencies[j])
            T.buffer_store(out, T.cos(angle), [row, j])
            T.buffer_store(out, T.sin(angle), [row, i64(half) + j])

    return build(name, {}, body)


def _attend(shape: AttentionShape, out: Buffer, keys: Buffer, values: Buffer, row: Expr, head: Expr, position: Expr) -> None:
    """Replaces the query in out[row, head] by the attention output."""
    dim = shape.head_dim
    vector = f"float32x{LANES}"
    first = let(head * i64(dim))
    kv = let(T.floordiv(head, i64(shape.heads // shape.kv_heads)))
    last = let(position + row)
    acc, weights = local(dim), local(LANES)
    state = local(2)  # running maximum, running sum
    T.buffer_store(state, f32(NEGATIVE), [i64(0)])
    T.buffer_store(state, f32(0.0), [i64(1)])
    with loop(dim // LANES) as j:
        store(acc, splat(f32(0.0), LANES), j * i64(LANES), lanes=LANES)
    scores = local(LANES)
    with T.serial(i64(0), T.floordiv(last, i64(LANES)) + i64(1)) as block:
        store(scores, splat(f32(0.0), LANES), i64(0), lanes=LANES)
        with loop(dim) as d:
            key = T.Cast(vector, load(keys, kv, block, d, i64(0), lanes=LANES))
            store(scores, load(scores, i64(0), lanes=LANES) + splat(out[row, first + d], LANES) * key, i64(0), lanes=LANES)
        scaled = let(load(scores, i64(0), lanes=LANES) * splat(f32(dim**-0.5), LANES))
        here = T.Ramp(T.Cast("int32", block * i64(LANES)), tirx.IntImm("int32", 1), LANES)
        masked = let(T.Select(here <= splat(T.Cast("int32", last), LANES), scaled, splat(f32(NEGATIVE), LANES)))
        old = let(state[i64(0)])
        peak = let(T.max(old, reduce_max(masked)))
        fade = exp(old - peak, 1)
        p = exp(masked - splat(peak, LANES), LANES)
        T.buffer_store(state, peak, [i64(0)])
        T.buffer_store(state, state[i64(1)] * fade + reduce_sum(p), [i64(1)])
        store(weights, p, i64(0), lanes=LANES)
        with loop(dim // LANES) as j:
            at = let(j * i64(LANES))
            total = let(load(acc, at, lanes=LANES) * splat(fade, LANES))
            for offset in range(LANES):
                value = T.Cast(vector, load(values, kv, block * i64(LANES) + i64(offset), at, lanes=LANES))
                total = let(total + splat(weights[i64(offset)], LANES) * value)
            store(acc, total, at, lanes=LANES)
    with loop(dim // LANES) as j:
        at = let(j * i64(LANES))
        store(out, load(acc, at, lanes=LANES) / splat(state[i64(1)], LANES), row, first + at, lanes=LANES)

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
    fma,
    i64,
    let,
    load,
    local,
    loop,
    reduce_max,
    reduce_sum,
    rounded,
    scalar,
    sin_cos,
    splat,
    store,
    symbol,
    tensor,
)

LANES = 16  # also the positions of one K block
# Sums of products that run side by side, because each waits for the one before: of as many query heads with the same keys, or of one.
SUMS = 4
NEGATIVE = -3.0e38
# Multiply-adds of a decoded token's scores above which its heads are shared out among the threads.
MIN_PARALLEL_SCORES = 1 << 18


@dataclass(frozen=True)
class AttentionShape:
    """One attention layer. `qk_norm`: none, head (a weight of head_dim) or vector (a weight over all heads).

    The first `rotary` elements of queries and keys are rotated. `window`: how many tokens back a token sees, itself included; 0: all.
    """

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    rotary: int
    scale: float
    window: int
    sinks: bool
    qk_norm: str
    eps: float
    kv_dtype: str
    rows: int | None = None

    @property
    def shared_heads(self) -> int:
        """How many query heads are handled at once, for which keys and values are read once."""
        group = self.heads // self.kv_heads
        return max(count for count in range(1, SUMS + 1) if group % count == 0)

    @property
    def streams(self) -> int:
        """How many sums a head's score is of. Divides head_dim, which is a multiple of 32."""
        return SUMS // self.shared_heads

    @property
    def qkv_width(self) -> int:
        return (self.heads + self.kv_heads) * self.head_dim + self.kv_heads * self.value_dim


def attention(name: str, shape: AttentionShape) -> tirx.PrimFunc:
    """(qkv fp32 [n, …], [q_norm, k_norm fp32], [sinks fp32 [heads]], rope fp32 [n, rotary], k, v caches, position, out fp32
    [n, heads * value_dim]).

    Writes keys and values of the n tokens at `position` into the caches, then attends to what each token sees. `rope` is
    what `rope` below returns. Softmax is the online form (Milakov & Gimelshein 2018) over blocks of 16 positions, aligned to
    position 0, so chunking does not change a result.
    """
    heads, kv_heads, dim, value_dim = shape.heads, shape.kv_heads, shape.head_dim, shape.value_dim

    def body() -> None:
        n = i64(shape.rows) if shape.rows is not None else symbol()
        context, blocks = symbol(), symbol()
        qkv = tensor("qkv", (n, shape.qkv_width), "float32")
        norms: tuple[Buffer, Buffer] | None = None
        if shape.qk_norm != "none":
            scale = (1, 1) if shape.qk_norm == "head" else (heads, kv_heads)
            norms = (tensor("q_norm", (scale[0] * dim,), "float32"), tensor("k_norm", (scale[1] * dim,), "float32"))
        sinks = tensor("sinks", (heads,), "float32") if shape.sinks else None
        rope = tensor("rope", (n, shape.rotary), "float32")
        keys = tensor("k_cache", (kv_heads, blocks, dim, LANES), shape.kv_dtype)
        values = tensor("v_cache", (kv_heads, context, value_dim), shape.kv_dtype)
        position = scalar("position")
        out = tensor("out", (n, heads * value_dim), "float32")
        rotate = _Rotation(shape, qkv, norms, rope)

        with loop(n, parallel=shape.rows != 1) as row:
            place = let(position + row)
            block, lane = let(T.floordiv(place, i64(LANES))), let(T.floormod(place, i64(LANES)))
            with loop(kv_heads) as head:
                staged = local(dim)
                rotate.emit(staged, row, head, key=True)
                with loop(dim) as d:
                    T.buffer_store(keys, T.Cast(shape.kv_dtype, staged[d]), [head, block, d, lane])
                with loop(value_dim // LANES) as j:
                    at = let(j * i64(LANES))
                    source = let(i64((heads + kv_heads) * dim) + head * i64(value_dim) + at)
                    value = load(qkv, row, source, lanes=LANES)
                    store(values, T.Cast(f"{shape.kv_dtype}x{LANES}", value), head, place, at, lanes=LANES)

        def attend_all(parallel: bool) -> None:
            shared = shape.shared_heads
            with loop(n * i64(heads // shared), parallel=parallel) as item:
                row, first = let(T.floordiv(item, i64(heads // shared))), let(T.floormod(item, i64(heads // shared)) * i64(shared))
                queries = [local(dim) for _ in range(shared)]
                for offset, query in enumerate(queries):
                    rotate.emit(query, row, let(first + i64(offset)), key=False)
                _attend(shape, queries, out, keys, values, row, first, position, sinks)

        if shape.rows != 1:
            attend_all(parallel=True)
            return
        with T.If(position < i64(max(1, MIN_PARALLEL_SCORES // (heads * dim)))):
            with T.Then():
                attend_all(parallel=False)
            with T.Else():
                attend_all(parallel=True)

    return build(name, {}, body)


@dataclass(frozen=True)
class _Rotation:
    """Norm and rotary embedding of one head's query or key."""

    shape: AttentionShape
    qkv: Buffer
    norms: tuple[Buffer, Buffer] | None
    rope: Buffer

    def emit(self, out: Buffer, row: Expr, head: Expr, key: bool) -> None:
        """Writes head_dim elements to `out`: the rotated ones first, as in the head."""
        dim, half = self.shape.head_dim, self.shape.rotary // 2
        begin = self.shape.heads * dim if key else 0
        first = let(i64(begin) + head * i64(dim))
        inverse = self._inverse_rms(row, first, begin, key)

        def element(at: Expr) -> Expr:
            value = load(self.qkv, row, first + at, lanes=LANES)
            if self.norms is not None:
                offset = i64(0) if self.shape.qk_norm == "head" else head * i64(dim)
                value = value * splat(inverse, LANES) * load(self.norms[key], offset + at, lanes=LANES)
            return let(value)

        with loop(half // LANES) as j:
            at = let(j * i64(LANES))
            a, b = element(at), element(i64(half) + at)
            cos = let(load(self.rope, row, at, lanes=LANES))
            sin = let(load(self.rope, row, i64(half) + at, lanes=LANES))
            minus = splat(f32(0.0), LANES) - b
            store(out, fma(a, cos, minus * sin, LANES), at, lanes=LANES)
            store(out, fma(b, cos, a * sin, LANES), i64(half) + at, lanes=LANES)
        if self.shape.rotary < dim:
            with loop((dim - self.shape.rotary) // LANES) as j:
                at = let(i64(self.shape.rotary) + j * i64(LANES))
                store(out, element(at), at, lanes=LANES)

    def _inverse_rms(self, row: Expr, first: Expr, begin: int, key: bool) -> Expr | None:
        if self.norms is None:
            return None
        start, width = first, self.shape.head_dim
        if self.shape.qk_norm == "vector":
            start, width = i64(begin), (self.shape.kv_heads if key else self.shape.heads) * self.shape.head_dim
        acc = local(LANES)
        store(acc, splat(f32(0.0), LANES), i64(0), lanes=LANES)
        with loop(width // LANES) as j:
            v = let(load(self.qkv, row, start + j * i64(LANES), lanes=LANES))
            store(acc, fma(v, v, load(acc, i64(0), lanes=LANES), LANES), i64(0), lanes=LANES)
        mean = rounded(reduce_sum(load(acc, i64(0), lanes=LANES)) / f32(float(width)), 1)
        return let(f32(1.0) / T.sqrt(mean + f32(self.shape.eps)))


def latent_heads(name: str, rows: int | None, heads: int, rope: int, nope: int, value: int) -> tirx.PrimFunc:
    """(q fp32 [n, heads * (rope + nope)], k_rope fp32 [n, rope], kv fp32 [n, heads * (nope + value)], out fp32 [n, …]).

    Expands latent attention to plain heads, out = q | heads of (k_rope, nope part of the head) | values; `kv` holds the nope parts of
    all heads, then the values of all heads.
    """
    dim = rope + nope

    def body() -> None:
        n = i64(rows) if rows is not None else symbol()
        q = tensor("q", (n, heads * dim), "float32")
        k_rope = tensor("k_rope", (n, rope), "float32")
        kv = tensor("kv", (n, heads * (nope + value)), "float32")
        out = tensor("out", (n, heads * (2 * dim + value)), "float32")

        def copy(source: Buffer, row: Expr, start: Expr, target: Expr, width: int) -> None:
            with loop(width // LANES) as j:
                at = let(j * i64(LANES))
                store(out, load(source, row, start + at, lanes=LANES), row, target + at, lanes=LANES)

        with loop(n, parallel=rows != 1) as row:
            copy(q, row, i64(0), i64(0), heads * dim)
            with loop(heads) as head:
                target = let(i64(heads * dim) + head * i64(dim))
                copy(k_rope, row, i64(0), target, rope)
                copy(kv, row, head * i64(nope), target + i64(rope), nope)
            copy(kv, row, i64(heads * nope), i64(2 * heads * dim), heads * value)

    return build(name, {}, body)


def rope(name: str, rows: int | None, width: int, amplitude: float) -> tirx.PrimFunc:
    """(inverse frequencies fp32 [width / 2], position, out fp32 [n, width]): cosines, then sines, of n positions, times `amplitude`.

    Rotary position embedding, Su et al. 2021, in the half-split arrangement.
    """
    half = width // 2

    def body() -> None:
        n = i64(rows) if rows is not None else symbol()
        frequencies = tensor("inverse_frequencies", (half,), "float32")
        position = scalar("position")
        out = tensor("out", (n, width), "float32")
        with loop(n) as row, loop(half) as j:
            angle = let(T.Cast("float32", position + row) * frequencies[j])
            sine, cosine = sin_cos(angle, 1)
            T.buffer_store(out, cosine * f32(amplitude), [row, j])
            T.buffer_store(out, sine * f32(amplitude), [row, i64(half) + j])

    return build(name, {}, body)


def _attend(
    shape: AttentionShape,
    queries: list[Buffer],
    out: Buffer,
    keys: Buffer,
    values: Buffer,
    row: Expr,
    first: Expr,
    position: Expr,
    sinks: Buffer | None,
) -> None:
    """Writes the attention outputs of `queries`, heads from `first` on that read the same keys and values, to out[row]."""
    dim, value_dim, streams = shape.head_dim, shape.value_dim, shape.streams
    vector = f"float32x{LANES}"
    kv = let(T.floordiv(first, i64(shape.heads // shape.kv_heads)))
    last = let(position + row)
    heads = [_Head(shape, query) for query in queries]
    for offset, head in enumerate(heads):
        head.begin(sinks[first + i64(offset)] if sinks is not None else None)
    oldest = let(T.max(last - i64(shape.window - 1), i64(0))) if shape.window else i64(0)
    begin = let(T.floordiv(oldest, i64(LANES))) if shape.window else i64(0)
    with T.serial(i64(0), T.floordiv(last, i64(LANES)) + i64(1) - begin) as step:
        block = let(begin + step)
        for head in heads:
            for scores in head.partial:
                store(scores, splat(f32(0.0), LANES), i64(0), lanes=LANES)
        with loop(dim // streams) as group:
            for stream in range(streams):
                d = let(group * i64(streams) + i64(stream))
                key = let(T.Cast(vector, load(keys, kv, block, d, i64(0), lanes=LANES)))
                for head in heads:
                    scores = head.partial[stream]
                    store(scores, fma(splat(head.query[d], LANES), key, load(scores, i64(0), lanes=LANES), LANES), i64(0), lanes=LANES)
        here = T.Ramp(T.Cast("int32", block * i64(LANES)), tirx.IntImm("int32", 1), LANES)
        seen = here <= splat(T.Cast("int32", last), LANES)
        fades = [head.weigh(seen, (here, oldest) if shape.window else None) for head in heads]
        with loop(value_dim // LANES) as j:
            at = let(j * i64(LANES))
            totals = [let(load(head.acc, at, lanes=LANES) * splat(fade, LANES)) for head, fade in zip(heads, fades, strict=True)]
            for offset in range(LANES):
                value = let(T.Cast(vector, load(values, kv, block * i64(LANES) + i64(offset), at, lanes=LANES)))
                for number, head in enumerate(heads):
                    totals[number] = let(fma(splat(head.weights[i64(offset)], LANES), value, totals[number], LANES))
            for head, total in zip(heads, totals, strict=True):
                store(head.acc, total, at, lanes=LANES)
    for offset, head in enumerate(heads):
        head.finish(out, row, let((first + i64(offset)) * i64(value_dim)))


class _Head:
    """What the online softmax of one query keeps."""

    def __init__(self, shape: AttentionShape, query: Buffer) -> None:
        self.shape, self.query = shape, query
        self.acc, self.weights, self.sums, self.maximum = local(shape.value_dim), local(LANES), local(LANES), local(1)
        self.partial = [local(LANES) for _ in range(shape.streams)]

    def begin(self, sink: Expr | None) -> None:
        T.buffer_store(self.maximum, f32(NEGATIVE) if sink is None else sink, [i64(0)])
        store(self.sums, splat(f32(0.0), LANES), i64(0), lanes=LANES)
        if sink is not None:
            T.buffer_store(self.sums, f32(1.0), [i64(0)])
        with loop(self.shape.value_dim // LANES) as j:
            store(self.acc, splat(f32(0.0), LANES), j * i64(LANES), lanes=LANES)

    def weigh(self, seen: Expr, window: tuple[Expr, Expr] | None) -> Expr:
        """Turns scores into weights; returns by how much what was summed before fades."""
        pairs = [let(load(scores, i64(0), lanes=LANES)) for scores in self.partial]
        while len(pairs) > 1:
            pairs = [let(a + b) for a, b in zip(pairs[0::2], pairs[1::2], strict=True)]
        scaled = let(rounded(pairs[0] * splat(f32(self.shape.scale), LANES), LANES))
        masked = let(T.Select(seen, scaled, splat(f32(NEGATIVE), LANES)))
        if window is not None:
            here, oldest = window
            masked = let(T.Select(here >= splat(T.Cast("int32", oldest), LANES), masked, splat(f32(NEGATIVE), LANES)))
        old = let(self.maximum[i64(0)])
        peak = let(T.max(old, reduce_max(masked)))
        fade = exp(old - peak, 1)
        p = exp(masked - splat(peak, LANES), LANES)
        T.buffer_store(self.maximum, peak, [i64(0)])
        store(self.sums, fma(load(self.sums, i64(0), lanes=LANES), splat(fade, LANES), p, LANES), i64(0), lanes=LANES)
        store(self.weights, p, i64(0), lanes=LANES)
        return fade

    def finish(self, out: Buffer, row: Expr, start: Expr) -> None:
        whole = let(reduce_sum(load(self.sums, i64(0), lanes=LANES)))
        with loop(self.shape.value_dim // LANES) as j:
            at = let(j * i64(LANES))
            store(out, load(self.acc, at, lanes=LANES) / splat(whole, LANES), row, start + at, lanes=LANES)

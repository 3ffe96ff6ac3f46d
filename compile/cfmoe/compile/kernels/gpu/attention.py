"""Grouped-query attention on GPUs, over the CPU's KV layouts (kernels/attention.py): append, then attend.

Caches of fp16 are bound as 32-bit words of two halves, so that no device needs 16-bit storage.
"""

from __future__ import annotations

from collections.abc import Sequence

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from cfmoe.compile.kernels.attention import LANES, NEGATIVE, AttentionShape
from cfmoe.compile.kernels.builder import Buffer, Expr, f32
from cfmoe.compile.kernels.gpu.builder import (
    barrier,
    build,
    extern,
    halves,
    i32,
    lane,
    let,
    load,
    local,
    loop,
    parameters,
    shared,
    store,
    strided,
    threads,
    when,
)
from cfmoe.compile.kernels.gpu.profile import Profile
from cfmoe.compile.kernels.gpu.rope import Rotation
from cfmoe.compile.kernels.gpu.rowwise import row_scalars


def elements_per_word(shape: AttentionShape) -> int:
    return 2 if shape.kv_dtype == "float16" else 1


def cache_dtype(shape: AttentionShape) -> str:
    return "int32" if shape.kv_dtype == "float16" else "float32"


def unpack(shape: AttentionShape, word: Expr) -> list[Expr]:
    """The elements of a word of a cache."""
    if elements_per_word(shape) == 1:
        return [let("cached", word)]
    pair = let("cached", halves(word))
    return [lane(pair, 0), lane(pair, 1)]


def pack(shape: AttentionShape, values: Sequence[Expr]) -> Expr:
    return values[0] if len(values) == 1 else extern("int32", "pack_half2", *values)


def append(name: str, profile: Profile, shape: AttentionShape) -> tirx.PrimFunc:
    """(qkv fp32 [n, …], [k_norm fp32], rope fp32 [n, rotary], k, v caches; position, context, n).

    Writes keys and values of the n tokens at `position`. A workgroup writes the positions that share a word of K.
    """
    kv_heads, per, count = shape.kv_heads, elements_per_word(shape), profile.row_threads
    cache = cache_dtype(shape)
    normed = shape.qk_norm != "none"
    names = {"qkv": "float32", **({"k_norm": "float32"} if normed else {}), "rope": "float32", "k_cache": cache, "v_cache": cache}

    def body() -> None:
        params, (position, context, *rest) = parameters(["position", "context", *row_scalars(shape.rows)], **names)
        qkv, rope, keys, values = params[0], *params[-3:]
        n = i32(shape.rows) if shape.rows is not None else rest[0]
        rotation = Rotation(shape, qkv, params[1] if normed else None, rope, key=True)
        slots = n if per == 1 else (n >> i32(1)) + i32(1)
        with threads((kv_heads, slots), (count,)) as ((head, slot), (thread,)):
            memory = shared("memory", count) if normed else None
            first = let("first_place", (position & i32(-per)) + slot * i32(per))
            append_places(rotation, keys, values, position, context, n, head, first, memory, thread, count)

    return build(name, body)


def append_places(
    rotation: Rotation,
    keys: Buffer,
    values: Buffer,
    position: Expr,
    context: Expr,
    n: Expr,
    head: Expr,
    first: Expr,  # the first of the places that share a word of K
    memory: Buffer | None,  # a fp32 element per thread, where keys are normed
    thread: Expr,
    count: int,
) -> None:
    """Writes what the n rows at `position` have for these places of a head of keys and values."""
    shape, qkv = rotation.shape, rotation.qkv
    dim, value_dim, kv_heads, per = shape.head_dim, shape.value_dim, shape.kv_heads, elements_per_word(shape)
    rows, inverses, valid = [], [], []
    for i in range(per):
        row = let("place_row", first + i32(i) - position)
        valid.append(let("valid", T.And(row >= i32(0), row < n)))
        rows.append(let("row", T.max(T.min(row, n - i32(1)), i32(0))))
        inverses.append(rotation.inverse_rms(rows[i], head, memory, thread, count) if memory is not None else None)
    blocks = context >> i32(4)
    words = LANES // per
    key_at = let("key_at", (head * blocks + (first >> i32(4))) * i32(dim * words))
    key_at = let("key_at", key_at + ((first & i32(LANES - 1)) >> i32(per - 1)))
    with when(valid[0] if per == 1 else T.Or(*valid)):
        for place in strided("d", thread, count, dim):
            with place as d:
                target = let("target", key_at + d * i32(words))
                old = unpack(shape, load(keys, target))
                fresh = [rotation.element(rows[i], head, d, inverses[i]) for i in range(per)]
                store(keys, target, pack(shape, [T.Select(valid[i], fresh[i], old[i]) for i in range(per)]))
    offset = (shape.heads + kv_heads) * dim
    for i in range(per):
        with when(valid[i]):
            source = let("source", rows[i] * i32(shape.qkv_width) + i32(offset) + head * i32(value_dim))
            value_at = let("value_at", (head * context + first + i32(i)) * i32(value_dim // per))
            for place in strided("column", thread, count, value_dim // per):
                with place as column:
                    value = [load(qkv, source + column * i32(per) + i32(j)) for j in range(per)]
                    store(values, value_at + column, pack(shape, value))


def attend(name: str, profile: Profile, shape: AttentionShape) -> tirx.PrimFunc:
    """(qkv fp32 [n, …], [q_norm fp32], [sinks fp32 [heads]], rope fp32 [n, rotary], k, v caches, out fp32 [n, heads * value_dim];
    position, context, n).

    A workgroup attends with one head of a few rows: scores of as many positions as its threads hold, the online softmax
    (Milakov & Gimelshein 2018) over such passes, which start at a block of 16 positions, then the weighted values.
    """
    return build(name, _Attend(profile, shape).body)


class _Attend:
    def __init__(self, profile: Profile, shape: AttentionShape) -> None:
        self.shape = shape
        self.count = profile.attention_threads
        self.rows = profile.attention_rows
        self.per = elements_per_word(shape)
        self.span = self.count * self.per  # positions of a pass
        self.value_words = shape.value_dim // self.per
        self.groups = max(1, self.count // self.value_words)  # threads that share a word of the output
        self.columns = -(-self.value_words // self.count)

    def body(self) -> None:
        s = self.shape
        cache = cache_dtype(s)
        normed = s.qk_norm != "none"
        names = {"qkv": "float32", **({"q_norm": "float32"} if normed else {}), **({"sinks": "float32"} if s.sinks else {})}
        names |= {"rope": "float32", "k_cache": cache, "v_cache": cache, "out": "float32"}
        params, (position, self.context, *rest) = parameters(["position", "context", *row_scalars(s.rows)], **names)
        self.params = dict(zip(names, params, strict=True))
        n = i32(s.rows) if s.rows is not None else rest[0]
        parts = n if self.rows == 1 else T.truncdiv(n + i32(self.rows - 1), i32(self.rows))
        with threads((s.heads, parts), (self.count,)) as ((head, part), (thread,)):
            self.head, self.thread = head, thread
            self.kv = let("kv_head", T.truncdiv(head, i32(s.heads // s.kv_heads)))
            self.row = [let("row", part * i32(self.rows) + i32(r)) for r in range(self.rows)]
            read = [let("read_row", T.min(row, n - i32(1))) for row in self.row] if self.rows > 1 else self.row
            self.last = [let("last", position + row) for row in read]
            self.oldest = [let("oldest", T.max(last - i32(s.window - 1), i32(0))) for last in self.last] if s.window else None
            self._queries(read)
            begin = let("begin", self.oldest[0] & i32(-LANES)) if self.oldest is not None else i32(0)
            end = let("end", self.last[-1] + i32(1))
            with loop("pass", T.truncdiv(end - begin + i32(self.span - 1), i32(self.span))) as step:
                base = let("base", begin + step * i32(self.span))
                self._scores(base, end)
                self._softmax()
                self._values(base, end)
            self._write(n)

    def _queries(self, read: Sequence[Expr]) -> None:
        s = self.shape
        self.memory = shared("memory", self.count)
        self.query = shared("query", self.rows * s.head_dim)
        self.score = shared("score", max(self.rows * self.span, self.rows * self.groups * s.value_dim))
        self.peak, self.total, self.fade = (shared(name, self.rows) for name in ("peak", "total", "fade"))
        self.acc = local("acc", self.rows * self.columns * self.per)
        rotation = Rotation(s, self.params["qkv"], self.params.get("q_norm"), self.params["rope"], key=False)
        for r, row in enumerate(read):
            inverse = rotation.inverse_rms(row, self.head, self.memory, self.thread, self.count)
            for place in strided("d", self.thread, self.count, s.head_dim):
                with place as d:
                    store(self.query, d * i32(self.rows) + i32(r), rotation.element(row, self.head, d, inverse))
        with when(self.thread < i32(self.rows)):
            store(self.peak, self.thread, load(self.params["sinks"], self.head) if s.sinks else f32(NEGATIVE))
            store(self.total, self.thread, f32(1.0 if s.sinks else 0.0))
        for i in range(self.rows * self.columns * self.per):
            store(self.acc, i, f32(0.0))
        barrier()

    def _scores(self, base: Expr, end: Expr) -> None:
        """score[row, place] of the pass's positions, NEGATIVE where the row does not see one."""
        s, words = self.shape, LANES // self.per
        sums = local("sums", self.rows * self.per)
        for i in range(self.rows * self.per):
            store(sums, i, f32(0.0))
        place = let("place", self.thread * i32(self.per))
        here = let("here", base + place)
        with when(here < end):
            block = self.kv * (self.context >> i32(4)) + (here >> i32(4))
            at = let("key_at", block * i32(s.head_dim * words) + (self.thread & i32(words - 1)))
            unroll = 8
            with loop("d", s.head_dim // unroll) as step:
                cached = [load(self.params["k_cache"], at + (step * i32(unroll) + i32(u)) * i32(words)) for u in range(unroll)]
                cached = [let("key_word", word) for word in cached]
                for u, word in enumerate(cached):
                    keys = unpack(s, word)
                    for r in range(self.rows):
                        q = let("q", load(self.query, (step * i32(unroll) + i32(u)) * i32(self.rows) + i32(r)))
                        for i, key in enumerate(keys):
                            store(sums, r * self.per + i, load(sums, r * self.per + i) + q * key)
        for r in range(self.rows):
            for i in range(self.per):
                seen = here + i32(i) <= self.last[r]
                if self.oldest is not None:
                    seen = T.And(seen, here + i32(i) >= self.oldest[r])
                value = T.Select(seen, load(sums, r * self.per + i) * f32(s.scale), f32(NEGATIVE))
                store(self.score, i32(r * self.span + i) + place, value)
        barrier()

    def _softmax(self) -> None:
        """Turns scores into weights; peak, total and fade of every row follow. As many threads a row as there are."""
        team = self.count // self.rows
        row = let("team", T.truncdiv(self.thread, i32(team))) if self.rows > 1 else i32(0)
        member = let("member", self.thread - row * i32(team))
        first = let("first_score", row * i32(self.span) + member)
        count = self.span // team

        def tree(combine: str) -> None:
            half = team // 2
            barrier()
            while half:
                with when(member < i32(half)):
                    a, b = load(self.memory, self.thread), load(self.memory, self.thread + i32(half))
                    store(self.memory, self.thread, T.max(a, b) if combine == "max" else a + b)
                barrier()
                half //= 2

        partial = local("partial", 1)
        store(partial, 0, f32(NEGATIVE))
        with loop("at", count) as at:
            store(partial, 0, T.max(load(partial, 0), load(self.score, first + at * i32(team))))
        store(self.memory, self.thread, load(partial, 0))
        tree("max")
        old = let("old", load(self.peak, row))
        peak = let("new_peak", T.max(old, load(self.memory, row * i32(team))))
        store(partial, 0, f32(0.0))
        with loop("at", count) as at:
            place = let("score_at", first + at * i32(team))
            score = let("value", load(self.score, place))
            # A row that sees nothing of this pass has no peak yet.
            weight = let("weight", T.Select(score > f32(NEGATIVE / 2), T.exp(score - peak), f32(0.0)))
            store(self.score, place, weight)
            store(partial, 0, load(partial, 0) + weight)
        barrier()
        store(self.memory, self.thread, load(partial, 0))
        tree("sum")
        with when(member == i32(0)):
            fade = let("new_fade", T.exp(old - peak))
            store(self.fade, row, fade)
            store(self.peak, row, peak)
            store(self.total, row, load(self.total, row) * fade + load(self.memory, self.thread))
        barrier()

    def _group(self) -> tuple[Expr, Expr]:
        """(group, first word) of a thread."""
        if self.columns > 1 or self.groups == 1:
            return i32(0), self.thread
        group = let("group", T.truncdiv(self.thread, i32(self.value_words)))
        return group, let("word", self.thread - group * i32(self.value_words))

    def _owned(self, group: Expr, word: Expr, column: int) -> Expr | None:
        """Whether the thread has a word `column`; None: always."""
        if self.columns > 1 or self.groups == 1:
            at = column * self.count
            return None if at + self.count <= self.value_words else word < i32(self.value_words - at)
        return None if self.groups * self.value_words == self.count else group < i32(self.groups)

    def _values(self, base: Expr, end: Expr) -> None:
        group, word = self._group()
        fades = [let("row_fade", load(self.fade, r)) for r in range(self.rows)]
        for r in range(self.rows):
            for i in range(self.columns * self.per):
                at = r * self.columns * self.per + i
                store(self.acc, at, load(self.acc, at) * fades[r])
        here = let("here", T.min(end - base, i32(self.span)))
        steps = let("steps", T.truncdiv(here - group + i32(self.groups - 1), i32(self.groups)))
        start = let("value_at", (self.kv * self.context + base) * i32(self.value_words) + word)
        for column in range(self.columns):
            with when(self._owned(group, word, column)), loop("step", steps) as step:
                place = let("place", group + step * i32(self.groups))
                cached = load(self.params["v_cache"], start + place * i32(self.value_words) + i32(column * self.count))
                values = unpack(self.shape, cached)
                for r in range(self.rows):
                    weight = let("weight", load(self.score, i32(r * self.span) + place))
                    for i, value in enumerate(values):
                        at = (r * self.columns + column) * self.per + i
                        store(self.acc, at, load(self.acc, at) + weight * value)
        barrier()

    def _write(self, n: Expr) -> None:
        s = self.shape
        group, word = self._group()
        for column in range(self.columns):
            with when(self._owned(group, word, column)):
                for r in range(self.rows):
                    for i in range(self.per):
                        place = (group * i32(self.rows) + i32(r)) * i32(s.value_dim) + (word + i32(column * self.count)) * i32(self.per)
                        store(self.score, place + i32(i), load(self.acc, (r * self.columns + column) * self.per + i))
        barrier()
        for r in range(self.rows):
            with when(self.row[r] < n if self.rows > 1 else None):
                for place in strided("out_at", self.thread, self.count, s.value_dim):
                    with place as at:
                        total = load(self.score, i32(r * s.value_dim) + at)
                        for g in range(1, self.groups):
                            total = total + load(self.score, i32((g * self.rows + r) * s.value_dim) + at)
                        target = self.row[r] * i32(s.heads * s.value_dim) + self.head * i32(s.value_dim) + at
                        store(self.params["out"], target, total / load(self.total, r))

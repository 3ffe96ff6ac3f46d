"""Attention of one token on GPUs: parts of the positions by themselves, then what they sum to.

A head of one row would keep a single workgroup busy; cut into parts it fills the device at any length (flash-decoding, Dao et al. 2023).
How positions are cut follows from their number alone. The token's own key and value come from its projections, so that no kernel waits for
the caches: `merge` writes them.
"""

from __future__ import annotations

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from cfmoe.compile.kernels.attention import LANES, NEGATIVE, AttentionShape
from cfmoe.compile.kernels.builder import GROUP, Buffer, Expr, f32
from cfmoe.compile.kernels.gpu.attention import append_places, cache_dtype, elements_per_word, pack, unpack
from cfmoe.compile.kernels.gpu.builder import (
    barrier,
    build,
    i32,
    kept,
    lane,
    let,
    load,
    local,
    loop,
    parameters,
    reduce_workgroup,
    shared,
    store,
    strided,
    threads,
    when,
)
from cfmoe.compile.kernels.gpu.profile import Profile
from cfmoe.compile.kernels.gpu.rope import Rotation
from cfmoe.compile.kernels.gpu.rowwise import quantise_words

_WIDE = 32  # words of K, of one position each or two, that a pass covers
_AT_ONCE = 8  # loads that a thread has under way
_STATS = 2  # behind a part's values: its largest score, its sum of weights


def parts_size(shape: AttentionShape, splits: int) -> int:
    """Elements of what `parts` writes."""
    return shape.heads * splits * (shape.value_dim + _STATS)


class _Cut:
    """Which positions each of `splits` parts has: whole passes, as few as do."""

    def __init__(self, shape: AttentionShape, splits: int, position: Expr) -> None:
        self.positions = _WIDE * elements_per_word(shape)  # of a pass
        self.oldest = let("oldest", T.max(position - i32(shape.window - 1), i32(0))) if shape.window else i32(0)
        self.begin = let("first_seen", self.oldest & i32(-LANES)) if shape.window else i32(0)
        self.end = let("end", position + i32(1))
        length = self.end - self.begin
        whole = self.positions * splits
        self.part = let("part_size", T.truncdiv(length + i32(whole - 1), i32(whole)) * i32(self.positions))
        self.count = let("part_count", T.truncdiv(length + self.part - i32(1), self.part))


def parts(name: str, profile: Profile, shape: AttentionShape, splits: int) -> tirx.PrimFunc:
    """(qkv fp32 [1, …], [q_norm, k_norm fp32], rope fp32 [1, rotary], k, v caches, out fp32 [parts_size]; position, context).

    For every head and part: the values weighted by exp(score - largest score), then that score and the sum of the weights.
    """
    return build(name, _Parts(profile, shape, splits).body)


class _Parts:
    def __init__(self, profile: Profile, shape: AttentionShape, splits: int) -> None:
        self.shape, self.splits = shape, splits
        self.count = profile.attention_threads
        self.teams = self.count // _WIDE  # threads that share a word of K, each with some of its dimensions
        self.per = elements_per_word(shape)
        self.value_words = shape.value_dim // self.per
        self.groups = max(1, self.count // self.value_words)  # threads that share a word of the output
        self.columns = -(-self.value_words // self.count)

    def body(self) -> None:
        s, cache = self.shape, cache_dtype(self.shape)
        normed = s.qk_norm != "none"
        names = {"qkv": "float32", **({"q_norm": "float32", "k_norm": "float32"} if normed else {}), "rope": "float32"}
        names |= {"k_cache": cache, "v_cache": cache, "out": "float32"}
        params, (self.position, self.context) = parameters(["position", "context"], **names)
        self.params = dict(zip(names, params, strict=True))
        with threads((s.heads, self.splits), (_WIDE, self.teams)) as ((head, split), (x, y)):
            self.head, self.x, self.y = head, x, y
            self.thread = let("thread_number", y * i32(_WIDE) + x)
            self.kv = let("kv_head", T.truncdiv(head, i32(s.heads // s.kv_heads)))
            self.cut = cut = _Cut(s, self.splits, self.position)
            self._memory()
            begin = let("begin", cut.begin + split * cut.part)
            end = let("part_end", T.min(begin + cut.part, cut.end))
            with when(begin < cut.end):
                self._queries()
                with loop("pass", T.truncdiv(end - begin + i32(cut.positions - 1), i32(cut.positions))) as step:
                    base = let("base", begin + step * i32(cut.positions))
                    self._scores(base, end)
                    self._values(base, end)
                self._write(head * i32(self.splits) + split)

    def _memory(self) -> None:
        """OpenCL C has shared memory declared outside of any condition."""
        s, positions = self.shape, self.cut.positions
        self.memory = shared("memory", self.count)
        self.query, self.key = shared("query", s.head_dim), shared("own_key", s.head_dim)
        self.partial = shared("partial", self.teams * positions)
        self.weight = shared("weight", positions)
        self.sums = shared("sums", self.groups * s.value_dim)
        self.totals = shared("totals", self.groups)
        self.acc = local("acc", self.columns * self.per)
        self.peak, self.total, self.fade, self.score = (local(n, 1) for n in ("peak", "total", "fade", "score"))

    def _queries(self) -> None:
        s, p = self.shape, self.params
        rotations = (
            (Rotation(s, p["qkv"], p.get("q_norm"), p["rope"], key=False), self.head, self.query),
            (Rotation(s, p["qkv"], p.get("k_norm"), p["rope"], key=True), self.kv, self.key),
        )
        for rotation, head, memory in rotations:
            inverse = rotation.inverse_rms(i32(0), head, self.memory, self.thread, self.count)
            for place in strided("d", self.thread, self.count, s.head_dim):
                with place as d:
                    element = rotation.element(i32(0), head, d, inverse)
                    # As the cache will hold it.
                    store(memory, d, unpack(s, pack(s, [element] * self.per))[0] if rotation.key else element)
        store(self.peak, 0, f32(NEGATIVE))
        store(self.total, 0, f32(0.0))
        for i in range(self.columns * self.per):
            store(self.acc, i, f32(0.0))
        barrier()

    def _scores(self, base: Expr, end: Expr) -> None:
        """Weights of the pass's positions; peak and fade follow."""
        s, words, positions = self.shape, LANES // self.per, self.cut.positions
        sums = local("dots", self.per)
        for i in range(self.per):
            store(sums, i, f32(0.0))
        here = let("here", base + self.x * i32(self.per))
        own = [let("own", here + i32(i) == self.position) for i in range(self.per)]
        with when(here < end):
            block = self.kv * (self.context >> i32(4)) + (here >> i32(4))
            at = let("key_at", block * i32(s.head_dim * words) + (self.x & i32(words - 1)))
            depth = s.head_dim // self.teams
            for first in range(0, depth, _AT_ONCE):
                dims = [let("d", self.y + i32(u * self.teams)) for u in range(first, min(depth, first + _AT_ONCE))]
                cached = [let("key_word", load(self.params["k_cache"], at + d * i32(words))) for d in dims]
                for d, word in zip(dims, cached, strict=True):
                    query, key = let("q", load(self.query, d)), let("k", load(self.key, d))
                    for i, value in enumerate(unpack(s, word)):
                        store(sums, i, load(sums, i) + query * T.Select(own[i], key, value))
        for i in range(self.per):
            store(self.partial, self.y * i32(positions) + self.x * i32(self.per) + i32(i), load(sums, i))
        barrier()
        store(self.score, 0, f32(NEGATIVE))
        first_threads = None if positions == self.count else self.thread < i32(positions)
        with when(first_threads):
            total = load(self.partial, self.thread)
            for t in range(1, self.teams):
                total = total + load(self.partial, self.thread + i32(t * positions))
            place = let("place", base + self.thread)
            seen = place < end if not s.window else T.And(place < end, place >= self.cut.oldest)
            store(self.score, 0, T.Select(seen, total * f32(s.scale), f32(NEGATIVE)))
        largest = reduce_workgroup(self.memory, self.thread, self.count, load(self.score, 0), T.max)
        old = let("old", load(self.peak, 0))
        peak = kept("new_peak", T.max(old, largest))
        store(self.fade, 0, T.exp(old - peak))
        store(self.peak, 0, peak)
        with when(first_threads):
            score = load(self.score, 0)
            store(self.weight, self.thread, T.Select(score > f32(NEGATIVE / 2), T.exp(score - peak), f32(0.0)))
        barrier()

    def _owned(self, word: Expr, column: int, group: Expr) -> Expr | None:
        """Whether the thread has a word `column`; None: always."""
        if self.groups > 1:
            return None if self.groups * self.value_words == self.count else group < i32(self.groups)
        at = column * self.count
        return None if at + self.count <= self.value_words else word < i32(self.value_words - at)

    def _group(self) -> tuple[Expr, Expr]:
        """(group, first word) of a thread."""
        if self.groups == 1:
            return i32(0), self.thread
        group = let("group", T.truncdiv(self.thread, i32(self.value_words)))
        return group, let("word", self.thread - group * i32(self.value_words))

    def _values(self, base: Expr, end: Expr) -> None:
        s = self.shape
        group, word = self._group()
        fade = let("pass_fade", load(self.fade, 0))
        store(self.total, 0, load(self.total, 0) * fade)
        for i in range(self.columns * self.per):
            store(self.acc, i, load(self.acc, i) * fade)
        here = let("seen_here", T.min(end - base, i32(self.cut.positions)))
        chunk = self.groups * _AT_ONCE
        start = let("value_at", (self.kv * self.context + base) * i32(self.value_words) + word)
        source = let("own_value", i32((s.heads + s.kv_heads) * s.head_dim) + self.kv * i32(s.value_dim))
        for column in range(self.columns):
            with when(self._owned(word, column, group)):
                at = let("column_at", (word + i32(column * self.count)) * i32(self.per))
                own = [load(self.params["qkv"], source + at + i32(i)) for i in range(self.per)]
                own_word = kept("own_word", pack(s, own))
                with loop("chunk", T.truncdiv(here + i32(chunk - 1), i32(chunk))) as step:
                    places = [let("place", group + step * i32(chunk) + i32(u * self.groups)) for u in range(_AT_ONCE)]
                    safe = [let("safe", T.min(place, here - i32(1))) for place in places]
                    offset = i32(column * self.count)
                    cached = [let("value_word", load(self.params["v_cache"], start + p * i32(self.value_words) + offset)) for p in safe]
                    for place, p, value_word in zip(places, safe, cached, strict=True):
                        weight = kept("seen_weight", T.Select(place < here, load(self.weight, p), f32(0.0)))
                        if column == 0:
                            store(self.total, 0, load(self.total, 0) + weight)
                        values = unpack(s, kept("seen_word", T.Select(base + p == self.position, own_word, value_word)))
                        for i, value in enumerate(values):
                            store(self.acc, column * self.per + i, load(self.acc, column * self.per + i) + weight * value)
        barrier()

    def _write(self, part: Expr) -> None:
        s = self.shape
        group, word = self._group()
        for column in range(self.columns):
            with when(self._owned(word, column, group)):
                for i in range(self.per):
                    place = group * i32(s.value_dim) + (word + i32(column * self.count)) * i32(self.per) + i32(i)
                    store(self.sums, place, load(self.acc, column * self.per + i))
        owned = self._owned(word, 0, group)
        with when(word == i32(0) if owned is None else T.And(owned, word == i32(0))):
            store(self.totals, group, load(self.total, 0))
        barrier()
        out = self.params["out"]
        for place in strided("out_at", self.thread, self.count, s.value_dim):
            with place as at:
                total = load(self.sums, at)
                for g in range(1, self.groups):
                    total = total + load(self.sums, i32(g * s.value_dim) + at)
                store(out, part * i32(s.value_dim) + at, total)
        with when(self.thread == i32(0)):
            total = load(self.totals, 0)
            for g in range(1, self.groups):
                total = total + load(self.totals, g)
            stats = let("stats", i32(s.heads * self.splits * s.value_dim) + part * i32(_STATS))
            store(out, stats, load(self.peak, 0))
            store(out, stats + i32(1), total)


def merge(name: str, profile: Profile, shape: AttentionShape, splits: int, quantised: bool) -> tirx.PrimFunc:
    """(parts fp32, [sinks fp32 [heads]], qkv fp32 [1, …], [k_norm fp32], rope fp32 [1, rotary], k, v caches, out; position, context).

    The row's attention, fp32 [1, heads * value_dim] or that quantised, and its key and value in the caches.
    """
    s, per, count = shape, elements_per_word(shape), profile.row_threads
    width, normed, cache = s.heads * s.value_dim, s.qk_norm != "none", cache_dtype(shape)
    chunk = 4 * count
    chunks = -(-width // chunk)
    names = {"parts": "float32", **({"sinks": "float32"} if s.sinks else {}), "qkv": "float32"}
    names |= {**({"k_norm": "float32"} if normed else {}), "rope": "float32", "k_cache": cache, "v_cache": cache}
    names["out"] = "int32" if quantised else "float32"

    def body() -> None:
        buffers, (position, context) = parameters(["position", "context"], **names)
        p = dict(zip(names, buffers, strict=True))
        with threads((chunks + s.kv_heads,), (count,)) as ((number,), (thread,)):
            cut = _Cut(s, splits, position)
            memory = shared("memory", count)
            sums = shared("sum_of", count, "int32") if quantised else None
            with when(number < i32(chunks)):
                at = let("at", number * i32(chunk) + thread * i32(4))
                valid = at < i32(width) if width % chunk else None
                values = _merged(s, splits, cut, p, let("safe", T.min(at, i32(width - 4))))
                if sums is not None:
                    quantise_words(p["out"], let("group", (at >> i32(5)) * i32(10)), memory, sums, thread, values, valid)
                else:
                    with when(valid):
                        for i, value in enumerate(values):
                            store(p["out"], at + i32(i), value)
            with when(number >= i32(chunks)):
                rotation = Rotation(s, p["qkv"], p.get("k_norm"), p["rope"], key=True)
                head = let("kv_head", number - i32(chunks))
                first = let("first_place", position & i32(-per))
                append_places(rotation, p["k_cache"], p["v_cache"], position, context, i32(1), head, first, memory, thread, count)

    return build(name, body)


def _merged(s: AttentionShape, splits: int, cut: _Cut, p: dict[str, Buffer], at: Expr) -> list[Expr]:
    """Four elements of the row from `at` on, a multiple of four."""
    parts_of = p["parts"]
    head = let("head", T.truncdiv(at, i32(s.value_dim)))
    first = let("first_part", head * i32(splits))
    stats = let("stats", i32(s.heads * splits * s.value_dim) + first * i32(_STATS))
    peak, total, acc = local("peak", 1), local("total", 1), local("acc", 4)
    store(peak, 0, load(p["sinks"], head) if s.sinks else f32(NEGATIVE))
    with loop("part", cut.count) as part:
        store(peak, 0, T.max(load(peak, 0), load(parts_of, stats + part * i32(_STATS))))
    largest = let("largest_score", load(peak, 0))
    store(total, 0, T.exp(load(p["sinks"], head) - largest) if s.sinks else f32(0.0))
    for i in range(4):
        store(acc, i, f32(0.0))
    with loop("part", cut.count) as part:
        pair = let("pair", load(parts_of, stats + part * i32(_STATS), 2))
        vector = let("values", load(parts_of, (first + part) * i32(s.value_dim) + at - head * i32(s.value_dim), 4))
        weight = kept("part_weight", T.exp(lane(pair, 0) - largest))
        store(total, 0, load(total, 0) + weight * lane(pair, 1))
        for i in range(4):
            store(acc, i, load(acc, i) + weight * lane(vector, i))
    return [kept("merged", load(acc, i) / load(total, 0)) for i in range(4)]


def checked_width(shape: AttentionShape) -> int:
    """The row's width. A thread of `merge` writes four elements of one head, which is quantised in whole groups."""
    assert shape.value_dim % 4 == 0 and shape.heads * shape.value_dim % GROUP == 0
    return shape.heads * shape.value_dim

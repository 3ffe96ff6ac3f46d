"""The kernels whose unit is one expert, on GPUs: every ready expert of a slab in one dispatch.

`work` holds four words per expert: the word at which its record starts, the first of its rows in the row lists, their number, and its first
row in `scratch`. Decode kernels are for one row per expert; those of prefill gather up to `max_count`.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from cfmoe.compile.kernels.builder import GROUP, TILE, Buffer, Expr, f32
from cfmoe.compile.kernels.expert import ExpertShape, record_sections, scratch_width
from cfmoe.compile.kernels.gpu.builder import (
    barrier,
    build,
    dot4,
    float_to_bits,
    i32,
    kept,
    let,
    load,
    local,
    loop,
    parameters,
    rint,
    shared,
    sigmoid,
    silu,
    store,
    threads,
    when,
)
from cfmoe.compile.kernels.gpu.matrix import GEMM_ROWS, GEMM_THREADS, QUAD, Gemm, Gemv, bias_at, bias_words, slab_dtype
from cfmoe.compile.kernels.gpu.profile import Profile
from cfmoe.compile.kernels.matmul import FORMATS, Format, packed_size

SCALARS = ["first_entry", "entries", "max_count"]
_ENTRY = 4


def _words(fmt: Format, inputs: int, outputs: int) -> int:
    """32-bit words of a packed matrix."""
    return packed_size(fmt, inputs, outputs) // fmt.words * fmt.words32


def _activated(shape: ExpertShape, gate: Expr, up: Expr) -> Expr:
    gate, up = let("gate", gate), let("up", up)
    if shape.swiglu is None:
        return silu(gate) * up
    limit = f32(shape.swiglu.limit)
    gate = let("gate", T.min(gate, limit))
    up = let("up", T.max(T.min(up, limit), f32(-shape.swiglu.limit)))
    return (up + f32(1.0)) * (gate * sigmoid(gate * f32(shape.swiglu.alpha)))


class _Work:
    """One entry of the work list."""

    def __init__(self, work: Buffer, first_entry: Expr, number: Expr) -> None:
        at = let("entry", (first_entry + number) * i32(_ENTRY))
        self.record = let("record", load(work, at))
        self.list_begin = let("list_begin", load(work, at + i32(1)))
        self.count = let("count", load(work, at + i32(2)))
        self.scratch = let("scratch_begin", load(work, at + i32(3)))


def gate_up(name: str, profile: Profile, shape: ExpertShape, decode: bool) -> tirx.PrimFunc:
    """(activation [n, …], rows_in int32, slab, scratch, work; first_entry, entries, max_count): what `down` reads."""
    fmt = FORMATS[shape.format]
    hidden, ffn = shape.hidden, shape.ffn
    width = scratch_width(shape.format, ffn)
    tiles, blocks = ffn // TILE, hidden // GROUP
    names = {
        "activation": fmt.activation_dtype,
        "rows_in": "int32",
        "slab": slab_dtype(fmt),
        "scratch": fmt.activation_dtype,
        "work": "int32",
    }

    def biased(slab: Buffer, work: _Work, tile: Expr, column: Expr, gate: Expr, up: Expr) -> tuple[Expr, Expr]:
        if not shape.bias:
            return gate, up
        base = work.record + i32(2 * _words(fmt, hidden, ffn))
        at = let("bias", tile * i32(2 * TILE) + column)
        return gate + bias_at(fmt, slab, base, at), up + bias_at(fmt, slab, base, at + i32(TILE))

    def row(activation_row: Expr) -> Expr:
        return activation_row * i32(fmt.activation_width(hidden))

    def decode_body() -> None:
        (activation, rows_in, slab, scratch, work), (first, entries, _) = parameters(SCALARS, **names)
        product = Gemv(profile, fmt, hidden, tiles, streams=2)
        with threads((tiles, entries), product.threads) as ((tile, number), (x, y)):
            entry = _Work(work, first, number)
            base = let("base", entry.record + tile * i32(2 * blocks * fmt.words32))
            start = let("row_start", row(load(rows_in, entry.list_begin)))
            tail = _RowQuantiser() if fmt.quantised else None
            gate, up = product.emit(slab, base, activation, start, x, y)
            gate, up = biased(slab, entry, tile, x, gate, up)
            value = _activated(shape, gate, up)
            if tail is not None:
                tail.emit(value, scratch, let("group", entry.scratch * i32(width) + tile * i32(10)), x, y)
            else:
                with when(y == i32(0)):
                    store(scratch, entry.scratch * i32(width) + tile * i32(TILE) + x, value)

    def prefill_body() -> None:
        (activation, rows_in, slab, scratch, work), (first, entries, most) = parameters(SCALARS, **names)
        product = Gemm(fmt, hidden, streams=2)
        with threads((tiles, entries, (most + i32(GEMM_ROWS - 1)) >> i32(5)), GEMM_THREADS) as ((tile, number, part), (x, y)):
            entry = _Work(work, first, number)
            memory = product.memory()
            values = shared("activated", GEMM_ROWS * (TILE + 1)) if fmt.quantised else None
            with when(part * i32(GEMM_ROWS) < entry.count):
                base = let("base", entry.record + tile * i32(2 * blocks * fmt.words32))
                gates, ups = product.emit(memory, slab, base, activation, _gather(entry, part, rows_in, row), x, y)
                for r in range(QUAD):
                    place = let("place", part * i32(GEMM_ROWS) + y * i32(QUAD) + i32(r))
                    target = let("target", (entry.scratch + place) * i32(width) + tile * i32(TILE))
                    for o in range(QUAD):
                        column = let("column", x * i32(QUAD) + i32(o))
                        at = QUAD * r + o
                        gate, up = biased(slab, entry, tile, column, load(gates, at), load(ups, at))
                        value = let("value", _activated(shape, gate, up))
                        if values is not None:
                            store(values, (y * i32(QUAD) + i32(r)) * i32(TILE + 1) + column, value)
                        else:
                            with when(place < entry.count):
                                store(scratch, target + column, value)
                if values is not None:
                    barrier()
                    thread = let("quantised_row", y * i32(GEMM_THREADS[0]) + x)
                    place = let("place", part * i32(GEMM_ROWS) + thread)
                    with when(T.And(thread < i32(GEMM_ROWS), place < entry.count)):
                        group = let("group", (entry.scratch + place) * i32(width) + tile * i32(10))
                        _quantise_rows(values, scratch, group, thread)

    return build(name, decode_body if decode else prefill_body)


def _gather(entry: _Work, part: Expr, rows: Buffer | None, element: Callable[[Expr], Expr]) -> Callable[[Expr], Expr]:
    """Where a row of a workgroup starts; rows beyond the last repeat it. Without `rows` they are the expert's own of scratch."""

    def start(row: Expr) -> Expr:
        place = let("gathered", T.min(part * i32(GEMM_ROWS) + row, entry.count - i32(1)))
        return element(entry.scratch + place if rows is None else load(rows, entry.list_begin + place))

    return start


def _largest(values: Buffer, first: Expr) -> Expr:
    largest = T.fabs(load(values, first))
    for k in range(1, GROUP):
        largest = T.max(largest, T.fabs(load(values, first + i32(k))))
    return kept("largest", largest)


def _inverse(largest: Expr) -> Expr:
    return kept("inverse", T.Select(largest > f32(0.0), f32(127.0) / largest, f32(0.0)))


def _code(values: Buffer, at: Expr, inverse: Expr) -> Expr:
    return T.Cast("int32", rint(load(values, at) * inverse))


class _RowQuantiser:
    """Quantises the 32 values that the threads with y = 0 hold. All threads of the workgroup call `emit`."""

    def __init__(self) -> None:
        self.values, self.words = shared("activated", TILE), shared("code_words", TILE // 4, "int32")

    def emit(self, value: Expr, out: Buffer, group: Expr, x: Expr, y: Expr) -> None:
        first = y == i32(0)
        with when(first):
            store(self.values, x, value)
        barrier()
        with when(T.And(first, x < i32(TILE // 4))):
            sizes = [T.fabs(load(self.values, i32(k))) for k in range(TILE)]
            while len(sizes) > 1:
                sizes = [let("larger", T.max(a, b)) for a, b in zip(sizes[::2], sizes[1::2], strict=True)]
            largest = kept("largest", sizes[0])
            inverse = _inverse(largest)
            packed = i32(0)
            for place in range(4):
                packed = packed | ((_code(self.values, x * i32(4) + i32(place), inverse) & i32(255)) << i32(8 * place))
            word = kept("word", packed)
            store(self.words, x, word)
            store(out, group + x, word)
            with when(x == i32(0)):
                store(out, group + i32(8), float_to_bits(largest / f32(127.0)))
        barrier()
        with when(T.And(first, x == i32(0))):
            total = i32(0)
            for k in range(TILE // 4):
                total = total + dot4(load(self.words, i32(k)), i32(0x01010101))
            store(out, group + i32(9), total)


def _quantise_rows(values: Buffer, out: Buffer, group: Expr, row: Expr) -> None:
    """One thread, one row."""
    first = let("row_at", row * i32(TILE + 1))
    largest = _largest(values, first)
    inverse = _inverse(largest)
    total = local("code_sum", 1, "int32")
    store(total, 0, i32(0))
    with loop("word", GROUP // 4) as word:
        codes = [let("code", _code(values, first + word * i32(4) + i32(p), inverse)) for p in range(4)]
        packed = codes[0] & i32(255)
        for place in range(1, 4):
            packed = packed | ((codes[place] & i32(255)) << i32(8 * place))
        store(out, group + word, packed)
        store(total, 0, load(total, 0) + (codes[0] + codes[1] + codes[2] + codes[3]))
    store(out, group + i32(8), float_to_bits(largest / f32(127.0)))
    store(out, group + i32(9), load(total, 0))


def down(name: str, profile: Profile, shape: ExpertShape, decode: bool) -> tirx.PrimFunc:
    """(scratch [m, …], rows_out int32, slab, out fp32 [n * top_k, hidden], work; first_entry, entries, max_count).

    out[rows_out[i]] = scratch[i] @ down.
    """
    fmt = FORMATS[shape.format]
    hidden, ffn = shape.hidden, shape.ffn
    width = scratch_width(shape.format, ffn)
    skip = 2 * _words(fmt, hidden, ffn) + (bias_words(fmt, 2 * ffn) if shape.bias else 0)
    assert skip * 4 == record_sections(shape.format, hidden, ffn, shape.bias)["down"][0]
    tiles, blocks = hidden // TILE, ffn // GROUP
    names = {"scratch": fmt.activation_dtype, "rows_out": "int32", "slab": slab_dtype(fmt), "out": "float32", "work": "int32"}

    def biased(slab: Buffer, entry: _Work, tile: Expr, column: Expr, total: Expr) -> Expr:
        if not shape.bias:
            return total
        return total + bias_at(fmt, slab, entry.record + i32(skip + _words(fmt, ffn, hidden)), tile * i32(TILE) + column)

    def decode_body() -> None:
        (scratch, rows_out, slab, out, work), (first, entries, _) = parameters(SCALARS, **names)
        product = Gemv(profile, fmt, ffn, tiles)
        with threads((tiles, entries), product.threads) as ((tile, number), (x, y)):
            entry = _Work(work, first, number)
            base = let("base", entry.record + i32(skip) + tile * i32(blocks * fmt.words32))
            row = let("row", load(rows_out, entry.list_begin))  # early: its latency hides behind the weights'
            (total,) = product.emit(slab, base, scratch, let("row_start", entry.scratch * i32(width)), x, y)
            with when(y == i32(0)):
                store(out, row * i32(hidden) + tile * i32(TILE) + x, biased(slab, entry, tile, x, total))

    def prefill_body() -> None:
        (scratch, rows_out, slab, out, work), (first, entries, most) = parameters(SCALARS, **names)
        product = Gemm(fmt, ffn)
        with threads((tiles, entries, (most + i32(GEMM_ROWS - 1)) >> i32(5)), GEMM_THREADS) as ((tile, number, part), (x, y)):
            entry = _Work(work, first, number)
            memory = product.memory()
            with when(part * i32(GEMM_ROWS) < entry.count):
                base = let("base", entry.record + i32(skip) + tile * i32(blocks * fmt.words32))
                (acc,) = product.emit(memory, slab, base, scratch, _gather(entry, part, None, lambda row: row * i32(width)), x, y)
                for r in range(QUAD):
                    place = let("place", part * i32(GEMM_ROWS) + y * i32(QUAD) + i32(r))
                    with when(place < entry.count):
                        row = let("row", load(rows_out, entry.list_begin + place))
                        for o in range(QUAD):
                            column = let("column", x * i32(QUAD) + i32(o))
                            value = biased(slab, entry, tile, column, load(acc, QUAD * r + o))
                            store(out, row * i32(hidden) + tile * i32(TILE) + column, value)

    return build(name, decode_body if decode else prefill_body)

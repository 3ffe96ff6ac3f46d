"""The kernels whose unit is one expert: gate, up and activation, then the down projection.

Both are serial and take a range of tiles, so that the runtime can spread several experts over its threads in one go. No sum is ever
split: which thread computes a tile does not change a bit of it.
"""

from __future__ import annotations

from collections.abc import Sequence

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from cfmoe.compile.kernels.activation import quantise_group
from cfmoe.compile.kernels.builder import GROUP, TILE, Buffer, Expr, build, i64, let, load, scalar, silu, store, symbol, tensor
from cfmoe.compile.kernels.linear import for_row_blocks
from cfmoe.compile.kernels.matmul import FORMATS, accumulate, packed_size
from cfmoe.compile.kernels.simd import Simd


def scratch_width(format_name: str, ffn: int) -> int:
    """Elements of one row between the two projections: padded to 64 bytes."""
    return -(-FORMATS[format_name].activation_width(ffn) // 16) * 16


def record_sections(format_name: str, hidden: int, ffn: int) -> dict[str, tuple[int, int]]:
    """Byte offset and size of the two parts of an expert record."""
    fmt = FORMATS[format_name]
    element = fmt.words32 * 4 // fmt.words
    gate_up = 2 * packed_size(fmt, hidden, ffn) * element
    return {"gate_up": (0, gate_up), "down": (gate_up, packed_size(fmt, ffn, hidden) * element)}


def _tiles(begin: Expr, end: Expr) -> T.frame.ForFrame:
    return T.serial(i64(0), end - begin)


def gate_up(name: str, simd: Simd, format_name: str, hidden: int, ffn: int, decode: bool) -> tirx.PrimFunc:
    """(activation [n, …], rows int32 [m], slab 1-D, scratch [m, …], word_offset, begin, end): silu(gate) * up, ready for `down`."""
    fmt = FORMATS[format_name]

    def body() -> None:
        n = symbol()
        m = i64(1) if decode else symbol()
        activation = tensor("activation", (n, fmt.activation_width(hidden)), fmt.activation_dtype)
        rows = tensor("rows", (m,), "int32")
        slab = tensor("slab", (symbol(),), fmt.dtype)
        scratch = tensor("scratch", (m, scratch_width(format_name, ffn)), fmt.activation_dtype)
        offset, begin, end = (scalar(s) for s in ("word_offset", "begin", "end"))
        start = let(T.floordiv(offset * i64(fmt.words), i64(fmt.words32)))
        with _tiles(begin, end) as step:
            tile = let(begin + step)
            base = let(start + tile * i64(2 * (hidden // GROUP) * fmt.words))

            def emit(places: Sequence[Expr]) -> None:
                sources = [let(T.Cast("int64", rows[p])) for p in places]
                gates, ups = accumulate(simd, fmt, slab, base, activation, sources, hidden, streams=2)
                for place, gate, up in zip(places, gates, ups, strict=True):
                    _finish(gate, up, scratch, place, tile)

            for_row_blocks(m, 1 if decode else None, emit)

    def _finish(gate: Buffer, up: Buffer, scratch: Buffer, place: Expr, tile: Expr) -> None:
        value = silu(load(gate, i64(0), lanes=TILE), TILE) * load(up, i64(0), lanes=TILE)
        if fmt.quantised:
            quantise_group(value, scratch, place, tile * i64(10))
        else:
            store(scratch, value, place, tile * i64(TILE), lanes=TILE)

    return build(name, {}, body)


def down(name: str, simd: Simd, format_name: str, hidden: int, ffn: int, decode: bool) -> tirx.PrimFunc:
    """(scratch [m, …], rows int32 [m], slab 1-D, out fp32 [n * top_k, hidden], word_offset, begin, end).

    out[rows[i]] = scratch[i] @ down.
    """
    fmt = FORMATS[format_name]
    skip = record_sections(format_name, hidden, ffn)["down"][0] // (fmt.words32 * 4 // fmt.words)

    def body() -> None:
        m = i64(1) if decode else symbol()
        scratch = tensor("scratch", (m, scratch_width(format_name, ffn)), fmt.activation_dtype)
        rows = tensor("rows", (m,), "int32")
        slab = tensor("slab", (symbol(),), fmt.dtype)
        out = tensor("out", (symbol(), hidden), "float32")
        offset, begin, end = (scalar(s) for s in ("word_offset", "begin", "end"))
        start = let(T.floordiv(offset * i64(fmt.words), i64(fmt.words32)) + i64(skip))
        with _tiles(begin, end) as step:
            tile = let(begin + step)
            base = let(start + tile * i64(ffn // GROUP * fmt.words))

            def emit(places: Sequence[Expr]) -> None:
                (acc,) = accumulate(simd, fmt, slab, base, scratch, places, ffn)
                for place, buffer in zip(places, acc, strict=True):
                    row = let(T.Cast("int64", rows[place]))
                    for at in range(0, TILE, simd.lanes):
                        store(out, load(buffer, i64(at), lanes=simd.lanes), row, tile * i64(TILE) + i64(at), lanes=simd.lanes)

            for_row_blocks(m, 1 if decode else None, emit)

    return build(name, {}, body)

"""The kernels whose unit is one expert: gate, up and activation, then the down projection.

Both are serial and take a range of tiles, so that the runtime can spread several experts over its threads in one go. No sum is ever
split: which thread computes a tile does not change a bit of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from cfmoe.compile.decoder_config import ClampedSwiglu
from cfmoe.compile.kernels.activation import quantise_group
from cfmoe.compile.kernels.builder import (
    GROUP,
    TILE,
    Buffer,
    Expr,
    build,
    f32,
    i64,
    let,
    load,
    scalar,
    sigmoid,
    silu,
    splat,
    store,
    symbol,
    tensor,
)
from cfmoe.compile.kernels.linear import for_row_blocks
from cfmoe.compile.kernels.matmul import FORMATS, accumulate, packed_size, row_blocks
from cfmoe.compile.kernels.simd import Simd


@dataclass(frozen=True)
class ExpertShape:
    """Sizes are elements. With `bias`, each section of a record ends with its biases, one element of the slab's type each."""

    format: str
    hidden: int
    ffn: int
    bias: bool = False
    swiglu: ClampedSwiglu | None = None  # None: silu(gate) * up


def scratch_width(format_name: str, ffn: int) -> int:
    """Elements of one row between the two projections: padded to 64 bytes."""
    return -(-FORMATS[format_name].activation_width(ffn) // 16) * 16


def record_sections(format_name: str, hidden: int, ffn: int, bias: bool = False) -> dict[str, tuple[int, int]]:
    """Byte offset and size of the two parts of an expert record."""
    fmt = FORMATS[format_name]
    element = fmt.words32 * 4 // fmt.words
    gate_up = (2 * packed_size(fmt, hidden, ffn) + (2 * ffn if bias else 0)) * element
    return {"gate_up": (0, gate_up), "down": (gate_up, (packed_size(fmt, ffn, hidden) + (hidden if bias else 0)) * element)}


def _tiles(begin: Expr, end: Expr) -> T.frame.ForFrame:
    return T.serial(i64(0), end - begin)


def _bias(slab: Buffer, at: Expr, lanes: int) -> Expr:
    """`lanes` biases as fp32: in an int32 slab they are fp32 bits."""
    value = load(slab, at, lanes=lanes)
    vector = f"float32x{lanes}"
    return T.reinterpret(vector, value) if str(slab.dtype) == "int32" else T.Cast(vector, value)


def _activated(shape: ExpertShape, gate: Expr, up: Expr) -> Expr:
    if shape.swiglu is None:
        return silu(gate, TILE) * up
    limit, alpha = splat(f32(shape.swiglu.limit), TILE), splat(f32(shape.swiglu.alpha), TILE)
    gate = let(T.min(gate, limit))
    up = let(T.max(T.min(up, limit), splat(f32(-shape.swiglu.limit), TILE)))
    return (up + splat(f32(1.0), TILE)) * (gate * sigmoid(gate * alpha, TILE))


def gate_up(name: str, simd: Simd, shape: ExpertShape, decode: bool) -> tirx.PrimFunc:
    """(activation [n, …], rows int32 [m], slab 1-D, scratch [m, …], word_offset, begin, end): what `down` reads."""
    fmt = FORMATS[shape.format]
    hidden, ffn = shape.hidden, shape.ffn

    def body() -> None:
        n = symbol()
        m = i64(1) if decode else symbol()
        activation = tensor("activation", (n, fmt.activation_width(hidden)), fmt.activation_dtype)
        rows = tensor("rows", (m,), "int32")
        slab = tensor("slab", (symbol(),), fmt.dtype)
        scratch = tensor("scratch", (m, scratch_width(shape.format, ffn)), fmt.activation_dtype)
        offset, begin, end = (scalar(s) for s in ("word_offset", "begin", "end"))
        start = let(T.floordiv(offset * i64(fmt.words), i64(fmt.words32)))
        with _tiles(begin, end) as step:
            tile = let(begin + step)
            base = let(start + tile * i64(2 * (hidden // GROUP) * fmt.words))
            biases = let(start + i64(2 * packed_size(fmt, hidden, ffn)) + tile * i64(2 * TILE)) if shape.bias else None

            def emit(places: Sequence[Expr]) -> None:
                sources = [let(T.Cast("int64", rows[p])) for p in places]
                gates, ups = accumulate(simd, fmt, slab, base, activation, sources, hidden, streams=2)
                for place, gate, up in zip(places, gates, ups, strict=True):
                    _finish([gate, up], slab, biases, scratch, place, tile)

            for_row_blocks(m, 1 if decode else None, row_blocks(simd, fmt), emit)

    def _finish(pair: Sequence[Buffer], slab: Buffer, biases: Expr | None, scratch: Buffer, place: Expr, tile: Expr) -> None:
        gate, up = (load(part, i64(0), lanes=TILE) for part in pair)
        if biases is not None:
            gate, up = let(gate + _bias(slab, biases, TILE)), let(up + _bias(slab, biases + i64(TILE), TILE))
        value = _activated(shape, gate, up)
        if fmt.quantised:
            quantise_group(value, scratch, place, tile * i64(10))
        else:
            store(scratch, value, place, tile * i64(TILE), lanes=TILE)

    return build(name, {}, body)


def down(name: str, simd: Simd, shape: ExpertShape, decode: bool) -> tirx.PrimFunc:
    """(scratch [m, …], rows int32 [m], slab 1-D, out fp32 [n * top_k, hidden], word_offset, begin, end).

    out[rows[i]] = scratch[i] @ down.
    """
    fmt = FORMATS[shape.format]
    hidden, ffn = shape.hidden, shape.ffn
    skip = record_sections(shape.format, hidden, ffn, shape.bias)["down"][0] // (fmt.words32 * 4 // fmt.words)

    def body() -> None:
        m = i64(1) if decode else symbol()
        scratch = tensor("scratch", (m, scratch_width(shape.format, ffn)), fmt.activation_dtype)
        rows = tensor("rows", (m,), "int32")
        slab = tensor("slab", (symbol(),), fmt.dtype)
        out = tensor("out", (symbol(), hidden), "float32")
        offset, begin, end = (scalar(s) for s in ("word_offset", "begin", "end"))
        start = let(T.floordiv(offset * i64(fmt.words), i64(fmt.words32)) + i64(skip))
        with _tiles(begin, end) as step:
            tile = let(begin + step)
            base = let(start + tile * i64(ffn // GROUP * fmt.words))
            biases = let(start + i64(packed_size(fmt, ffn, hidden)) + tile * i64(TILE)) if shape.bias else None

            def emit(places: Sequence[Expr]) -> None:
                (acc,) = accumulate(simd, fmt, slab, base, scratch, places, ffn)
                for place, buffer in zip(places, acc, strict=True):
                    row = let(T.Cast("int64", rows[place]))
                    for at in range(0, TILE, simd.lanes):
                        value = load(buffer, i64(at), lanes=simd.lanes)
                        if biases is not None:
                            value = value + _bias(slab, biases + i64(at), simd.lanes)
                        store(out, value, row, tile * i64(TILE) + i64(at), lanes=simd.lanes)

            for_row_blocks(m, 1 if decode else None, row_blocks(simd, fmt), emit)

    return build(name, {}, body)

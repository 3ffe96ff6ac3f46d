"""Dense projections and the embedding look-up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from cfmoe.compile.kernels.builder import GROUP, TILE, Buffer, Expr, build, i64, let, load, loop, store, symbol, tensor
from cfmoe.compile.kernels.matmul import FORMATS, Format, accumulate, packed_size, padded, row_blocks
from cfmoe.compile.kernels.simd import Simd

# Below this many weight bytes one row is done sooner than a parallel region is worth: a thread that the system has taken off its CPU
# holds the others up for milliseconds.
MIN_PARALLEL_BYTES = 256 * 1024


def for_row_blocks(rows: Expr, static_rows: int | None, blocks: Sequence[int], emit: Callable[[Sequence[Expr]], None]) -> None:
    """Calls `emit` for as many blocks of blocks[0] rows as there are, for what is left of blocks[1] rows, and so on to single rows."""
    if static_rows is not None and static_rows < blocks[0]:
        for row in range(static_rows):
            emit([i64(row)])
        return
    done, left = i64(0), rows
    for size in blocks:
        with T.serial(i64(0), T.floordiv(left, i64(size))) as block:
            emit([let(done + block * i64(size) + i64(r)) for r in range(size)])
        left = T.floormod(left, i64(size))
        done = rows - left


@dataclass(frozen=True)
class LinearShape:
    """One dense projection. `outputs` is the width of the result, which may be less than the padded tiles."""

    format: str
    inputs: int
    outputs: int
    rows: int | None = None  # None: decided by the caller's tensors
    bias: bool = False
    residual: bool = False


def linear(name: str, simd: Simd, shape: LinearShape) -> tirx.PrimFunc:
    """(activation [n, …], weight 1-D, [bias fp32 [outputs]], [residual fp32 [n, outputs]], out fp32 [n, outputs])."""
    fmt = FORMATS[shape.format]
    inputs, outputs = shape.inputs, shape.outputs
    size = packed_size(fmt, inputs, outputs)
    tiles = padded(outputs) // TILE
    tail = outputs % TILE

    def body() -> None:
        n = i64(shape.rows) if shape.rows is not None else symbol()
        activation = tensor("activation", (n, fmt.activation_width(inputs)), fmt.activation_dtype)
        weight = tensor("weight", (size,), fmt.dtype)
        bias = tensor("bias", (outputs,), "float32") if shape.bias else None
        residual = tensor("residual", (n, outputs), "float32") if shape.residual else None
        out = tensor("out", (n, outputs), "float32")
        parallel = shape.rows is None or size * (fmt.words32 * 4 // fmt.words) >= MIN_PARALLEL_BYTES

        def write(acc: Buffer, row: Expr, column: Expr, at: Expr, lanes: int) -> None:
            value = load(acc, at, lanes=lanes) if lanes > 1 else acc[at]
            for extra in (bias, residual):
                if extra is not None:
                    index = (column,) if extra is bias else (row, column)
                    value = value + (load(extra, *index, lanes=lanes) if lanes > 1 else extra[index])
            if lanes > 1:
                store(out, value, row, column, lanes=lanes)
            else:
                T.buffer_store(out, value, [row, column])

        def tile_body(tile: Expr, columns: int) -> None:
            base = let(tile * i64(inputs // GROUP * fmt.words))

            def emit(rows: Sequence[Expr]) -> None:
                (acc,) = accumulate(simd, fmt, weight, base, activation, rows, inputs)
                for buffer, row in zip(acc, rows, strict=True):
                    whole = columns // simd.lanes * simd.lanes
                    for at in range(0, whole, simd.lanes):
                        write(buffer, row, tile * i64(TILE) + i64(at), i64(at), simd.lanes)
                    for at in range(whole, columns):
                        write(buffer, row, tile * i64(TILE) + i64(at), i64(at), 1)

            for_row_blocks(n, shape.rows, row_blocks(simd, fmt), emit)

        with loop(outputs // TILE, parallel=parallel) as tile:
            tile_body(tile, TILE)
        if tail:
            tile_body(i64(tiles - 1), tail)

    return build(name, {}, body)


def embedding(name: str, format_name: str, vocab: int, width: int, rows: int | None) -> tirx.PrimFunc:
    """(tokens int32 [n], weight 1-D: width inputs × vocab outputs, out fp32 [n, width]): column tokens[i] of the weight."""
    fmt = FORMATS[format_name]

    def body() -> None:
        n = i64(rows) if rows is not None else symbol()
        tokens = tensor("tokens", (n,), "int32")
        weight = tensor("weight", (packed_size(fmt, width, vocab),), fmt.dtype)
        out = tensor("out", (n, width), "float32")
        with loop(n, parallel=rows != 1) as i, loop(width // GROUP) as group:
            token = let(T.Cast("int64", tokens[i]))
            lane = let(T.floormod(token, i64(TILE)))
            block = let((T.floordiv(token, i64(TILE)) * i64(width // GROUP) + group) * i64(fmt.words))
            with loop(GROUP) as k:
                T.buffer_store(out, _element(fmt, weight, block, k, lane), [i, group * i64(GROUP) + k])

    return build(name, {}, body)


def _element(fmt: Format, weight: Buffer, block: Expr, k: Expr, lane: Expr) -> Expr:
    """Weight (input k, output lane) of a block, as fp32."""
    if not fmt.quantised:
        return T.Cast("float32", weight[block + k * i64(TILE) + lane])
    per = i64(fmt.codes_per_word)
    word = weight[block + T.floordiv(k, per) * i64(TILE) + lane]
    at = T.floormod(k, per)
    if fmt.codes_per_word == 8:
        shift = T.floormod(at, i64(4)) * i64(8) + T.floordiv(at, i64(4)) * i64(4)
        mask = 15
    else:
        shift = at * i64(8)
        mask = 255
    code = (word >> T.Cast("int32", shift)) & tirx.IntImm("int32", mask)
    pair = weight[block + i64(GROUP // fmt.codes_per_word * TILE) + T.floordiv(lane, i64(2))]
    half = (pair >> T.Cast("int32", T.floormod(lane, i64(2)) * i64(16))) & tirx.IntImm("int32", 0xFFFF)
    scale = T.Cast("float32", T.reinterpret("float16", T.Cast("uint16", half)))
    return T.Cast("float32", code - tirx.IntImm("int32", fmt.zero)) * scale

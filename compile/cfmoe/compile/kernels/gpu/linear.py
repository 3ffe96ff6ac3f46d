"""Dense projections and the embedding look-up on GPUs."""

from __future__ import annotations

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from cfmoe.compile.kernels.builder import GROUP, TILE, Buffer, Expr
from cfmoe.compile.kernels.gpu.builder import build, halves, i32, lane, let, load, parameters, store, threads, when
from cfmoe.compile.kernels.gpu.matrix import GEMM_ROWS, GEMM_THREADS, QUAD, Gemm, Gemv, slab_dtype
from cfmoe.compile.kernels.gpu.profile import Profile
from cfmoe.compile.kernels.gpu.rowwise import row_scalars
from cfmoe.compile.kernels.linear import LinearShape
from cfmoe.compile.kernels.matmul import FORMATS, Format, padded

_CHUNK = 256  # rows that prefill usually has
_IDLE = 16  # a device is badly used by less than this part of the threads that fill it


def linear(name: str, profile: Profile, shape: LinearShape) -> tirx.PrimFunc:
    """(activation [n, …], weight, [bias fp32 [outputs]], [residual fp32 [n, outputs]], out fp32 [n, outputs]; n)."""
    fmt = FORMATS[shape.format]
    inputs, outputs = shape.inputs, shape.outputs
    tiles = padded(outputs) // TILE
    names = {"activation": fmt.activation_dtype, "weight": slab_dtype(fmt)}
    names |= {"bias": "float32"} if shape.bias else {}
    names |= {"residual": "float32"} if shape.residual else {}
    names["out"] = "float32"

    def finish(params: dict[str, Buffer], row: Expr, column: Expr, total: Expr, valid: Expr | None) -> None:
        with when(valid):
            at = let("out_at", row * i32(outputs) + column)
            if shape.bias:
                total = total + load(params["bias"], column)
            if shape.residual:
                total = total + load(params["residual"], at)
            store(params["out"], at, total)

    # Where a GEMM of a whole chunk would leave most of the device idle, as with a router's few outputs, every row is a GEMV of its own.
    gemm_threads = tiles * (_CHUNK // GEMM_ROWS) * GEMM_THREADS[0] * GEMM_THREADS[1]
    row_by_row = shape.rows is not None or (not fmt.quantised and _IDLE * gemm_threads < profile.threads_at_once)

    def row_at_a_time() -> None:
        buffers, scalars = parameters(row_scalars(shape.rows), **names)
        params = dict(zip(names, buffers, strict=True))
        product = Gemv(profile, fmt, inputs, tiles)
        with threads((tiles, shape.rows if shape.rows is not None else scalars[0]), product.threads) as ((tile, row), (x, y)):
            base = let("base", tile * i32(inputs // GROUP * fmt.words32))
            start = let("row_start", row * i32(fmt.activation_width(inputs)))
            (total,) = product.emit(params["weight"], base, params["activation"], start, x, y)
            column = let("column", tile * i32(TILE) + x)
            first = y == i32(0)
            finish(params, row, column, total, T.And(first, column < i32(outputs)) if outputs % TILE else first)

    def rows_together() -> None:
        buffers, (n,) = parameters(row_scalars(shape.rows), **names)
        params = dict(zip(names, buffers, strict=True))
        product = Gemm(fmt, inputs)
        with threads((tiles, (n + i32(GEMM_ROWS - 1)) >> i32(5)), GEMM_THREADS) as ((tile, part), (x, y)):
            base = let("base", tile * i32(inputs // GROUP * fmt.words32))

            def row_start(row: Expr) -> Expr:
                return T.min(part * i32(GEMM_ROWS) + row, n - i32(1)) * i32(fmt.activation_width(inputs))

            (acc,) = product.emit(product.memory(), params["weight"], base, params["activation"], row_start, x, y)
            for r in range(QUAD):
                row = let("row", part * i32(GEMM_ROWS) + y * i32(QUAD) + i32(r))
                with when(row < n):
                    for o in range(QUAD):
                        column = let("column", tile * i32(TILE) + x * i32(QUAD) + i32(o))
                        finish(params, row, column, load(acc, QUAD * r + o), column < i32(outputs) if outputs % TILE else None)

    return build(name, row_at_a_time if row_by_row else rows_together)


def embedding(name: str, profile: Profile, format_name: str, vocab: int, width: int, rows: int | None) -> tirx.PrimFunc:
    """(tokens int32 [n], weight: width inputs × vocab outputs, out fp32 [n, width]; n): column tokens[i] of the weight."""
    fmt = FORMATS[format_name]
    count = profile.row_threads

    def body() -> None:
        (tokens, weight, out), scalars = parameters(row_scalars(rows), tokens="int32", weight=slab_dtype(fmt), out="float32")
        n = i32(rows) if rows is not None else scalars[0]
        with threads((-(-width // count), n), (count,)) as ((part, row), (thread,)):
            column = let("column", part * i32(count) + thread)
            with when(column < i32(width) if width % count else None):
                token = let("token", load(tokens, row))
                tile, group = token >> i32(5), column >> i32(5)
                block = let("block", (tile * i32(width // GROUP) + group) * i32(fmt.words32))
                value = _element(fmt, weight, block, column & i32(GROUP - 1), let("output", token & i32(TILE - 1)))
                store(out, row * i32(width) + column, value)

    return build(name, body)


def _element(fmt: Format, weight: Buffer, block: Expr, k: Expr, output: Expr) -> Expr:
    """Weight (input k, output of the tile) of a block, as fp32."""
    if fmt.name == "f32":
        return load(weight, block + k * i32(TILE) + output)
    if fmt.name == "f16":
        pair = let("pair", halves(load(weight, block + k * i32(TILE // 2) + (output >> i32(1)))))
        return T.Select((output & i32(1)) == i32(0), lane(pair, 0), lane(pair, 1))
    per = fmt.codes_per_word
    word = load(weight, block + (k >> i32(per.bit_length() - 1)) * i32(TILE) + output)
    at = k & i32(per - 1)
    shift = ((at & i32(3)) << i32(3)) + ((at >> i32(2)) << i32(2)) if per == 8 else at << i32(3)
    code = let("code", (word >> shift) & i32(15 if per == 8 else 255))
    pair = let("pair", halves(load(weight, block + i32(GROUP // per * TILE) + (output >> i32(1)))))
    scale = T.Select((output & i32(1)) == i32(0), lane(pair, 0), lane(pair, 1))
    return T.Cast("float32", code - i32(fmt.zero)) * scale

"""Quantised activations, RMS norm and the pointwise parts of a feed-forward layer."""

from __future__ import annotations

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from cfmoe.compile.kernels.builder import (
    GROUP,
    Buffer,
    Expr,
    absolute,
    build,
    f32,
    fma,
    i64,
    let,
    load,
    loop,
    reduce_max,
    reduce_sum,
    reduce_sum_int,
    rint,
    rounded,
    sigmoid,
    silu,
    splat,
    store,
    symbol,
    tensor,
)
from cfmoe.compile.kernels.matmul import FORMATS

WIDE = 16  # lanes of pointwise code; LLVM splits them where the CPU's vectors are shorter


def quantise_group(values: Expr, out: Buffer, *index: Expr) -> None:
    """Emits one group: `values` is fp32 × 32, index[-1] the group's first word in `out`."""
    vector = f"float32x{GROUP}"
    row, at = index[:-1], index[-1]
    values = let(values)
    largest = let(reduce_max(absolute(values, vector)))
    inverse = let(T.Select(largest > f32(0.0), f32(127.0) / largest, f32(0.0)))
    codes = let(T.Cast(f"int32x{GROUP}", rint(values * splat(inverse, GROUP), vector)))
    store(out, T.reinterpret("int32x8", T.Cast(f"int8x{GROUP}", codes)), *row, at, lanes=8)
    T.buffer_store(out, T.reinterpret("int32", largest / f32(127.0)), [*row, at + i64(8)])
    T.buffer_store(out, reduce_sum_int(codes), [*row, at + i64(9)])


def _rows(rows: int | None) -> Expr:
    return i64(rows) if rows is not None else symbol()


def quantise(name: str, rows: int | None, width: int) -> tirx.PrimFunc:
    """(x fp32 [n, width], out int32 [n, width / 32 * 10])."""

    def body() -> None:
        n = _rows(rows)
        x = tensor("x", (n, width), "float32")
        out = tensor("out", (n, FORMATS["q8"].activation_width(width)), "int32")
        with loop(n, parallel=rows != 1) as i, loop(width // GROUP) as g:
            quantise_group(load(x, i, g * i64(GROUP), lanes=GROUP), out, i, g * i64(10))

    return build(name, {}, body)


def _inverse_rms(x: Buffer, row: Expr, width: int, eps: float) -> Expr:
    lanes = WIDE
    acc = T.alloc_buffer((lanes,), "float32", scope="local")
    store(acc, splat(f32(0.0), lanes), i64(0), lanes=lanes)
    with loop(width // lanes) as j:
        v = let(load(x, row, j * i64(lanes), lanes=lanes))
        store(acc, fma(v, v, load(acc, i64(0), lanes=lanes), lanes), i64(0), lanes=lanes)
    mean = rounded(reduce_sum(load(acc, i64(0), lanes=lanes)) / f32(float(width)), 1)
    return let(f32(1.0) / T.sqrt(mean + f32(eps)))


def rms_norm(name: str, rows: int | None, width: int, eps: float) -> tirx.PrimFunc:
    """(x fp32 [n, width], weight fp32 [width], out fp32 [n, width]). Root mean square layer norm, Zhang & Sennrich 2019."""

    def body() -> None:
        n = _rows(rows)
        x = tensor("x", (n, width), "float32")
        weight = tensor("weight", (width,), "float32")
        out = tensor("out", (n, width), "float32")
        with loop(n, parallel=rows != 1) as i:
            inverse = _inverse_rms(x, i, width, eps)
            with loop(width // WIDE) as j:
                at = let(j * i64(WIDE))
                value = load(x, i, at, lanes=WIDE) * splat(inverse, WIDE) * load(weight, at, lanes=WIDE)
                store(out, value, i, at, lanes=WIDE)

    return build(name, {}, body)


def rms_norm_quantise(name: str, rows: int | None, width: int, eps: float) -> tirx.PrimFunc:
    """(x fp32 [n, width], weight fp32 [width], out int32 [n, width / 32 * 10]): rms_norm, then quantise, in one pass."""

    def body() -> None:
        n = _rows(rows)
        x = tensor("x", (n, width), "float32")
        weight = tensor("weight", (width,), "float32")
        out = tensor("out", (n, FORMATS["q8"].activation_width(width)), "int32")
        with loop(n, parallel=rows != 1) as i:
            inverse = _inverse_rms(x, i, width, eps)
            with loop(width // GROUP) as g:
                at = let(g * i64(GROUP))
                value = load(x, i, at, lanes=GROUP) * splat(inverse, GROUP) * load(weight, at, lanes=GROUP)
                quantise_group(value, out, i, g * i64(10))

    return build(name, {}, body)


def silu_mul(name: str, rows: int | None, width: int) -> tirx.PrimFunc:
    """(gate_up fp32 [n, 2 * width], out fp32 [n, width]): silu(gate) * up, gate first."""

    def body() -> None:
        n = _rows(rows)
        x = tensor("gate_up", (n, 2 * width), "float32")
        out = tensor("out", (n, width), "float32")
        with loop(n, parallel=rows != 1) as i, loop(width // WIDE) as j:
            at = let(j * i64(WIDE))
            gate = silu(load(x, i, at, lanes=WIDE), WIDE)
            store(out, gate * load(x, i, at + i64(width), lanes=WIDE), i, at, lanes=WIDE)

    return build(name, {}, body)


def gated_add(name: str, rows: int | None, width: int, gate_width: int) -> tirx.PrimFunc:
    """(x fp32 [n, width], gate fp32 [n, gate_width], residual fp32 [n, width], out): residual + sigmoid(gate[:, 0]) * x."""

    def body() -> None:
        n = _rows(rows)
        x = tensor("x", (n, width), "float32")
        gate = tensor("gate", (n, gate_width), "float32")
        residual = tensor("residual", (n, width), "float32")
        out = tensor("out", (n, width), "float32")
        with loop(n, parallel=rows != 1) as i:
            weight = let(sigmoid(gate[i, i64(0)], 1))
            with loop(width // WIDE) as j:
                at = let(j * i64(WIDE))
                value = fma(splat(weight, WIDE), load(x, i, at, lanes=WIDE), load(residual, i, at, lanes=WIDE), WIDE)
                store(out, value, i, at, lanes=WIDE)

    return build(name, {}, body)


def combine(name: str, rows: int | None, width: int, top_k: int) -> tirx.PrimFunc:
    """(residual fp32 [n, width], rows fp32 [n * top_k, width], weights fp32 [n, top_k], out fp32 [n, width]).

    Sums the experts' rows in routing order, whatever order they were computed in.
    """

    def body() -> None:
        n = _rows(rows)
        residual = tensor("residual", (n, width), "float32")
        expert_rows = tensor("rows", (n * i64(top_k), width), "float32")
        weights = tensor("weights", (n, top_k), "float32")
        out = tensor("out", (n, width), "float32")
        with loop(n, parallel=rows != 1) as i, loop(width // WIDE) as j:
            at = let(j * i64(WIDE))
            value = let(load(residual, i, at, lanes=WIDE))
            for k in range(top_k):
                row = load(expert_rows, i * i64(top_k) + i64(k), at, lanes=WIDE)
                value = let(fma(splat(weights[i, i64(k)], WIDE), row, value, WIDE))
            store(out, value, i, at, lanes=WIDE)

    return build(name, {}, body)

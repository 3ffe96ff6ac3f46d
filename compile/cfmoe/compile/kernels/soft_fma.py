"""A fused multiply-add for CPUs that have none: the same bits by way of fp64, in place of calls of the C library."""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

Expr = Any

_PIECE = 4  # lanes that are done at a time: LLVM is slow over vectors of 64-bit elements far wider than the CPU's


def soft_fma(a: Expr, b: Expr, c: Expr, lanes: int) -> Expr:
    """a * b + c in fp32, rounded once."""
    if lanes <= _PIECE:
        return _piece(a, b, c, lanes)
    arrays = [_through_memory(x, lanes, "float32") for x in (a, b, c)]
    out = T.alloc_buffer((lanes,), "float32", scope="local")
    with T.serial(tirx.IntImm("int64", 0), tirx.IntImm("int64", lanes // _PIECE)) as piece:
        at = T.ramp(piece * tirx.IntImm("int64", _PIECE), 1, _PIECE)
        x, y, z = (array[at] for array in arrays)
        T.buffer_store(out, _piece(x, y, z, _PIECE), [at])
    return T.Bind(out[T.ramp(tirx.IntImm("int64", 0), 1, lanes)])


def _through_memory(value: Expr, lanes: int, dtype: str) -> Any:
    array = T.alloc_buffer((lanes,), dtype, scope="local")
    T.buffer_store(array, value, [T.ramp(tirx.IntImm("int64", 0), 1, lanes) if lanes > 1 else tirx.IntImm("int64", 0)])
    return array


def _piece(a: Expr, b: Expr, c: Expr, lanes: int) -> Expr:
    """The product of two fp32 numbers is exact in fp64. The sum is rounded to odd, for which its error (Knuth's two-sum) is enough; from
    there to fp32 rounding is as from the exact sum, for fp64 has more than two bits to spare (Boldo & Melquiond 2008).
    """

    def vector(dtype: str) -> str:
        return dtype if lanes == 1 else f"{dtype}x{lanes}"

    def splat(value: Expr) -> Expr:
        return value if lanes == 1 else T.broadcast(value, lanes)

    def integer(value: int) -> Expr:
        return splat(tirx.IntImm("int64", value))

    def opaque(value: Expr, dtype: str) -> Expr:
        # Memory that LLVM turns into registers: TVM's simplifier works for minutes on expressions that it can see through.
        index = T.ramp(tirx.IntImm("int64", 0), 1, lanes) if lanes > 1 else tirx.IntImm("int64", 0)
        return _through_memory(value, lanes, dtype)[index]

    wide, bits = vector("float64"), vector("int64")
    product = opaque(T.Cast(wide, a) * T.Cast(wide, b), "float64")
    addend = opaque(T.Cast(wide, c), "float64")
    total = opaque(product + addend, "float64")
    part = opaque(total - product, "float64")
    error = opaque((product - (total - part)) + (addend - part), "float64")
    size = T.call_llvm_pure_intrin(wide, "llvm.fabs", error)
    inexact = opaque(T.Select(size > splat(tirx.FloatImm("float64", 0.0)), integer(1), integer(0)), "int64")
    whole = opaque(T.reinterpret(bits, total), "int64")
    beyond = ((whole ^ T.reinterpret(bits, error)) >> integer(63)) & inexact  # 1 where |total| exceeds that of the exact sum
    rounded = opaque(T.reinterpret(wide, (whole - beyond) | inexact), "float64")
    return T.Bind(T.Cast(vector("float32"), rounded))

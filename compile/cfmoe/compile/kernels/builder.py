"""Helpers over TVM's IR builder for kernels that are written with explicit vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from cfmoe.compile.kernels.soft_fma import soft_fma

Expr = Any  # tirx expressions have no useful common static type
Buffer = Any

GROUP = 32  # inputs that share one quantisation scale
TILE = 32  # outputs of one tile of a weight matrix

# Coefficients of the highest power first.
_EXP = (1.3814173991004203e-3, 8.368921796795204e-3, 0.04166840797608797, 0.16666518938572927, 0.49999993333479165, 1.0, 1.0)
_SINE = (-1.9513979960586477e-4, 8.33215133159232e-3, -0.16666654463341005)
_COSINE = (2.4431668149908742e-5, -1.3887303459294178e-3, 0.041666645425303135, -0.5)
_HALF_PI = (1.5707963705062866, -4.371138828673793e-08, -1.7151245100058819e-15)  # each as fp32 holds it


_fused: ContextVar[bool] = ContextVar("fused", default=True)


@contextmanager
def multiply_adds(fused: bool) -> Iterator[None]:
    """Within it kernels are built for a CPU that has, or has not, an instruction for fp32 a * b + c."""
    before = _fused.set(fused)
    try:
        yield
    finally:
        _fused.reset(before)


def build(name: str, attrs: dict[str, Any], body: Callable[[], None]) -> tirx.PrimFunc:
    """Builds a PrimFunc called `name`; `body` declares the parameters and emits the statements."""
    with IRBuilder() as ib, T.prim_func():
        T.func_name(name)
        T.func_attr({"global_symbol": name, "tirx.noalias": True, **attrs})
        body()
    return ib.get()


def tensor(name: str, shape: Sequence[Expr], dtype: str) -> Buffer:
    """Declares a tensor parameter."""
    return T.match_buffer(T.arg(name, T.handle()), tuple(shape), dtype)


def scalar(name: str, dtype: str = "int64") -> Expr:
    """Declares an integer parameter."""
    return T.arg(name, getattr(T, dtype)())


def symbol() -> Expr:
    """A dimension that the caller's tensors decide."""
    return T.int64()


def i64(value: Expr) -> Expr:
    return tirx.IntImm("int64", value) if isinstance(value, int) else T.Cast("int64", value)


def f32(value: float) -> Expr:
    # Rounded here, or a cast of it to fp64 would be folded to more digits than fp32 has.
    return tirx.FloatImm("float32", float(np.float32(value)))


def splat(value: Expr, lanes: int) -> Expr:
    return T.broadcast(value, lanes) if lanes > 1 else value


def shuffle(vectors: Sequence[Expr], lanes: Sequence[int]) -> Expr:
    """The elements that `lanes` number, counted through `vectors` from the first to the last."""
    return tirx.Shuffle(list(vectors), [tirx.IntImm("int32", lane) for lane in lanes])


def load(buffer: Buffer, *index: Expr, lanes: int) -> Expr:
    """`lanes` consecutive elements along the last dimension."""
    return buffer[(*index[:-1], T.ramp(index[-1], 1, lanes))]


def store(buffer: Buffer, value: Expr, *index: Expr, lanes: int) -> None:
    T.buffer_store(buffer, value, [*index[:-1], T.ramp(index[-1], 1, lanes)])


def let(value: Expr) -> Expr:
    """Evaluates `value` once, here."""
    return T.Bind(value)


def local(size: int, dtype: str = "float32") -> Buffer:
    """A small array that LLVM keeps in registers when its indices are constant."""
    return T.alloc_buffer((size,), dtype, scope="local")


def intrinsic(dtype: str, name: str, *args: Expr) -> Expr:
    return T.call_llvm_pure_intrin(dtype, name, *args)


def reduce_max(vector: Expr) -> Expr:
    return intrinsic("float32", "llvm.vector.reduce.fmax", vector)


def reduce_sum(vector: Expr) -> Expr:
    """Sum of fp32 lanes, in lane order: the same on every CPU."""
    return intrinsic("float32", "llvm.vector.reduce.fadd", f32(0.0), vector)


def reduce_sum_int(vector: Expr) -> Expr:
    return intrinsic("int32", "llvm.vector.reduce.add", vector)


def _vector(dtype: str, lanes: int) -> str:
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def absolute(vector: Expr, dtype: str) -> Expr:
    return intrinsic(dtype, "llvm.fabs", vector)


def rint(vector: Expr, dtype: str) -> Expr:
    """Round to nearest, ties to even."""
    return intrinsic(dtype, "llvm.rint", vector)


def fma(a: Expr, b: Expr, c: Expr, lanes: int) -> Expr:
    """a * b + c in fp32, rounded once, on every CPU.

    Sums of products must be written with it: of a product and a sum LLVM makes one instruction where the CPU has one, which rounds
    otherwise than the two.
    """
    if not _fused.get():
        return soft_fma(a, b, c, lanes)
    return intrinsic(_vector("float32", lanes), "llvm.fma", a, b, c)


def rounded(x: Expr, lanes: int) -> Expr:
    """`x`, a product, as fp32 holds it: LLVM must not fuse it with a sum that it goes into."""
    return intrinsic(_vector("float32", lanes), "llvm.arithmetic.fence", x)


def exp(x: Expr, lanes: int) -> Expr:
    """e**x in fp32, within 1 ulp for -87 <= x <= 88 and the same bits on every CPU; 0 below, e**88 above.

    Cody-Waite reduction by ln 2, then a polynomial of degree 6 of least greatest error (2e-9).
    """
    dtype, int_dtype = _vector("float32", lanes), _vector("int32", lanes)
    x = let(x)
    clipped = let(T.max(T.min(x, splat(f32(88.0), lanes)), splat(f32(-87.0), lanes)))
    k = let(rint(clipped * splat(f32(1.4426950408889634), lanes), dtype))
    r = let(fma(k, splat(f32(-0.693359375), lanes), clipped, lanes))
    r = let(fma(k, splat(f32(2.12194440e-4), lanes), r, lanes))
    poly = splat(f32(_EXP[0]), lanes)
    for coefficient in _EXP[1:]:
        poly = let(fma(poly, r, splat(f32(coefficient), lanes), lanes))
    # Times 2**k by way of the exponent, exactly: no product is left that could be fused with what follows.
    bits = T.reinterpret(int_dtype, poly) + (T.Cast(int_dtype, k) << splat(tirx.IntImm("int32", 23), lanes))
    return let(T.Select(x < splat(f32(-87.0), lanes), splat(f32(0.0), lanes), T.reinterpret(dtype, bits)))


def sin_cos(x: Expr, lanes: int) -> tuple[Expr, Expr]:
    """Sine and cosine in fp32 for |x| <= 2**20, each within 1e-7 and the same bits on every CPU.

    Cody-Waite reduction by pi/2 in three parts, then polynomials of least greatest error on [-pi/4, pi/4].
    """
    dtype, int_dtype = _vector("float32", lanes), _vector("int32", lanes)
    one = splat(f32(1.0), lanes)
    x = let(x)
    k = let(rint(x * splat(f32(0.6366197723675814), lanes), dtype))
    r = x
    for part in _HALF_PI:
        r = let(fma(k, splat(f32(-part), lanes), r, lanes))
    z = let(r * r)

    def polynomial(coefficients: tuple[float, ...]) -> Expr:
        value = splat(f32(coefficients[0]), lanes)
        for coefficient in coefficients[1:]:
            value = let(fma(value, z, splat(f32(coefficient), lanes), lanes))
        return value

    sine = let(fma(r * z, polynomial(_SINE), r, lanes))
    cosine = let(fma(polynomial(_COSINE), z, one, lanes))
    quarter = let(T.Cast(int_dtype, k))

    def bit(value: Expr, number: int) -> Expr:
        return (value & splat(tirx.IntImm("int32", 1 << number), lanes)) != splat(tirx.IntImm("int32", 0), lanes)

    odd = bit(quarter, 0)
    minus = splat(f32(-1.0), lanes)
    sine_sign = T.Select(bit(quarter, 1), minus, one)
    cosine_sign = T.Select(bit(quarter + splat(tirx.IntImm("int32", 1), lanes), 1), minus, one)
    return let(T.Select(odd, cosine, sine) * sine_sign), let(T.Select(odd, sine, cosine) * cosine_sign)


def sigmoid(x: Expr, lanes: int) -> Expr:
    one = splat(f32(1.0), lanes)
    return one / (one + exp(splat(f32(0.0), lanes) - x, lanes))


def silu(x: Expr, lanes: int) -> Expr:
    x = let(x)
    return let(x * sigmoid(x, lanes))


@contextmanager
def loop(extent: Expr, *, parallel: bool = False) -> Iterator[Expr]:
    with (T.parallel if parallel else T.serial)(i64(0), i64(extent) if isinstance(extent, int) else extent) as var:
        yield var

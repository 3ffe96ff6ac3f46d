"""Helpers over TVM's IR builder for kernels that are written with explicit vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

Expr = Any  # tirx expressions have no useful common static type
Buffer = Any

GROUP = 32  # inputs that share one quantisation scale
TILE = 32  # outputs of one tile of a weight matrix


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
    return tirx.FloatImm("float32", value)


def splat(value: Expr, lanes: int) -> Expr:
    return T.broadcast(value, lanes) if lanes > 1 else value


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


def absolute(vector: Expr, dtype: str) -> Expr:
    return intrinsic(dtype, "llvm.fabs", vector)


def rint(vector: Expr, dtype: str) -> Expr:
    """Round to nearest, ties to even."""
    return intrinsic(dtype, "llvm.rint", vector)


def exp(x: Expr, lanes: int) -> Expr:
    """e**x in fp32, relative error below 2e-7 for x <= 88; 0 for x < -87.

    Cody-Waite reduction by ln 2 and a polynomial of degree 6, so that it vectorises and does not depend on the C library.
    """
    dtype = "float32" if lanes == 1 else f"float32x{lanes}"
    int_dtype = "int32" if lanes == 1 else f"int32x{lanes}"
    x = let(x)
    clipped = let(T.max(T.min(x, splat(f32(88.0), lanes)), splat(f32(-87.0), lanes)))
    k = let(rint(clipped * splat(f32(1.4426950408889634), lanes), dtype))
    r = let(clipped - k * splat(f32(0.693359375), lanes))
    r = let(r + k * splat(f32(2.12194440e-4), lanes))
    poly = splat(f32(1.0 / 720), lanes)
    for coefficient in (1.0 / 120, 1.0 / 24, 1.0 / 6, 0.5, 1.0, 1.0):
        poly = let(poly * r + splat(f32(coefficient), lanes))
    power = T.reinterpret(dtype, (T.Cast(int_dtype, k) + splat(tirx.IntImm("int32", 127), lanes)) << splat(tirx.IntImm("int32", 23), lanes))
    return let(T.Select(x < splat(f32(-87.0), lanes), splat(f32(0.0), lanes), poly * power))


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

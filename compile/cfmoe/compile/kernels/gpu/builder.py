"""Helpers over TVM's IR builder for GPU kernels: flat buffers, 32-bit integers, threads, sums over a workgroup."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from cfmoe.compile.kernels.builder import Buffer, Expr, f32

# Kernels see buffers without a size: bindings end where the runtime says.
_UNBOUNDED = 1 << 30


def build(name: str, body: Callable[[], None]) -> tirx.PrimFunc:
    """A device function called `name`; `body` declares buffers, then scalars, and emits the statements."""
    with IRBuilder() as ib, T.prim_func():
        T.func_name(name)
        T.func_attr({"global_symbol": name, "calling_conv": 2, "tirx.is_global_func": True, "tirx.noalias": True})
        body()
    return ib.get()


def _named(name: str, value: Any) -> Any:
    IRBuilder.name(name, value)
    return value


def parameters(names: Sequence[str], **dtypes: str) -> tuple[list[Buffer], list[Expr]]:
    """(flat buffers in the order of `dtypes`, int32 scalars called `names`)."""
    pointers = [(n, d, _named(n, T.arg(n, T.handle(d, "global")))) for n, d in dtypes.items()]
    scalars = [_named(n, T.arg(n, T.int32())) for n in names]
    return [_named(n, T.decl_buffer((_UNBOUNDED,), d, data=p)) for n, d, p in pointers], scalars


def i32(value: int) -> Expr:
    return tirx.IntImm("int32", value)


def let(name: str, value: Expr) -> Expr:
    """Evaluates `value` once, here."""
    return _named(name, T.Bind(i32(value) if isinstance(value, int) else value))


def kept(name: str, value: Expr) -> Expr:
    """The same for a value that is used often: TIR repeats what `let` binds, but not what memory holds."""
    memory = local(name, 1, str(value.ty))
    store(memory, 0, value)
    return load(memory, 0)


def store(buffer: Buffer, index: Expr, value: Expr) -> None:
    T.buffer_store(buffer, value, [i32(index) if isinstance(index, int) else index])


def load(buffer: Buffer, index: Expr, lanes: int = 1) -> Expr:
    """`lanes` consecutive elements; `index` must be a multiple of `lanes`."""
    index = i32(index) if isinstance(index, int) else index
    return buffer[T.ramp(index, 1, lanes)] if lanes > 1 else buffer[index]


def lane(vector: Expr, number: int) -> Expr:
    return T.Shuffle([vector], [i32(number)])


def local(name: str, size: int, dtype: str = "float32") -> Buffer:
    return _named(name, T.alloc_buffer((size,), dtype, scope="local"))


def shared(name: str, size: int, dtype: str = "float32") -> Buffer:
    return _named(name, T.alloc_buffer((size,), dtype, scope="shared"))


def barrier() -> None:
    T.evaluate(T.tvm_storage_sync("shared"))


@contextmanager
def threads(grid: Sequence[Expr], block: Sequence[int]) -> Iterator[tuple[list[Expr], list[Expr]]]:
    """Launches `grid` workgroups of `block` threads; yields (workgroup numbers, thread numbers)."""

    groups: list[Expr] = []
    items: list[Expr] = []
    frames = []
    for tag, extents, found in (("blockIdx", grid, groups), ("threadIdx", block, items)):
        for at, extent in enumerate(extents):
            frame = T.launch_thread(f"{tag}.{'xyz'[at]}", i32(extent) if isinstance(extent, int) else extent)
            found.append(_named(f"{'group' if tag == 'blockIdx' else 'thread'}_{'xyz'[at]}", frame.__enter__()))
            frames.append(frame)
    yield groups, items
    for frame in reversed(frames):
        frame.__exit__(None, None, None)


@contextmanager
def loop(name: str, extent: Expr) -> Iterator[Expr]:
    with T.serial(i32(0), i32(extent) if isinstance(extent, int) else extent) as var:
        yield _named(name, var)


@contextmanager
def when(condition: Expr | None) -> Iterator[None]:
    """The statements inside run where `condition` holds; None: always."""
    if condition is None:
        with nullcontext():
            yield
        return
    with T.If(condition), T.Then():
        yield


def strided(name: str, start: Expr, step: int, end: int) -> Iterator[Any]:
    """Context managers for the indices start, start + step, … below the constant `end`, `start` < `step`."""
    whole, rest = divmod(end, step)
    if whole:
        yield _strided_loop(name, start, step, whole)
    if rest:
        yield _strided_rest(name, start, whole * step, end)


@contextmanager
def _strided_loop(name: str, start: Expr, step: int, count: int) -> Iterator[Expr]:
    if count == 1:
        yield start
        return
    with loop(f"{name}_step", count) as at:
        yield let(name, start + at * i32(step))


@contextmanager
def _strided_rest(name: str, start: Expr, offset: int, end: int) -> Iterator[Expr]:
    with when(start < i32(end - offset)):
        yield let(name, start + i32(offset))


def reduce_workgroup(memory: Buffer, thread: Expr, count: int, value: Expr, combine: Callable[[Expr, Expr], Expr]) -> Expr:
    """Combines `value` over `count` threads (a power of two) in a fixed tree; all get the result. `memory` holds `count` elements."""
    store(memory, thread, value)
    barrier()
    half = count // 2
    while half:
        with when(thread < i32(half)):
            store(memory, thread, combine(load(memory, thread), load(memory, thread + i32(half))))
        barrier()
        half //= 2
    result = let("total", load(memory, 0))
    barrier()
    return result


def add(a: Expr, b: Expr) -> Expr:
    return a + b


def extern(dtype: str, name: str, *args: Expr) -> Expr:
    return T.call_pure_extern(dtype, name, *args)


def dot4(a: Expr, b: Expr) -> Expr:
    """Sum of the products of four signed bytes, exact."""
    return extern("int32", "dot4", a, b)


def halves(word: Expr) -> Expr:
    """The two fp16 of a word as fp32x2."""
    return extern("float32x2", "unpack_half2", word)


def rint(value: Expr) -> Expr:
    """Round to nearest, ties to even."""
    return extern("float32", "rint", value)


def sigmoid(value: Expr) -> Expr:
    return f32(1.0) / (f32(1.0) + T.exp(f32(0.0) - value))


def silu(value: Expr) -> Expr:
    return value * sigmoid(value)


def bits_to_float(word: Expr) -> Expr:
    return T.reinterpret("float32", word)


def float_to_bits(value: Expr) -> Expr:
    return T.reinterpret("int32", value)

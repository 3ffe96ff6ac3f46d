"""The GLSL generator: every kind of TIR node against numpy, on the Vulkan device of this machine (lavapipe, in CI)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import tirx
from tvm.target import Target
from tvm.tirx.script.builder import ir as T

from cfmoe.compile.codegen import glsl, glsl_expression, glsl_helpers, spirv, vulkan_build, walk
from cfmoe.compile.codegen.glsl_expression import Expressions
from cfmoe.compile.kernels.builder import build, f32
from cfmoe.compile.kernels.gpu import builder as b
from cfmoe.compile.kernels.gpu.builder import i32
from cfmoe.errors import CFMoEError
from gpu_device import VulkanDevice

THREADS, COUNT = 32, 96
HALF = frozenset({"float16", "storage16"})
rng = np.random.default_rng(3)
F = (rng.normal(size=COUNT) * 3).astype(np.float32)
G = (rng.normal(size=COUNT) * 3).astype(np.float32)
POSITIVE = np.abs(F) + np.float32(0.1)
N = rng.integers(-1000, 1000, COUNT).astype(np.int32)
J = np.where(N % 7 == 0, 3, N % 7 - 3).astype(np.int32)
J[J == 0] = 5
U = rng.integers(0, 1 << 32, COUNT, dtype=np.uint64).astype(np.uint32)
WORDS = U.view(np.int32)


@pytest.fixture(scope="module")
def device() -> VulkanDevice:
    return VulkanDevice()


def run(
    device: VulkanDevice,
    function: tirx.PrimFunc,
    buffers: Sequence[np.ndarray],
    scalars: Sequence[int] = (),
    grid: Sequence[int] = (COUNT // THREADS, 1, 1),
    features: frozenset[str] = frozenset(),
) -> list[np.ndarray]:
    """Generates, validates and runs; returns the buffers afterwards."""
    shader = glsl.emit(function, "kernel", features, 16384)
    assert set(shader.features) <= features
    given = [device.upload(array) for array in buffers]
    kernel = device.kernel(spirv.assemble("kernel", shader.source), spirv.entry_point("kernel"), shader.buffers, len(shader.scalars))
    kernel([(buffer, 0) for buffer in given], scalars, grid)
    return [buffer.array.copy() for buffer in given]


def pointwise(inputs: Sequence[np.ndarray], out: str, value: Callable[..., Any]) -> tirx.PrimFunc:
    """out[i] = value(inputs[0][i], …)."""

    def body() -> None:
        dtypes = {f"in{k}": str(array.dtype) for k, array in enumerate(inputs)}
        buffers, _ = b.parameters([], **dtypes, out=out)
        with b.threads((COUNT // THREADS,), (THREADS,)) as ((group,), (thread,)):
            at = b.let("at", group * i32(THREADS) + thread)
            b.store(buffers[-1], at, value(*(b.load(buffer, at) for buffer in buffers[:-1])))

    return b.build("kernel", body)


def cast(dtype: str) -> Callable[[Any], Any]:
    return lambda x: T.Cast(dtype, x)


def select(condition: Any) -> Any:
    return T.Select(condition, i32(1), i32(0))


def half(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float16).astype(np.float32)


def u32(value: int) -> Any:
    return tirx.IntImm("uint32", value)


def trunc_mod(a: np.ndarray, c: np.ndarray) -> np.ndarray:
    return np.fmod(a, c)


# name: inputs, type of the result, TIR, numpy
EXPRESSIONS: dict[str, tuple[Sequence[np.ndarray], str, Callable[..., Any], Callable[..., Any]]] = {
    "Add": ((F, G), "float32", lambda x, y: x + y, np.add),
    "Sub": ((F, G), "float32", lambda x, y: x - y, np.subtract),
    "Mul": ((F, G), "float32", lambda x, y: x * y, np.multiply),
    "Div": ((F, G), "float32", lambda x, y: x / y, np.divide),
    "Div_int": ((N, J), "int32", lambda x, y: T.truncdiv(x, y), lambda x, y: np.trunc(x / y)),
    "Mod": ((N, J), "int32", lambda x, y: T.truncmod(x, y), trunc_mod),
    "FloorDiv": ((N, J), "int32", lambda x, y: T.floordiv(x, y), np.floor_divide),
    "FloorDiv_power": ((N,), "int32", lambda x: T.floordiv(x, i32(8)), lambda x: x // 8),
    "FloorMod": ((N, J), "int32", lambda x, y: T.floormod(x, y), np.mod),
    "FloorMod_power": ((N,), "int32", lambda x: T.floormod(x, i32(8)), lambda x: x % 8),
    "FloorDiv_uint": ((U,), "uint32", lambda x: T.floordiv(x, u32(10)), lambda x: x // np.uint32(10)),
    "Min": ((F, G), "float32", T.min, np.minimum),
    "Max": ((N, J), "int32", T.max, np.maximum),
    "EQ": ((N,), "int32", lambda x: select(tirx.EQ(T.floormod(x, i32(4)), i32(0))), lambda x: x % 4 == 0),
    "NE": ((N,), "int32", lambda x: select(tirx.NE(T.floormod(x, i32(4)), i32(0))), lambda x: x % 4 != 0),
    "LT": ((F, G), "int32", lambda x, y: select(x < y), np.less),
    "LE": ((N, J), "int32", lambda x, y: select(x <= y), np.less_equal),
    "GT": ((F, G), "int32", lambda x, y: select(x > y), np.greater),
    "GE": ((N, J), "int32", lambda x, y: select(x >= y), np.greater_equal),
    "And": ((F, G), "int32", lambda x, y: select(T.And(x > f32(0.0), y > f32(0.0))), lambda x, y: (x > 0) & (y > 0)),
    "Or": ((F, G), "int32", lambda x, y: select(T.Or(x > f32(0.0), y > f32(0.0))), lambda x, y: (x > 0) | (y > 0)),
    "Not": ((F,), "int32", lambda x: select(T.Not(x > f32(0.0))), lambda x: ~(x > 0)),
    "Select": ((F, G), "float32", lambda x, y: T.Select(x > y, x, y * f32(2.0)), lambda x, y: np.where(x > y, x, y * 2)),
    "if_then_else": ((N, J), "int32", lambda x, y: T.if_then_else(x > y, x, i32(-7)), lambda x, y: np.where(x > y, x, -7)),
    "Cast_int": ((F,), "int32", cast("int32"), np.trunc),
    "Cast_float": ((N,), "float32", cast("float32"), lambda x: x),
    "Cast_int8": ((N,), "int32", lambda x: T.Cast("int32", T.Cast("int8", x)), lambda x: x.astype(np.int8)),
    "Cast_uint8": ((N,), "int32", lambda x: T.Cast("int32", T.Cast("uint8", x)), lambda x: x.astype(np.uint8)),
    "Cast_uint16": ((N,), "int32", lambda x: T.Cast("int32", T.Cast("uint16", x)), lambda x: x.astype(np.uint16)),
    "Cast_bool": ((N,), "int32", lambda x: T.Cast("int32", x > i32(0)), lambda x: x > 0),
    "Cast_uint32": ((U,), "float32", cast("float32"), lambda x: x),
    "int64": ((N,), "int32", lambda x: T.Cast("int32", T.Cast("int64", x) * tirx.IntImm("int64", 3)), lambda x: x * 3),
    "IntImm": ((N,), "int32", lambda x: x ^ i32(-(1 << 31)), lambda x: x ^ np.int32(-(1 << 31))),
    "FloatImm": ((F,), "float32", lambda x: T.max(x * f32(-1.5e-7), f32(float("-inf"))), lambda x: x * np.float32(-1.5e-7)),
    "shift_left": ((N,), "int32", lambda x: x << i32(5), lambda x: x << 5),
    "shift_right": ((N,), "int32", lambda x: x >> i32(3), lambda x: x >> 3),
    "bitwise_and": ((N, J), "int32", lambda x, y: x & y, np.bitwise_and),
    "bitwise_or": ((N, J), "int32", lambda x, y: x | y, np.bitwise_or),
    "bitwise_xor": ((N, J), "int32", lambda x, y: x ^ y, np.bitwise_xor),
    "bitwise_not": ((N,), "int32", T.bitwise_not, np.bitwise_not),
    "reinterpret": ((F,), "int32", lambda x: T.reinterpret("int32", x), lambda x: x.view(np.int32)),
    "reinterpret_back": ((N,), "float32", lambda x: T.reinterpret("float32", x), lambda x: x.view(np.float32)),
    "reinterpret_uint": ((U,), "int32", lambda x: T.reinterpret("int32", x), lambda x: x.view(np.int32)),
    "reinterpret_half": (
        (WORDS & 0x7BFF7BFF,),
        "float32",
        lambda x: T.Cast("float32", T.reinterpret("float16", T.Cast("uint16", x))),
        lambda x: (x & 0xFFFF).astype(np.uint16).view(np.float16),
    ),
    "exp": ((F,), "float32", T.exp, np.exp),
    "exp2": ((F,), "float32", T.exp2, np.exp2),
    "log": ((POSITIVE,), "float32", T.log, np.log),
    "log2": ((POSITIVE,), "float32", T.log2, np.log2),
    "sqrt": ((POSITIVE,), "float32", T.sqrt, np.sqrt),
    "rsqrt": ((POSITIVE,), "float32", T.rsqrt, lambda x: 1 / np.sqrt(x)),
    "sin": ((F,), "float32", T.sin, np.sin),
    "cos": ((F,), "float32", T.cos, np.cos),
    "tan": ((F / 4,), "float32", T.tan, np.tan),
    "tanh": ((F,), "float32", T.tanh, np.tanh),
    "pow": ((POSITIVE, G), "float32", T.pow, np.power),
    "floor": ((F,), "float32", T.floor, np.floor),
    "ceil": ((F,), "float32", T.ceil, np.ceil),
    "trunc": ((F,), "float32", T.trunc, np.trunc),
    "fabs": ((F,), "float32", T.fabs, np.abs),
    "nearbyint": ((F,), "float32", T.nearbyint, np.rint),
    "round": (((N / 2).astype(np.float32),), "float32", T.round, np.rint),
    "fma": ((F, G), "float32", lambda x, y: T.fma(x, y, x), lambda x, y: (x.astype(np.float64) * y + x).astype(np.float32)),
    "likely": ((F,), "int32", lambda x: select(tirx.likely(x > f32(0.0))), lambda x: x > 0),
    "call_pure_extern": ((F,), "float32", lambda x: T.call_pure_extern("float32", "expf", x), np.exp),
    "rint": ((F * 2,), "float32", b.rint, np.rint),
    "dot4": ((WORDS, WORDS[::-1].copy()), "int32", b.dot4, lambda x, y: (bytes4(x) * bytes4(y)).sum(1)),
    "unpack_half2": ((WORDS & 0x7BFF7BFF,), "float32", lambda x: b.lane(b.halves(x), 1), lambda x: x.view(np.float16)[1::2]),
    "pack_half2": (
        (F * 1e-6, F * 1e4),
        "int32",
        lambda x, y: b.extern("int32", "pack_half2", x, y),
        lambda x, y: np.stack([x, y], 1).astype(np.float16).view(np.int32)[:, 0],
    ),
}
# GLSL promises less of these than numpy computes.
LOOSE = {"sin", "cos", "tan", "tanh", "pow", "exp", "exp2", "log", "log2"}


def bytes4(words: np.ndarray) -> np.ndarray:
    return words.view(np.int8).reshape(-1, 4).astype(np.int32)


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("name", EXPRESSIONS)
def test_expression(device: VulkanDevice, name: str) -> None:
    inputs, out, value, oracle = EXPRESSIONS[name]
    result = run(device, pointwise(inputs, out, value), [*inputs, np.zeros(COUNT, out)])[-1]
    expected = np.asarray(oracle(*inputs)).astype(out)
    if out == "float32":
        tolerance = 2e-4 if name in LOOSE else 1e-6
        np.testing.assert_allclose(result, expected, rtol=tolerance, atol=tolerance)
    else:
        np.testing.assert_array_equal(result, expected)


def test_integer_dot_in_hardware_has_the_same_sums(device: VulkanDevice) -> None:
    inputs, out, value, oracle = EXPRESSIONS["dot4"]
    function = pointwise(inputs, out, value)
    assert "OpSDot" not in glsl.emit(function, "kernel", frozenset(), 0).source
    result = run(device, function, [*inputs, np.zeros(COUNT, out)], features=frozenset({"integer_dot"}))[-1]
    np.testing.assert_array_equal(result, oracle(*inputs))


def shuffled(x: Any) -> Any:
    return b.extern("float32", "shuffle_xor", x, i32(1))


def test_subgroup_shuffle(device: VulkanDevice) -> None:
    result = run(device, pointwise((F,), "float32", shuffled), [F, np.zeros_like(F)], features=frozenset({"subgroup_shuffle"}))[-1]
    np.testing.assert_array_equal(result, F.reshape(-1, 2)[:, ::-1].reshape(-1))


@pytest.mark.parametrize(
    "features", [frozenset(), frozenset({"float16"}), frozenset({"storage16"}), HALF], ids=["words", "float16", "storage16", "both"]
)
def test_halves(device: VulkanDevice, features: frozenset[str]) -> None:
    """Loads, arithmetic and stores of fp16, single and in vectors, with and without what the device could have."""

    def single() -> None:
        (x, y, out), _ = b.parameters([], x="float16", y="float16", out="float16")
        with b.threads((COUNT // THREADS,), (THREADS,)) as ((group,), (thread,)):
            at = b.let("at", group * i32(THREADS) + thread)
            b.store(out, at, T.exp(b.load(x, at)) * b.load(y, at) + tirx.FloatImm("float16", 0.5))

    def vector() -> None:
        (x, y, out), _ = b.parameters([], x="float16", y="float16", out="float16")
        with b.threads((1,), (COUNT // 4,)) as (_, (thread,)):
            at = b.let("at", thread * i32(4))
            T.buffer_store(out, b.load(x, at, 4) * b.load(y, at, 4), [T.ramp(at, 1, 4)])

    x, y = (F / 4).astype(np.float16), (G / 4).astype(np.float16)
    result = run(device, b.build("kernel", single), [x, y, np.ones(COUNT, np.float16)], features=features)[-1]
    expected = np.exp(x.astype(np.float32)) * y.astype(np.float32) + 0.5
    np.testing.assert_allclose(result.astype(np.float32), expected, rtol=2e-3, atol=2e-3)
    result = run(device, b.build("kernel", vector), [x, y, np.ones(COUNT, np.float16)], grid=(1, 1, 1), features=features)[-1]
    np.testing.assert_allclose(result.astype(np.float32), x.astype(np.float32) * y.astype(np.float32), rtol=1e-3, atol=1e-6)


VECTORS: dict[str, tuple[Callable[[Any, Any], Any], Callable[[np.ndarray, np.ndarray], np.ndarray]]] = {
    "arithmetic": (lambda x, y: x * y + x, lambda x, y: x * y + x),
    "Broadcast": (lambda x, y: x + T.broadcast(f32(2.0), 4) * y, lambda x, y: x + 2 * y),
    "Shuffle": (
        lambda x, y: T.Shuffle([x, y], [i32(k) for k in (1, 0, 7, 6)]),
        lambda x, y: np.stack([x[:, 1], x[:, 0], y[:, 3], y[:, 2]], 1),
    ),
    "Select": (lambda x, y: T.Select(x < y, x, y), np.minimum),
    "Ramp": (lambda x, _y: x * T.Cast("float32x4", T.ramp(i32(3), 2, 4)), lambda x, _y: x * np.array([3, 5, 7, 9], np.float32)),
    "function": (lambda x, _y: T.exp(x), lambda x, _y: np.exp(x)),
    "Min": (lambda x, y: T.max(T.min(x, y), T.broadcast(f32(-1.0), 4)), lambda x, y: np.maximum(np.minimum(x, y), -1)),
}


def by_fours(value: Callable[[Any, Any], Any]) -> tirx.PrimFunc:
    """out[4 * i:][:4] = value(x[4 * i:][:4], y[4 * i:][:4])."""

    def body() -> None:
        (x, y, out), _ = b.parameters([], x="float32", y="float32", out="float32")
        with b.threads((1,), (COUNT // 4,)) as (_, (thread,)):
            at = b.let("at", thread * i32(4))
            T.buffer_store(out, value(b.load(x, at, 4), b.load(y, at, 4)), [T.ramp(at, 1, 4)])

    return b.build("kernel", body)


@pytest.mark.parametrize("name", VECTORS)
def test_vectors_of_four(device: VulkanDevice, name: str) -> None:
    value, oracle = VECTORS[name]
    result = run(device, by_fours(value), [F, G, np.zeros(COUNT, np.float32)], grid=(1, 1, 1))[-1]
    np.testing.assert_allclose(result.reshape(-1, 4), oracle(F.reshape(-1, 4), G.reshape(-1, 4)), rtol=1e-5)


def test_pairs_and_local_vectors(device: VulkanDevice) -> None:
    """Two lanes, and vectors in local memory, which is an array of scalars."""

    def body() -> None:
        (x, out), _ = b.parameters([], x="float32", out="float32")
        with b.threads((1,), (COUNT // 4,)) as (_, (thread,)):
            kept = b.local("kept", 4)
            at = b.let("at", thread * i32(4))
            T.buffer_store(kept, b.load(x, at, 4), [T.ramp(i32(0), 1, 4)])
            T.buffer_store(out, b.load(kept, 2, 2), [T.ramp(at, 1, 2)])
            T.buffer_store(out, b.load(kept, 0, 2), [T.ramp(at + i32(2), 1, 2)])

    result = run(device, b.build("kernel", body), [F, np.zeros_like(F)], grid=(1, 1, 1))[-1]
    np.testing.assert_array_equal(result.reshape(-1, 4), F.reshape(-1, 4)[:, [2, 3, 0, 1]])


def test_names_of_vectors_are_taken(device: VulkanDevice) -> None:
    """A buffer that is read in vectors has a second name, which a variable that is numbered must not get."""

    def body() -> None:
        (x, out), _ = b.parameters([], x="float32", out="float32")
        with b.threads((1,), (COUNT // 4,)) as (_, (thread,)):
            at = b.let("at", thread * i32(4))
            values = [b.let("x", b.load(x, at + i32(i))) for i in range(4)]
            vector = b.let("vector", b.load(x, at, 4))
            for i, value in enumerate(values):
                b.store(out, at + i32(i), value + b.lane(vector, i))

    result = run(device, b.build("kernel", body), [F, np.zeros_like(F)], grid=(1, 1, 1))[-1]
    np.testing.assert_array_equal(result, F + F)


def statements() -> tirx.PrimFunc:
    """Loops, conditions, local and shared memory, barriers and scalars: a reversed prefix sum of what passes a threshold."""

    def body() -> None:
        (x, out), (first, limit) = b.parameters(["first", "limit"], x="int32", out="int32")
        with b.threads((COUNT // THREADS,), (THREADS,)) as ((group,), (thread,)):
            held, total = b.shared("held", THREADS, "int32"), b.local("total", 2, "int32")
            at = b.let("at", group * i32(THREADS) + thread)
            with T.If(b.load(x, at) > limit):
                with T.Then():
                    b.store(held, i32(THREADS - 1) - thread, b.load(x, at))
                with T.Else():
                    b.store(held, i32(THREADS - 1) - thread, i32(0))
            b.barrier()
            b.store(total, 0, i32(0))
            with T.serial(first, thread + i32(1)) as k:
                b.store(total, 0, b.load(total, 0) + b.load(held, k))
            b.store(total, 1, i32(0))
            with T.While(b.load(total, 1) < i32(3)):
                b.store(total, 1, b.load(total, 1) + i32(1))
            T.evaluate(i32(0))
            b.store(out, at, b.load(total, 0) * b.load(total, 1))

    return b.build("kernel", body)


def test_statements(device: VulkanDevice) -> None:
    result = run(device, statements(), [N, np.zeros_like(N)], scalars=(2, -100))[-1]
    held = np.where(N > -100, N, 0).reshape(-1, THREADS)[:, ::-1].copy()
    held[:, :2] = 0
    np.testing.assert_array_equal(result.reshape(-1, THREADS), np.cumsum(held, 1) * 3)


def lazy_let(x: Any) -> Any:
    v = tirx.Var("v", "int32")
    return T.if_then_else(x > i32(0), tirx.Let(v, T.truncdiv(i32(1000), x), v + v), i32(-1))


def test_lazy_branches_do_not_read(device: VulkanDevice) -> None:
    """Let inside a lazy branch stays there: the index is out of range where the condition does not hold."""
    result = run(device, pointwise((N,), "int32", lazy_let), [N, np.zeros_like(N)])[-1]
    np.testing.assert_array_equal(result, np.where(N > 0, 1000 // np.where(N > 0, N, 1) * 2, -1))


def test_every_kind_of_node_has_an_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the generator has a form for is met in the functions that are compared with numpy above."""
    met: set[str] = set()
    text, statement = Expressions.text, glsl._Writer._statement

    def watched_text(self: Expressions, node: Any) -> str:
        name = walk.operator(node)
        met.add(str(node.args[0].value) if name == "call_pure_extern" else name or type(node).__name__)
        return text(self, node)

    def watched_statement(self: glsl._Writer, node: Any) -> None:
        met.add(type(node).__name__)
        statement(self, node)

    monkeypatch.setattr(Expressions, "text", watched_text)
    monkeypatch.setattr(glsl._Writer, "_statement", watched_statement)
    functions = [pointwise(inputs, out, value) for inputs, out, value, _ in EXPRESSIONS.values()]
    functions += [by_fours(value) for value, _ in VECTORS.values()]
    for function in [*functions, statements(), pointwise((N,), "int32", lazy_let), pointwise((F,), "float32", shuffled)]:
        glsl.emit(function, "kernel", frozenset({"subgroup_shuffle"}), 16384)
    kinds = {name for name, kind in vars(tirx).items() if isinstance(kind, type)} | {"TensorLoad"}
    known = {name for name in kinds if hasattr(Expressions, f"_{name.lower()}") or hasattr(glsl._Writer, f"_{name.lower()}")}
    known |= {*glsl_expression._BINARY, *glsl_expression._COMPARE, *glsl_expression._OPERATORS, "Min", "Max"}
    known |= {*glsl_expression._FUNCTIONS, "if_then_else", "likely", "reinterpret"}
    known |= glsl_helpers.NAMES - {"floor_div", "floor_mod"}  # which are FloorDiv and FloorMod
    assert {"For", "While", "Let", "Ramp", "TensorLoad"} <= known
    assert sorted(known - met) == []


def test_axes_of_the_launch(device: VulkanDevice) -> None:
    def body() -> None:
        (out,), _ = b.parameters([], out="int32")
        with b.threads((2, 3, 2), (4, 2, 2)) as ((gx, gy, gz), (x, y, z)):
            group = b.let("group", (gz * i32(3) + gy) * i32(2) + gx)
            item = b.let("item", (z * i32(2) + y) * i32(4) + x)
            b.store(out, group * i32(16) + item, group * i32(100) + item)

    result = run(device, b.build("kernel", body), [np.zeros(12 * 16, np.int32)], grid=(2, 3, 2))[-1]
    expected = np.arange(12)[:, None] * 100 + np.arange(16)
    np.testing.assert_array_equal(result.reshape(12, 16), expected)


def test_tvm_compile_uses_it(device: VulkanDevice) -> None:
    """A scheduled function with multi-dimensional buffers and a host part, as TVM's own pipeline lowers it."""

    def body() -> None:
        x, out = (T.match_buffer(T.arg(name, T.handle()), (6, 32), "float32") for name in ("x", "out"))
        with T.thread_binding(0, 6, thread="blockIdx.x") as i, T.thread_binding(0, 32, thread="threadIdx.x") as j:
            T.buffer_store(out, T.exp(x[i, j]) * f32(2.0), [i, j])

    scaled = build("scaled", {}, body)

    built = tvm.compile(tvm.IRModule({"scaled": scaled}), target=Target({"kind": "vulkan", "host": "llvm"}))
    source = built.mod.imports[0].inspect_source()
    ((name, code),) = vulkan_build.spirv_of(source).items()
    x = rng.normal(size=(6, 32)).astype(np.float32)
    given = [device.upload(x), device.upload(np.zeros_like(x))]
    order = [0, 1] if "readonly buffer" in source.split("binding = 1")[0] else [1, 0]
    device.kernel(code, name, 2, 0)([(given[k], 0) for k in order], [], (6, 1, 1))
    np.testing.assert_allclose(given[1].array, np.exp(x) * 2, rtol=1e-5)


def test_what_glsl_cannot_say_is_refused() -> None:
    doubles = pointwise((F,), "float32", lambda x: T.Cast("float32", T.exp(T.Cast("float64", x))))
    with pytest.raises(CFMoEError, match="float64"):
        glsl.emit(doubles, "kernel", frozenset(), 0)
    unknown = pointwise((F,), "float32", lambda x: T.call_pure_extern("float32", "lgamma", x))
    with pytest.raises(CFMoEError, match="lgamma"):
        glsl.emit(unknown, "kernel", frozenset(), 0)

    def greedy() -> None:
        (out,), _ = b.parameters([], out="float32")
        with b.threads((1,), (32,)) as (_, (thread,)):
            memory = b.shared("memory", 8192)
            b.store(memory, thread, f32(0.0))
            b.store(out, thread, b.load(memory, thread))

    function = b.build("kernel", greedy)
    with pytest.raises(CFMoEError, match="32768 bytes of shared memory"):
        glsl.emit(function, "kernel", frozenset(), 16384)
    assert glsl.emit(function, "kernel", frozenset(), 32768).shared_bytes == 32768


def test_a_shader_that_does_not_compile_is_an_error() -> None:
    with pytest.raises(CFMoEError, match="refuses the shader of kernel broken"):
        spirv.assemble("broken", "#version 450\nvoid main() { nonsense }\n")


def test_what_the_validator_refuses_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An optimiser that writes nonsense: its output lets every number be 0 or 1, far fewer than there are."""
    wrong = tmp_path / "spirv-opt"
    code = (
        "import sys, struct; s, _, o = sys.argv[-3:]; b = open(s, 'rb').read(); open(o, 'wb').write(b[:12] + struct.pack('<I', 2) + b[16:])"
    )
    wrong.write_text(f"#!{sys.executable}\n{code}\n")
    wrong.chmod(0o755)
    tool = spirv._tool
    monkeypatch.setattr(spirv, "_tool", lambda *names: str(wrong) if names == ("spirv-opt",) else tool(*names))
    with pytest.raises(CFMoEError, match=r"spirv-val refuses the shader of kernel sound: .*bound"):
        spirv.assemble("sound", "#version 450\nvoid main() { }\n")


def test_no_shuffle_inside_a_branch() -> None:
    """Neither under an if nor in a lazy operand: on GPUs lanes that do not take part give garbage (lavapipe hides it)."""

    def branch() -> None:
        (x, out), _ = b.parameters([], x="float32", out="float32")
        with b.threads((1,), (THREADS,)) as (_, (thread,)), b.when(thread < i32(3)):
            b.store(out, thread, shuffled(b.load(x, thread)))

    features = frozenset({"subgroup_shuffle"})
    for function in (b.build("kernel", branch), pointwise((F,), "float32", lambda x: T.Select(x > f32(0.0), shuffled(x), x))):
        with pytest.raises(CFMoEError, match="shuffle_xor inside a branch"):
            glsl.emit(function, "kernel", features, 0)

"""Every CPU target computes the same bits: the elementary functions, and the logits of whole models."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
import tvm_ffi
from tvm.tirx.script.builder import ir as T

from cfmoe.compile import compile_model, targets
from cfmoe.compile.kernels import builder
from cfmoe.compile.kernels.builder import i64, let, load, loop, store, tensor
from cfmoe.runtime import Engine
from test_kernels import RUNNABLE, aligned
from tiny_families import random_tokens, tiny_checkpoint

COUNT = 1 << 16
FUNCTIONS: dict[str, tuple[Callable[..., Any], int, int]] = {
    "fma": (builder.fma, 3, 1),
    "exp": (builder.exp, 1, 1),
    "sin_cos": (builder.sin_cos, 1, 2),
}


def _elementwise(name: str, lanes: int) -> Any:
    function, inputs, outputs = FUNCTIONS[name]

    def body() -> None:
        sources = [tensor(f"in{i}", (COUNT,), "float32") for i in range(inputs)]
        out = [tensor(f"out{i}", (COUNT,), "float32") for i in range(outputs)]
        with loop(COUNT // lanes) as step:
            at = let(step * i64(lanes))
            results = function(*(load(s, at, lanes=lanes) if lanes > 1 else s[at] for s in sources), lanes)
            for buffer, value in zip(out, results if isinstance(results, tuple) else (results,), strict=True):
                if lanes > 1:
                    store(buffer, value, at, lanes=lanes)
                else:
                    T.buffer_store(buffer, value, [at])

    return builder.build(f"{name}_{lanes}", {}, body)


def _inputs(name: str) -> list[np.ndarray]:
    rng = np.random.default_rng(7)
    if name == "fma":
        a, b = (rng.standard_normal(COUNT).astype(np.float32) for _ in range(2))
        # Sums that cancel to every degree, where one rounding and two differ.
        c = (-(a * b) + rng.standard_normal(COUNT) * np.exp2(rng.integers(-40, 3, COUNT))).astype(np.float32)
        return [a, b, c]
    if name == "exp":
        return [np.concatenate([rng.uniform(-87, 88, COUNT - 4), [-87, 88, 0, -0.0]]).astype(np.float32)]
    positions = rng.integers(0, 1 << 17, COUNT // 2) * rng.choice([1.0, 0.1, 0.0123], COUNT // 2)
    return [np.concatenate([positions, rng.uniform(-(2**20), 2**20, COUNT // 2)]).astype(np.float32)]


def _results(target: targets.CpuTarget, name: str) -> list[np.ndarray]:
    """The outputs in lanes of 16, after seeing that one lane at a time gives them too."""
    with builder.multiply_adds(target.simd.fused):
        functions = {f"{name}_{lanes}": _elementwise(name, lanes) for lanes in (1, 16)}
    module = tvm.compile(tvm.IRModule(functions), target=target.tvm_target())
    inputs = [aligned(x) for x in _inputs(name)]
    per_width = []
    for function in functions:
        out = [aligned(np.zeros(COUNT, np.float32)) for _ in range(FUNCTIONS[name][2])]
        module[function](*(tvm_ffi.from_dlpack(x) for x in (*inputs, *out)))
        per_width.append(out)
    for narrow, wide in zip(*per_width, strict=True):
        np.testing.assert_array_equal(narrow.view(np.int32), wide.view(np.int32))
    return per_width[1]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_elementary_functions_are_the_same_on_every_target(name: str) -> None:
    assert len(RUNNABLE) > 1 or targets.host_arch() != "x86_64"
    first, *others = (_results(target, name) for target in RUNNABLE)
    for other in others:
        for a, b in zip(first, other, strict=True):
            np.testing.assert_array_equal(a.view(np.int32), b.view(np.int32))
    inputs = [x.astype(np.float64) for x in _inputs(name)]
    if name == "exp":
        exact = np.exp(inputs[0])
        assert (np.abs(first[0] - exact) <= np.spacing(exact.astype(np.float32))).all()
    elif name == "sin_cos":
        for got, function in zip(first, (np.sin, np.cos), strict=True):
            assert np.abs(got - function(inputs[0])).max() <= 1e-7
    else:
        for a, b, c, got in zip(*(x[:500] for x in inputs), first[0], strict=False):
            exact_sum = Fraction(a) * Fraction(b) + Fraction(c)
            neighbours = (got, np.nextafter(got, np.float32(np.inf)), np.nextafter(got, np.float32(-np.inf)))
            assert min(abs(Fraction(float(n)) - exact_sum) for n in neighbours) == abs(Fraction(float(got)) - exact_sum)


def _logits(case: str, quant: str, chosen: list[targets.CpuTarget], tmp_path: Path, demo_model: Path) -> list[np.ndarray]:
    model = tiny_checkpoint(case, tmp_path / "model", demo_model / "tokenizer.json")
    logits = []
    for target in chosen:
        artifact = compile_model(model, tmp_path / target.name, quant=quant, targets=[target.name], prefill_chunk=64)
        with Engine(artifact) as engine, engine.session() as session:
            logits.append(np.array(session.feed(random_tokens(150))))
    return logits


@pytest.mark.parametrize(("case", "quant"), [pytest.param("gpt_oss", "mixed", marks=pytest.mark.slow), ("qwen3_moe", "f32")])
def test_logits_are_the_same_on_every_target_with_fused_multiply_adds(case: str, quant: str, tmp_path: Path, demo_model: Path) -> None:
    first, *others = _logits(case, quant, [t for t in RUNNABLE if t.simd.fused], tmp_path, demo_model)
    for other in others:
        np.testing.assert_array_equal(other.view(np.int32), first.view(np.int32))


@pytest.mark.slow
def test_logits_are_the_same_without_fused_multiply_adds(tmp_path: Path, demo_model: Path) -> None:
    """The plain target takes a minute to compile."""
    with_and_without = [RUNNABLE[0], *(t for t in RUNNABLE if not t.simd.fused)]
    first, *others = _logits("gpt_oss", "mixed", with_and_without, tmp_path, demo_model)
    for other in others:
        np.testing.assert_array_equal(other.view(np.int32), first.view(np.int32))

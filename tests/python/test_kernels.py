"""Kernels and packing against numpy, for every CPU target that this machine runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import tvm
import tvm_ffi

from cfmoe.compile import quantise, targets
from cfmoe.compile.decoder_config import ClampedSwiglu
from cfmoe.compile.kernels import activation, expert, linear
from cfmoe.compile.kernels.expert import ExpertShape
from cfmoe.compile.kernels.linear import LinearShape

FORMATS = ("q4", "q8", "f16", "f32")
HIDDEN, FFN, OUTPUTS, ROWS = 96, 64, 150, 7
EXPERTS = {fmt: ExpertShape(fmt, HIDDEN, FFN) for fmt in FORMATS}
EXPERTS |= {f"{fmt}_biased": ExpertShape(fmt, HIDDEN, FFN, bias=True, swiglu=ClampedSwiglu(1.7, 0.5)) for fmt in ("q4", "f16")}
RUNNABLE = [t for t in targets.CPU_TARGETS if t.arch == targets.resolve("llvm").arch and set(t.features) <= targets.host_features()]
rng = np.random.default_rng(5)


def aligned(array: np.ndarray) -> np.ndarray:
    raw = np.zeros(array.nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    view = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    view[...] = array
    return view


def call(function: Any, *args: Any) -> None:
    function(*(tvm_ffi.from_dlpack(a) if isinstance(a, np.ndarray) else a for a in args))


def kernel_functions(
    target: targets.CpuTarget, formats: Sequence[str] = FORMATS, experts: dict[str, ExpertShape] = EXPERTS, embeddings: bool = True
) -> dict[str, Any]:
    """The kernels of `formats` and `experts` by name."""
    functions = {"quantise": activation.quantise("quantise", None, HIDDEN)}
    for fmt in formats:
        functions[f"linear_{fmt}"] = linear.linear(
            f"linear_{fmt}", target.simd, LinearShape(fmt, HIDDEN, OUTPUTS, bias=True, residual=True)
        )
        if embeddings:
            functions[f"embedding_{fmt}"] = linear.embedding(f"embedding_{fmt}", fmt, OUTPUTS, HIDDEN, None)
    for kind, shape in experts.items():
        for phase in ("prefill", "decode"):
            for part, emit in (("gate_up", expert.gate_up), ("down", expert.down)):
                name = f"{part}_{kind}_{phase}"
                functions[name] = emit(name, target.simd, shape, phase == "decode")
    return functions


@pytest.fixture(scope="module", params=RUNNABLE, ids=lambda t: t.name)
def built(request: pytest.FixtureRequest) -> Any:
    target = request.param
    return tvm.compile(tvm.IRModule(kernel_functions(target)), target=target.tvm_target())


def activations(built: Any, fmt: str, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(what the kernel reads, the same as fp32 values)."""
    if not fmt.startswith("q"):
        return x, x
    out = aligned(np.zeros((len(x), HIDDEN // 32 * 10), np.int32))
    call(built["quantise"], x, out)
    groups = out.reshape(len(x), -1, 10)
    codes = np.ascontiguousarray(groups[:, :, :8]).view(np.int8).reshape(len(x), -1, 32).astype(np.float32)
    np.testing.assert_array_equal(codes.sum(2), groups[:, :, 9])
    scales = np.ascontiguousarray(groups[:, :, 8]).view(np.float32)
    return out, (codes * scales[:, :, None]).reshape(len(x), HIDDEN)


@pytest.mark.parametrize("fmt", FORMATS)
def test_linear_and_embedding(built: Any, fmt: str) -> None:
    weight = rng.normal(size=(OUTPUTS, HIDDEN)).astype(np.float32)
    packed = aligned(quantise.pack(weight, fmt).reshape(-1))
    stored = quantise.unpack(packed, fmt, OUTPUTS, HIDDEN)
    x = aligned(rng.normal(size=(ROWS, HIDDEN)).astype(np.float32))
    bias, residual = (aligned(rng.normal(size=s).astype(np.float32)) for s in ((OUTPUTS,), (ROWS, OUTPUTS)))
    given, values = activations(built, fmt, x)
    out = aligned(np.zeros((ROWS, OUTPUTS), np.float32))
    call(built[f"linear_{fmt}"], given, packed, bias, residual, out)
    np.testing.assert_allclose(out, values @ stored.T + bias + residual, atol=2e-5, rtol=2e-5)
    tokens = aligned(np.array([0, 1, 31, 32, OUTPUTS - 1], np.int32))
    rows = aligned(np.zeros((5, HIDDEN), np.float32))
    call(built[f"embedding_{fmt}"], tokens, packed, rows)
    np.testing.assert_array_equal(rows, stored[tokens])


@pytest.mark.parametrize("kind", EXPERTS)
def test_expert_kernels(built: Any, kind: str) -> None:
    shape = EXPERTS[kind]
    fmt = shape.format
    gate, up, down = (rng.normal(size=s).astype(np.float32) / 8 for s in ((FFN, HIDDEN), (FFN, HIDDEN), (HIDDEN, FFN)))
    parts = [quantise.pack_interleaved(gate, up, fmt).reshape(-1), quantise.pack(down, fmt).reshape(-1)]
    stored = [quantise.unpack(quantise.pack(w, fmt), fmt, *w.shape) for w in (gate, up, down)]
    biases = np.zeros(2 * FFN + HIDDEN, np.float32)
    if shape.bias:
        biases = (rng.normal(size=biases.size) / 4).astype(np.float16).astype(np.float32)
        # Per tile of 32 outputs those of the gate, then those of the up projection.
        tiles = np.stack([biases[:FFN].reshape(-1, 32), biases[FFN : 2 * FFN].reshape(-1, 32)], axis=1).reshape(-1)
        gate_up_bias, down_bias = (
            b.view(np.int32) if fmt == "q4" else b.astype(np.float16) for b in (tiles, np.ascontiguousarray(biases[2 * FFN :]))
        )
        parts = [parts[0], gate_up_bias, parts[1], down_bias]
    slab = aligned(np.concatenate([np.zeros(128, parts[0].dtype), *parts]))
    sections = expert.record_sections(fmt, HIDDEN, FFN, shape.bias)
    assert sum(size for _, size in sections.values()) == slab.nbytes - 128 * slab.itemsize
    offset = 128 * slab.itemsize // 4
    x = aligned(rng.normal(size=(ROWS, HIDDEN)).astype(np.float32))
    given, values = activations(built, fmt, x)
    g, u = values @ stored[0].T + biases[:FFN], values @ stored[1].T + biases[FFN : 2 * FFN]
    if shape.swiglu is not None:
        g, u = np.minimum(g, 0.5), np.clip(u, -0.5, 0.5) + 1
    expected = (g / (1 + np.exp(-g * (1.7 if shape.swiglu else 1.0))) * u) @ stored[2].T + biases[2 * FFN :]
    outs = []
    for phase in ("prefill", "decode"):
        out = aligned(np.zeros((ROWS, HIDDEN), np.float32))
        order = np.arange(ROWS, dtype=np.int32)[::-1]
        for rows in [order] if phase == "prefill" else order.reshape(-1, 1):
            rows = aligned(rows)
            scratch = aligned(np.zeros((len(rows), expert.scratch_width(fmt, FFN)), given.dtype))
            # Two halves of the tiles, as two threads would take them.
            for begin, end in ((0, 1), (1, FFN // 32)):
                call(built[f"gate_up_{kind}_{phase}"], given, rows, slab, scratch, offset, begin, end)
            for begin, end in ((2, HIDDEN // 32), (0, 2)):
                call(built[f"down_{kind}_{phase}"], scratch, rows, slab, out, offset, begin, end)
        outs.append(out)
    # Between the projections q4 and q8 round to int8: an error of half a step of 1/127.
    tolerance = 2e-2 if fmt.startswith("q") else 1e-5
    np.testing.assert_allclose(outs[0], expected, atol=tolerance * np.abs(expected).max())
    np.testing.assert_array_equal(outs[0], outs[1])


def test_searched_scales_beat_the_largest_over_seven() -> None:
    weight = rng.normal(size=(64, 512)).astype(np.float32)
    groups = weight.reshape(-1, 32)
    scale = (np.abs(groups).max(1) / 7).astype(np.float16).astype(np.float32)[:, None]
    naive = np.square(np.rint(groups / scale) * scale - groups).sum()
    searched = np.square(quantise.unpack(quantise.pack(weight, "q4"), "q4", 64, 512) - weight).sum()
    assert searched < 0.8 * naive


def test_zero_and_constant_groups_survive() -> None:
    weight = np.zeros((32, 64), np.float32)
    weight[:, 32:] = 0.25
    for fmt in FORMATS:
        np.testing.assert_allclose(quantise.unpack(quantise.pack(weight, fmt), fmt, 32, 64), weight, atol=2e-3)


def test_inputs_that_are_no_multiple_of_32_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 32"):
        quantise.pack(np.zeros((32, 40), np.float32), "q4")

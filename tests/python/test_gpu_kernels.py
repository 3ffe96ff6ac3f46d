"""GPU kernels against numpy and against the CPU's engine, on the Vulkan device of this machine (lavapipe, in CI) and on PoCL."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tvm import tirx

from cfmoe.compile import compile_model, gpu, quantise
from cfmoe.compile.codegen.kernel_set import KernelSet, build_source, build_vulkan
from cfmoe.compile.decoder_config import ClampedSwiglu
from cfmoe.compile.kernels.attention import AttentionShape
from cfmoe.compile.kernels.expert import ExpertShape, scratch_width
from cfmoe.compile.kernels.gpu import attention, attention_decode, expert, linear, rope, rowwise
from cfmoe.compile.kernels.gpu.profiles import PROFILES
from cfmoe.compile.kernels.linear import LinearShape
from cfmoe.errors import CFMoEError
from cfmoe.runtime import Engine
from gpu_device import VulkanDevice
from gpu_opencl import OpenClDevice
from gpu_oracle import GpuOracle, evaluate
from tiny_families import random_tokens, tiny_checkpoint

FORMATS = ("q4", "q8", "f16", "f32")
HIDDEN, FFN, OUTPUTS, ROWS = 96, 64, 150, 37
Emit = Callable[[str], tirx.PrimFunc]


class Runner:
    """Kernels of one profile on a device."""

    def __init__(self, target: str) -> None:
        chosen = gpu.resolve(target)
        assert chosen is not None
        self.kind, self.profile = chosen.device, chosen.profile
        self.device: Any = OpenClDevice() if self.kind == "opencl" else VulkanDevice()

    def build(self, functions: dict[str, tirx.PrimFunc]) -> KernelSet:
        return (
            build_source(functions, self.profile, self.kind, None) if self.kind == "opencl" else build_vulkan(functions, self.profile, None)
        )

    def __call__(self, emit: Emit, arrays: list[np.ndarray], scalars: list[int] | None = None) -> list[np.ndarray]:
        """Runs one kernel; returns the buffers afterwards. What it does not say it writes must not change."""
        kernels = self.build({"tested": emit("tested")})
        entry = kernels.entries["tested"]
        begin, size = entry["code"]
        code = kernels.library[begin : begin + size]
        kernel = self.device.kernel(code, entry["entry"], entry["buffers"], entry["scalars"], entry["local"])
        buffers = [self.device.upload(a) for a in arrays]
        values = scalars or []
        kernel([(b, 0) for b in buffers], values, [evaluate(e, {f"s{i}": v for i, v in enumerate(values)}) for e in entry["grid"]])
        results = [b.array.copy() for b in buffers]
        for i, (before, after) in enumerate(zip(arrays, results, strict=True)):
            assert i in entry["writes"] or np.array_equal(before, after, equal_nan=True)
        return results


SLOW = [pytest.param(target, marks=pytest.mark.slow) for target in ("vulkan-desktop", "opencl-generic")]


@pytest.fixture(scope="module", params=["vulkan-generic", *SLOW])
def run(request: pytest.FixtureRequest) -> Runner:
    return Runner(request.param)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(9)


def groups_of(x: np.ndarray) -> np.ndarray:
    """Quantised activations of x, int32 (rows, width / 32 * 10)."""
    g = x.reshape(len(x), -1, 32)
    largest = np.abs(g).max(2, keepdims=True)
    inverse = np.where(largest > 0, np.float32(127) / np.where(largest > 0, largest, 1), 0).astype(np.float32)
    codes = np.rint(g * inverse).astype(np.int8)
    words = np.ascontiguousarray(codes).view(np.int32)
    scale = (largest / np.float32(127)).astype(np.float32).view(np.int32)
    return np.concatenate([words, scale, codes.sum(2, keepdims=True, dtype=np.int32)], 2).reshape(len(x), -1)


def values_of(groups: np.ndarray) -> np.ndarray:
    g = groups.reshape(len(groups), -1, 10)
    codes = np.ascontiguousarray(g[:, :, :8]).view(np.int8).reshape(len(groups), -1, 32).astype(np.float32)
    return (codes * np.ascontiguousarray(g[:, :, 8:9]).view(np.float32)).reshape(len(groups), -1)


def activation(fmt: str, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(what a kernel reads, the same as fp32)."""
    if not fmt.startswith("q"):
        return x, x
    groups = groups_of(x)
    return groups, values_of(groups)


@pytest.mark.parametrize("width", [96, 2048])
def test_quantise_and_norms(run: Runner, rng: np.random.Generator, width: int) -> None:
    p = run.profile
    x, weight = rng.normal(size=(5, width)).astype(np.float32), rng.normal(size=width).astype(np.float32)
    x[2, :32] = 0
    empty = np.full((5, width // 32 * 10), -1, np.int32)
    result = run(lambda n: rowwise.quantise(n, p, None, width), [x, empty], [5])[-1]
    # The last bit of a quotient is the device's own: a code at a tie, or a scale, may differ by as much.
    np.testing.assert_allclose(values_of(result), values_of(groups_of(x)), atol=np.abs(x).max() / 126)
    codes = np.ascontiguousarray(result.reshape(5, -1, 10)[:, :, :8]).view(np.int8).reshape(5, -1, 32)
    np.testing.assert_array_equal(codes.astype(np.int32).sum(2), result.reshape(5, -1, 10)[:, :, 9])
    normed = x / np.sqrt((x.astype(np.float64) ** 2).mean(1, keepdims=True) + 1e-5) * weight
    result = run(lambda n: rowwise.rms_norm(n, p, None, width, 1e-5), [x, weight, np.zeros_like(x)], [5])[-1]
    np.testing.assert_allclose(result, normed, rtol=2e-5, atol=1e-6)
    result = run(lambda n: rowwise.rms_norm_quantise(n, p, 5, width, 1e-5), [x, weight, empty])[-1]
    np.testing.assert_allclose(values_of(result), normed, atol=np.abs(normed).max() / 250)
    *_, plain, both = run(
        lambda n: rowwise.rms_norm_quantise(n, p, None, width, 1e-5, both=True), [x, weight, np.zeros_like(x), empty], [5]
    )
    np.testing.assert_allclose(plain, normed, rtol=2e-5, atol=1e-6)
    np.testing.assert_array_equal(both, result)


def test_pointwise(run: Runner, rng: np.random.Generator) -> None:
    p = run.profile
    a, b = (rng.normal(size=(3, HIDDEN)).astype(np.float32) for _ in range(2))
    out = np.zeros_like(a)
    np.testing.assert_array_equal(run(lambda n: rowwise.add_rows(n, p, None, HIDDEN), [a, b, out], [3])[-1], a + b)
    both = np.concatenate([a, b], 1)
    result = run(lambda n: rowwise.silu_mul(n, p, 3, HIDDEN), [both, out])[-1]
    np.testing.assert_allclose(result, a / (1 + np.exp(-a)) * b, rtol=1e-5, atol=1e-6)
    gate = rng.normal(size=(3, 32)).astype(np.float32)
    result = run(lambda n: rowwise.gated_add(n, p, None, HIDDEN, 32), [a, gate, b, out], [3])[-1]
    np.testing.assert_allclose(result, b + a / (1 + np.exp(-gate[:, :1])), rtol=1e-5, atol=1e-6)
    rows, weights = rng.normal(size=(6, HIDDEN)).astype(np.float32), rng.random((3, 2)).astype(np.float32)
    result = run(lambda n: rowwise.combine(n, p, None, HIDDEN, 2), [a, rows, weights, out], [3])[-1]
    expected = a + (rows.reshape(3, 2, -1) * weights[..., None]).sum(1)
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)
    norm = rng.normal(size=HIDDEN).astype(np.float32)
    normed = expected / np.sqrt((expected**2).mean(1, keepdims=True) + 1e-5) * norm
    given = [a, rows, weights, norm, out]
    *_, total, result = run(lambda n: rowwise.combine_norm(n, p, None, HIDDEN, 2, 1e-5, quantised=False), [*given, out], [3])
    np.testing.assert_allclose(total, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(result, normed, rtol=2e-5, atol=1e-6)
    empty = np.full((3, HIDDEN // 32 * 10), -1, np.int32)
    *_, total, result = run(lambda n: rowwise.combine_norm(n, p, 3, HIDDEN, 2, 1e-5, quantised=True), [*given, empty])
    np.testing.assert_allclose(total, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(values_of(result), normed, atol=np.abs(normed).max() / 250)


def test_rope_keeps_its_precision_far_from_the_start(run: Runner) -> None:
    frequencies = (1 / 10000 ** (np.arange(32) / 32)).astype(np.float32)
    out = np.zeros((4, 64), np.float32)
    result = run(lambda n: rope.rope(n, run.profile, None, 64, 1.25), [frequencies, out], [16380, 4])[-1]
    angles = (np.arange(16380, 16384, dtype=np.float32)[:, None] * frequencies).astype(np.float64)
    np.testing.assert_allclose(result, np.concatenate([np.cos(angles), np.sin(angles)], 1) * 1.25, atol=2e-6)


@pytest.mark.parametrize("fmt", FORMATS)
def test_linear_and_embedding(run: Runner, rng: np.random.Generator, fmt: str) -> None:
    weight = rng.normal(size=(OUTPUTS, HIDDEN)).astype(np.float32)
    packed = quantise.pack(weight, fmt).reshape(-1)
    stored = quantise.unpack(packed, fmt, OUTPUTS, HIDDEN)
    bias, residual = (rng.normal(size=s).astype(np.float32) for s in ((OUTPUTS,), (ROWS, OUTPUTS)))
    given, values = activation(fmt, rng.normal(size=(ROWS, HIDDEN)).astype(np.float32))
    expected = values @ stored.T + bias + residual
    for rows in (None, 1):
        n = ROWS if rows is None else 1
        shape = LinearShape(fmt, HIDDEN, OUTPUTS, rows, bias=True, residual=True)
        arrays = [given[:n], packed, bias, residual[:n], np.zeros((n, OUTPUTS), np.float32)]
        emit: Emit = lambda name, shape=shape: linear.linear(name, run.profile, shape)  # noqa: E731
        np.testing.assert_allclose(run(emit, arrays, [ROWS] if rows is None else [])[-1], expected[:n], atol=5e-5, rtol=5e-5)
    tokens = np.array([0, 1, 31, 32, OUTPUTS - 1], np.int32)
    emit = lambda name: linear.embedding(name, run.profile, fmt, OUTPUTS, HIDDEN, None)  # noqa: E731
    np.testing.assert_array_equal(run(emit, [tokens, packed, np.zeros((5, HIDDEN), np.float32)], [5])[-1], stored[tokens])


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_experts(run: Runner, rng: np.random.Generator, fmt: str, biased: bool) -> None:
    """Two experts of one slab in one dispatch, one with more rows than a workgroup holds, both phases."""
    swiglu = ClampedSwiglu(1.7, 0.5) if biased else None
    shape = ExpertShape(fmt, HIDDEN, FFN, bias=biased, swiglu=swiglu)
    dtype = "int32" if fmt.startswith("q") else {"f16": "float16", "f32": "float32"}[fmt]
    x = rng.normal(size=(ROWS, HIDDEN)).astype(np.float32)
    given, values = activation(fmt, x)
    top_k = 2
    slab, outputs, offsets = [np.zeros(128, dtype)], [], []
    for _ in range(2):
        gate, up, down = (rng.normal(size=s).astype(np.float32) / 8 for s in ((FFN, HIDDEN), (FFN, HIDDEN), (HIDDEN, FFN)))
        g, u, d = (quantise.unpack(quantise.pack(w, fmt), fmt, *w.shape) for w in (gate, up, down))
        parts = [quantise.pack_interleaved(gate, up, fmt).reshape(-1), quantise.pack(down, fmt).reshape(-1)]
        bias = np.zeros(2 * FFN + HIDDEN, np.float32)
        if biased:
            bias = (rng.normal(size=bias.size) / 4).astype(np.float16).astype(np.float32)
            tiles = np.stack([bias[:FFN].reshape(-1, 32), bias[FFN : 2 * FFN].reshape(-1, 32)], axis=1).reshape(-1)
            ends = [b.view(np.int32) if dtype == "int32" else b.astype(dtype) for b in (tiles, np.ascontiguousarray(bias[2 * FFN :]))]
            parts = [parts[0], ends[0], parts[1], ends[1]]
        offsets.append(sum(part.nbytes for part in slab) // 4)
        slab += parts
        gates, ups = values @ g.T + bias[:FFN], values @ u.T + bias[FFN : 2 * FFN]
        if swiglu is not None:
            gates, ups = np.minimum(gates, 0.5), np.clip(ups, -0.5, 0.5) + 1
        outputs.append((gates / (1 + np.exp(-gates * (1.7 if biased else 1.0))) * ups) @ d.T + bias[2 * FFN :])
    whole = np.concatenate(slab)
    width = scratch_width(fmt, FFN)
    for decode in (False, True):
        rows = [[5], [5]] if decode else [list(range(ROWS)), [3, 1, 30]]
        work, rows_in, rows_out = [99, 99, 99, 99], [], []
        expected = np.full((ROWS * top_k, HIDDEN), 7.0, np.float32)
        for e, chosen in enumerate(rows):
            work += [offsets[e], len(rows_in), len(chosen), len(rows_in)]
            rows_in += chosen
            rows_out += [r * top_k + e for r in chosen]
            expected[[r * top_k + e for r in chosen]] = outputs[e][chosen]
        lists = [np.array(v, np.int32) for v in (rows_in, rows_out, work)]
        scratch = np.zeros((len(rows_in), width), given.dtype)
        scalars = [1, 2, max(map(len, rows))]
        emit: Emit = lambda name, decode=decode: expert.gate_up(name, run.profile, shape, decode)  # noqa: E731
        scratch = run(emit, [given, lists[0], whole, scratch, lists[2]], scalars)[3]
        emit = lambda name, decode=decode: expert.down(name, run.profile, shape, decode)  # noqa: E731
        out = run(emit, [scratch, lists[1], whole, np.full_like(expected, 7.0), lists[2]], scalars)[3]
        tolerance = (2e-2 if fmt.startswith("q") else 2e-5) * np.abs(np.concatenate(outputs)).max()
        np.testing.assert_allclose(out, expected, atol=tolerance)


@pytest.mark.parametrize("kv", ["float16", "float32"])
@pytest.mark.parametrize("qk_norm", ["none", "head", "vector"])
def test_attention(run: Runner, rng: np.random.Generator, kv: str, qk_norm: str) -> None:
    """Chunks that begin inside a block, windows, sinks, partial rotation; then tokens one by one, past several passes."""
    window, sinks_on, dim, value_dim, rotary, heads, kv_heads = (
        (40, True, 64, 32, 32, 4, 2) if qk_norm == "none" else (0, False, 64, 64, 64, 4, 1)
    )
    shape = AttentionShape(heads, kv_heads, dim, value_dim, rotary, 0.2, window, sinks_on, qk_norm, 1e-5, kv)
    context, total = 272, 268
    qkv = rng.normal(size=(total, shape.qkv_width)).astype(np.float32)
    angles = np.arange(total)[:, None] * (0.5 ** np.arange(rotary // 2))
    table = np.concatenate([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    norms = {"none": [], "head": [dim, dim], "vector": [heads * dim, kv_heads * dim]}[qk_norm]
    weights = [rng.normal(size=n).astype(np.float32) for n in norms]
    sinks = [rng.normal(size=heads).astype(np.float32)] if sinks_on else []
    expected = reference_attention(shape, qkv, table, weights, sinks)
    keys = np.full(kv_heads * context * dim, np.nan, kv)
    values = np.full(kv_heads * context * value_dim, np.nan, kv)
    out = np.zeros((total, heads * value_dim), np.float32)
    chunks = [(0, 7), (7, 14), (14, 265), (265, 266), (266, 267), (267, 268)]
    for begin, end in chunks:
        s, tables = shape, table[begin:end]
        if end - begin == 1:
            for quantised in (True, False):
                row, after = decode_attention(run, s, begin, context, qkv[begin:end], weights, sinks, tables, (keys, values), quantised)
                if quantised:
                    row = values_of(row).reshape(1, -1)
                    np.testing.assert_allclose(row, expected[begin:end], atol=0.02 * np.abs(expected).max())
            out[begin], (keys, values) = row, after
            continue
        scalars = [begin, context, end - begin]
        emit: Emit = lambda name, s=s: attention.append(name, run.profile, s)  # noqa: E731
        *_, keys, values = run(emit, [qkv[begin:end], *weights[1:], tables, keys, values], scalars)
        emit = lambda name, s=s: attention.attend(name, run.profile, s)  # noqa: E731
        # What nothing has written is not a number, so that reading it would show.
        arrays = [qkv[begin:end], *weights[:1], *sinks, tables, keys, values, np.zeros_like(out[begin:end])]
        out[begin:end] = run(emit, arrays, scalars)[-1]
    tolerance = 5e-3 if kv == "float16" else 2e-5
    np.testing.assert_allclose(out, expected, atol=tolerance * np.abs(expected).max())


def decode_attention(
    run: Runner,
    shape: AttentionShape,
    position: int,
    context: int,
    qkv: np.ndarray,
    weights: list[np.ndarray],
    sinks: list[np.ndarray],
    table: np.ndarray,
    caches: tuple[np.ndarray, np.ndarray],
    quantised: bool,
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """The row (quantised or fp32) and the caches behind it."""
    splits, width = run.profile.attention_splits, attention_decode.checked_width(shape)
    scalars = [position, context]
    emit: Emit = lambda name: attention_decode.parts(name, run.profile, shape, splits)  # noqa: E731
    parts = np.full(attention_decode.parts_size(shape, splits), np.nan, np.float32)
    parts = run(emit, [qkv, *weights, table, *caches, parts], scalars)[-1]
    emit = lambda name: attention_decode.merge(name, run.profile, shape, splits, quantised)  # noqa: E731
    row = np.zeros((1, width // 32 * 10), np.int32) if quantised else np.zeros((1, width), np.float32)
    *_, keys, values, row = run(emit, [parts, *sinks, qkv, *weights[1:], table, *caches, row], scalars)
    return row, (keys, values)


def reference_attention(
    s: AttentionShape, qkv: np.ndarray, table: np.ndarray, norms: list[np.ndarray], sinks: list[np.ndarray]
) -> np.ndarray:
    """fp64 (n, heads * value_dim) of all tokens at once."""
    n, half = len(qkv), s.rotary // 2
    x = qkv.astype(np.float64)
    q = x[:, : s.heads * s.head_dim].reshape(n, s.heads, s.head_dim)
    k = x[:, s.heads * s.head_dim :][:, : s.kv_heads * s.head_dim].reshape(n, s.kv_heads, s.head_dim)
    v = x[:, (s.heads + s.kv_heads) * s.head_dim :].reshape(n, s.kv_heads, s.value_dim)
    if norms:
        axis = 2 if s.qk_norm == "head" else (1, 2)
        q, k = (
            t / np.sqrt((t**2).mean(axis, keepdims=True) + s.eps) * w.reshape((1, 1, -1) if s.qk_norm == "head" else (1, *t.shape[1:]))
            for t, w in ((q, norms[0]), (k, norms[1]))
        )
    cos, sin = table[:, None, :half], table[:, None, half:]

    def rotate(t: np.ndarray) -> np.ndarray:
        a, b = t[..., :half], t[..., half : s.rotary]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin, t[..., s.rotary :]], 2)

    q, k = rotate(q), rotate(k)
    out = np.zeros((n, s.heads, s.value_dim))
    here, there = np.arange(n)[:, None], np.arange(n)[None]
    seen = (there <= here) & ((there > here - s.window) if s.window else True)
    for h in range(s.heads):
        kv = h // (s.heads // s.kv_heads)
        scores = np.where(seen, q[:, h] @ k[:, kv].T * s.scale, -np.inf)
        if sinks:
            scores = np.concatenate([scores, np.full((n, 1), sinks[0][h])], 1)
        p = np.exp(scores - scores.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        out[:, h] = p[:, :n] @ v[:, kv]
    return out.reshape(n, -1)


# Together they call every kernel.
@pytest.mark.slow
@pytest.mark.parametrize("case", ["deepseek_v2", "gpt_oss", "qwen2_moe"])
@pytest.mark.parametrize("target", ["vulkan", "opencl"])
def test_families_against_the_cpu(case: str, target: str, tmp_path: Path, demo_model: Path) -> None:
    model = tiny_checkpoint(case, tmp_path / "model", demo_model / "tokenizer.json")
    artifact = compile_model(model, tmp_path / "artifact", quant="f32", prefill_chunk=64, targets=("llvm", target))
    tokens = random_tokens(108)
    with Engine(artifact, memory_budget="100%") as engine, engine.session() as session:
        expected = np.concatenate([np.array(session.feed(tokens[:100])), np.array(session.feed(tokens[100:], decode=True))])
    device: Any = OpenClDevice() if target == "opencl" else VulkanDevice()
    oracle = GpuOracle(model, artifact, f"{target}-generic", device, context=128)
    result = np.concatenate([oracle.prefill(tokens[:100]), oracle.decode(tokens[100:])])
    np.testing.assert_allclose(result, expected, atol=1e-4)


# In f32 the engine itself is quick to compare: test_devices.py.
@pytest.mark.parametrize(("quant", "tolerance"), [pytest.param("f32", 1e-3, marks=pytest.mark.slow), ("f16", 2e-2)])
def test_demo_model_on_vulkan_against_the_cpu(
    quant: str, tolerance: float, demo_model: Path, compiled: Callable[[Path, str], Path], tmp_path: Path
) -> None:
    artifact = compile_model(demo_model, tmp_path / "artifact", quant=quant, targets=("vulkan-adreno",), dump_ir=tmp_path / "dump")
    assert {p.suffix for p in (tmp_path / "dump" / "shaders").iterdir()} == {".comp", ".spv"}
    tokens = [(31 * i + 7) % 8000 + 10 for i in range(48)]
    with Engine(compiled(demo_model, quant), memory_budget="100%") as engine, engine.session() as session:
        expected = np.array(session.feed(tokens))
    oracle = GpuOracle(demo_model, artifact, "vulkan-adreno", VulkanDevice())
    result = np.concatenate([oracle.prefill(tokens[:40]), oracle.decode(tokens[40:])])
    assert np.abs(result - expected).max() <= tolerance
    np.testing.assert_array_equal(result.argmax(1), expected.argmax(1))


def test_every_profile_stays_within_its_limits() -> None:
    """Shared memory, threads, buffers and push constants of the widest kernels; vulkan kernels pass spirv-val as they are built."""
    wide = AttentionShape(64, 8, 192, 128, 64, 0.1, 0, True, "vector", 1e-5, "float16")
    for profile in PROFILES.values():
        functions = {
            "attend": attention.attend("attend", profile, wide),
            "parts": attention_decode.parts("parts", profile, wide, profile.attention_splits),
            "merge": attention_decode.merge("merge", profile, wide, profile.attention_splits, quantised=True),
            "gate_up": expert.gate_up("gate_up", profile, ExpertShape("q4", 4096, 14336, bias=True), decode=False),
            "decode": expert.gate_up("decode", profile, ExpertShape("q4", 4096, 14336, bias=True), decode=True),
        }
        entries = build_vulkan(functions, profile, None).entries
        for entry in entries.values():
            assert np.prod(entry["local"]) <= (1024 if profile.name == "desktop" else 256)
            assert entry["buffers"] <= 12
            assert 4 * entry["scalars"] <= 128


def test_metal_source_names_every_kernel(demo_model: Path, tmp_path: Path) -> None:
    functions = {"sum": rowwise.add_rows("sum", PROFILES["generic"], None, 64)}
    kernels = build_source(functions, PROFILES["generic"], "metal", None)
    text = kernels.library.decode()
    assert "kernel void sum(" in text
    assert "constant sum_args_t& arg [[ buffer(3) ]]" in text
    assert kernels.entries["sum"]["code"] == [0, len(kernels.library)]


def test_unknown_profiles_are_refused() -> None:
    with pytest.raises(CFMoEError, match="vulkan has no profile toaster; profiles are generic"):
        gpu.resolve("vulkan-toaster")
    assert gpu.resolve("llvm") is None

"""Kernels of every ARM64 target, each on a CPU that has no more than it asks for, under qemu: the bits of x86-64."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm

from cfmoe.compile import quantise, targets
from cfmoe.compile.kernels import expert
from kernel_script import KernelScript, build_host
from test_kernels import EXPERTS, FFN, FORMATS, HIDDEN, OUTPUTS, kernel_functions

# 8 + 4 + 2 + 1 rows: every block of rows that a kernel knows.
ROWS = 15
# The CPU that runs a target, and the formats tried on it: f16 and f32 take no instruction that the three differ in.
CASES = {
    "aarch64": ("cortex-a53", FORMATS),
    "aarch64-dotprod": ("cortex-a76", ("q4", "q8")),
    "aarch64-i8mm": ("max", ("q4", "q8")),
}


def _quantised(rng: np.random.Generator, rows: int, width: int) -> np.ndarray:
    """Activations as the kernels read them, with the greatest codes among them."""
    groups = np.zeros((rows, width // 32, 10), np.int32)
    codes = rng.integers(-127, 128, (rows, width // 32, 32)).astype(np.int8)
    codes[0], codes[-1, 0] = 127, -127
    groups[:, :, :8] = codes.view(np.int32)
    groups[:, :, 8] = rng.uniform(0.001, 0.1, groups.shape[:2]).astype(np.float32).view(np.int32)
    groups[:, :, 9] = codes.sum(2, dtype=np.int32)
    return groups.reshape(rows, -1)


def _script(formats: tuple[str, ...]) -> KernelScript:
    rng = np.random.default_rng(11)
    script = KernelScript()
    x = rng.normal(size=(ROWS, HIDDEN)).astype(np.float32)
    script.call("quantise", [script.buffer(x), script.buffer(np.zeros((ROWS, HIDDEN // 32 * 10), np.int32))])
    for fmt in formats:
        given = script.buffer(_quantised(rng, ROWS, HIDDEN) if fmt.startswith("q") else x)
        weight = script.buffer(quantise.pack(rng.normal(size=(OUTPUTS, HIDDEN)).astype(np.float32), fmt).reshape(-1))
        bias, residual = (script.buffer(rng.normal(size=s).astype(np.float32)) for s in ((OUTPUTS,), (ROWS, OUTPUTS)))
        out = script.buffer(np.zeros((ROWS, OUTPUTS), np.float32))
        script.call(f"linear_{fmt}", [given, weight, bias, residual, out])
        gate, up, down = (rng.normal(size=s).astype(np.float32) / 8 for s in ((FFN, HIDDEN), (FFN, HIDDEN), (HIDDEN, FFN)))
        slab = script.buffer(np.concatenate([quantise.pack_interleaved(gate, up, fmt).reshape(-1), quantise.pack(down, fmt).reshape(-1)]))
        for phase in ("prefill", "decode"):
            out = script.buffer(np.zeros((ROWS, HIDDEN), np.float32))
            order = np.arange(ROWS, dtype=np.int32)[::-1].copy()
            for chosen in [order] if phase == "prefill" else order.reshape(-1, 1):
                rows = script.buffer(chosen)
                dtype = script.buffers[given].dtype
                scratch = script.buffer(np.zeros((len(chosen), expert.scratch_width(fmt, FFN)), dtype))
                script.call(f"gate_up_{fmt}_{phase}", [given, rows, slab, scratch], 0, 0, FFN // 32)
                script.call(f"down_{fmt}_{phase}", [scratch, rows, slab, out], 0, 0, HIDDEN // 32)
    return script


def _functions(target: targets.CpuTarget, formats: tuple[str, ...]) -> dict[str, Any]:
    return kernel_functions(target, formats, {fmt: EXPERTS[fmt] for fmt in formats}, embeddings=False)


@pytest.fixture(scope="module")
def expected() -> dict[tuple[str, ...], list[np.ndarray]]:
    """For the formats of each case, what this machine's best target computes."""
    target = targets.resolve("llvm")
    module = tvm.compile(tvm.IRModule(_functions(target, FORMATS)), target=target.tvm_target())
    return {formats: _script(formats).run(module) for _, formats in CASES.values()}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_arm_kernels_give_the_bits_of_this_cpu(name: str, expected: dict[tuple[str, ...], list[np.ndarray]], tmp_path: Path) -> None:
    qemu = shutil.which("qemu-aarch64-static")
    assert qemu is not None, "qemu-aarch64-static is missing: make android-tools"
    cpu, formats = CASES[name]
    target = targets.resolve(name)
    functions = _functions(target, formats)
    program = build_host(target, functions, tmp_path / "host")
    got = _script(formats).run_program([qemu, "-cpu", cpu, program], list(functions), tmp_path)
    assert len(got) == len(expected[formats]) and any(buffer.any() for buffer in got)
    for mine, theirs in zip(got, expected[formats], strict=True):
        np.testing.assert_array_equal(mine.view(np.uint8), theirs.view(np.uint8))

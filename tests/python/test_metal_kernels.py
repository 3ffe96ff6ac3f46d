"""Metal's kernels, compiled as C++ and run on the CPU, against numpy and against the CPU's engine: the tests of the other GPU kernels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import test_gpu_kernels as gpu_tests
from cfmoe.compile import compile_model
from cfmoe.compile.codegen.kernel_set import KernelSet, build_source
from cfmoe.compile.kernels.gpu.profiles import PROFILES
from cfmoe.runtime import Engine
from gpu_metal import MetalOnCpu
from gpu_oracle import GpuOracle

pytestmark = pytest.mark.slow


class MetalRunner(gpu_tests.Runner):
    def __init__(self) -> None:
        self.kind, self.profile = "metal", PROFILES["generic"]
        self.device: Any = MetalOnCpu()

    def build(self, functions: dict[str, Any]) -> KernelSet:
        return build_source(functions, self.profile, self.kind, None)


@pytest.fixture(scope="module")
def run() -> MetalRunner:
    return MetalRunner()


rng = gpu_tests.rng
# Every test of a kernel by itself, on the fixture `run` of this module.
for _name, _test in vars(gpu_tests).items():
    if _name.startswith("test_") and "run" in _test.__code__.co_varnames[: _test.__code__.co_argcount]:
        globals()[_name] = _test


def test_the_kernels_tests_are_here() -> None:
    assert sum(name.startswith("test_") for name in globals()) >= 6


# Not of quantised models as a whole: a last bit may change an activation's code there, and with it a close choice of experts.
@pytest.mark.parametrize(("quant", "tolerance"), [("f32", 1e-3), ("f16", 2e-2)])
def test_demo_model_against_the_cpu(
    quant: str, tolerance: float, demo_model: Path, compiled: Callable[[Path, str], Path], tmp_path: Path
) -> None:
    artifact = compile_model(demo_model, tmp_path / "artifact", quant=quant, targets=["metal"])
    tokens = [(31 * i + 7) % 8000 + 10 for i in range(40)]
    with Engine(compiled(demo_model, quant), memory_budget="100%") as engine, engine.session() as session:
        expected = np.array(session.feed(tokens))
    oracle = GpuOracle(demo_model, artifact, "metal-generic", MetalOnCpu())
    result = np.concatenate([oracle.prefill(tokens[:36]), oracle.decode(tokens[36:])])
    assert np.abs(result - expected).max() <= tolerance
    np.testing.assert_array_equal(result.argmax(1), expected.argmax(1))

"""cfmoe-engine as one static ARM64 executable, kernels linked in, run under qemu: the tokens of x86-64, other kernels refused."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cfmoe.compile import compile_model, compiler, targets
from cfmoe.compile.checkpoint import Checkpoint
from cfmoe.compile.decoder_config import Quantisation
from cfmoe.compile.families import resolve
from cfmoe.runtime import Engine, Tokenizer
from engine_process import EngineProcess
from support import ROOT

QEMU = shutil.which("qemu-aarch64-static")
NAMES = ("aarch64-dotprod", "aarch64")
# qemu's "max" has dot products; the first ARMv8 cores have none.
CPUS = {"max": "aarch64-dotprod", "cortex-a53": "aarch64"}
PROMPT = "The proposal adds"

pytestmark = [
    pytest.mark.cross,
    pytest.mark.skipif(QEMU is None, reason="qemu-aarch64-static is missing: apt-get install qemu-user-static"),
    pytest.mark.skipif(importlib.util.find_spec("ziglang") is None, reason="zig is missing: pip install 'cfmoe[cross]'"),
]


@pytest.fixture(scope="module")
def artifact(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_model(demo_model, tmp_path_factory.mktemp("static") / "demo.cfmoe", targets=["llvm", *NAMES])


@pytest.fixture(scope="module")
def program(artifact: Path, demo_model: Path) -> Path:
    """The preset linux-arm64 with the artifact's kernels, built in its own directory, where later runs find it."""
    kernel_set = json.loads((artifact / "manifest.json").read_text())["kernel_set"]
    config = compiler._generation_facts(demo_model, resolve(Checkpoint(demo_model).config, "config.json")[0])
    objects, prefixes = [], []
    build = ROOT / "build" / "linux-arm64"
    build.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        target = targets.resolve(name)
        mod, _ = compiler.lower(config, Quantisation.named("mixed"), target, 256)
        objects.append(build / f"kernels-{name}.o")
        prefixes.append(targets.static_prefix(kernel_set, target))
        targets.build_static(compiler.kernels_of(mod), target, kernel_set, objects[-1])
    options = (f"-DCFMOE_KERNEL_OBJECTS={';'.join(map(str, objects))}", f"-DCFMOE_KERNEL_PREFIXES={','.join(prefixes)}")
    python = f"-DPython_EXECUTABLE={sys.executable}"
    subprocess.run(["cmake", "--preset", "linux-arm64", *options, python], cwd=ROOT, check=True, capture_output=True, timeout=900)
    subprocess.run(["cmake", "--build", str(build)], cwd=ROOT, check=True, capture_output=True, timeout=1800)
    return build / "cfmoe-engine"


def test_the_executable_needs_nothing_and_fits_pages_of_16_kib(program: Path) -> None:
    listing = subprocess.run(["readelf", "-hlW", str(program)], capture_output=True, text=True, check=True).stdout
    assert "AArch64" in listing and "INTERP" not in listing and "DYNAMIC" not in listing
    alignments = [int(line.split()[-1], 16) for line in listing.splitlines() if line.strip().startswith("LOAD")]
    assert alignments and min(alignments) >= 16384


def test_loadable_kernels_fit_pages_of_16_kib(artifact: Path) -> None:
    for library in artifact.glob("lib/*/kernels.so"):
        listing = subprocess.run(["readelf", "-lW", str(library)], capture_output=True, text=True, check=True).stdout
        alignments = [int(line.split()[-1], 16) for line in listing.splitlines() if line.strip().startswith("LOAD")]
        assert alignments and min(alignments) >= 16384, library


@pytest.mark.parametrize("cpu", CPUS)
def test_64_greedy_tokens_are_those_of_x86_64(cpu: str, program: Path, artifact: Path) -> None:
    prompt = Tokenizer(artifact).encode(PROMPT)
    with Engine(artifact) as engine, engine.session() as session:
        expected = session.generate(prompt, 64, stop_tokens=[]).token_ids
    with EngineProcess([str(QEMU), "-cpu", cpu, program]) as process:
        loaded = process.call("load", artifact=str(artifact), expert_percent=40, threads=2)
        assert loaded["event"] == "loaded", loaded
        tokens, _, _ = process.generate(prompt=PROMPT, max_new_tokens=64, stop_tokens=[])
        assert tokens == expected


def test_other_kernels_are_refused_with_that_reason(program: Path, demo_artifact: Path, demo_model: Path, tmp_path: Path) -> None:
    other = compile_model(demo_model, tmp_path / "q4.cfmoe", quant="q4", targets=["aarch64"])
    with EngineProcess([str(QEMU), program]) as process:
        event = process.call("load", artifact=str(other))
        assert event["event"] == "error" and event["kind"] == "user"
        assert re.search(r"needs the kernels cfmoe_\w+_aarch64_ .*same shapes and quantisation", event["message"])
        assert process.call("load", artifact=str(demo_artifact))["event"] == "error"

"""cfmoe-engine as one static ARM64 executable, kernels linked in, run under qemu: the tokens of x86-64, other kernels refused."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import xxhash

from cfmoe.artifact import Artifact
from cfmoe.artifact.retarget import retarget
from cfmoe.compile import compile_model
from cfmoe.package import native
from cfmoe.package.kernels import ARM64, as_targets, phone_kernels
from cfmoe.runtime import Engine, Sampling, Tokenizer
from engine_process import EngineProcess
from support import ROOT, load_alignments

QEMU = shutil.which("qemu-aarch64-static")
# What qemu plays, and the target that such a CPU takes.
CPUS = {"max": "aarch64-i8mm", "cortex-a76": "aarch64-dotprod", "cortex-a53": "aarch64"}
PROMPTS = (
    "The proposal adds",
    "def read_file(path):",
    "In 1998 the",
    "Once upon a time",
    "The committee",
    "import os",
    "Water boils at",
    "She said that",
    "class Parser:",
    "The number of",
)

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def builds(monkeypatch: pytest.MonkeyPatch) -> None:
    assert QEMU is not None, "qemu-aarch64-static is missing: make android-tools"
    assert not native.missing()
    monkeypatch.setenv("CFMOE_NATIVE_CACHE", str(ROOT / "build" / "native"))


@pytest.fixture(scope="module")
def artifact(demo_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model with the targets of this machine and of phones."""
    demo = Artifact.open(demo_artifact)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CFMOE_NATIVE_CACHE", str(ROOT / "build" / "native"))
        kernels = as_targets(phone_kernels(demo))
    return retarget(demo, kernels, tmp_path_factory.mktemp("static") / "demo.cfmoe", keep=list(demo.manifest.targets))


@pytest.fixture
def program(artifact: Path) -> Path:
    kernels = phone_kernels(Artifact.open(artifact))
    return native.build(native.PRESETS["linux-arm64"], [k.object_file for k in kernels], [k.prefix for k in kernels])


def test_the_executable_needs_nothing_and_fits_pages_of_16_kib(program: Path) -> None:
    listing = subprocess.run(["readelf", "-hlW", str(program)], capture_output=True, text=True, check=True).stdout
    assert "AArch64" in listing and "INTERP" not in listing and "DYNAMIC" not in listing
    assert min(load_alignments(program)) >= 16384


def test_kernels_are_named_alike_by_compile_and_package(artifact: Path, demo_model: Path, tmp_path: Path) -> None:
    """Whoever compiles the same shapes, and when, gets kernels of the same name: the engine of one package runs them all."""
    compiled = Artifact.open(compile_model(demo_model, tmp_path / "demo.cfmoe", targets=["aarch64-dotprod"]))
    names = {name: target.kernel_set for name, target in Artifact.open(artifact).manifest.targets.items() if name in ARM64}
    assert names["aarch64-dotprod"] == compiled.manifest.targets["aarch64-dotprod"].kernel_set
    assert len(set(names.values())) == len(ARM64)


def test_logits_are_those_of_x86_64_on_the_target_that_each_cpu_can_take(program: Path, artifact: Path) -> None:
    prompt, new = 100, 8
    with Engine(artifact) as engine, engine.session() as session:
        vocabulary = engine.model.vocab_size
        tokens = [(31 * i + 7) % vocabulary for i in range(prompt + new)]
        fed = {"prefill": session.feed(tokens[:prompt]), "decode": session.feed(tokens[prompt:], decode=True)}
    expected = {phase: xxhash.xxh3_64_hexdigest(np.ascontiguousarray(logits, np.float32).tobytes()) for phase, logits in fed.items()}
    for cpu, target in CPUS.items():
        command = [str(QEMU), "-cpu", cpu, program, "logits", artifact, "--prompt-tokens", str(prompt), "--new-tokens", str(new)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert json.loads(done.stdout) == {"target": target} | expected


@pytest.mark.parametrize("cpu", CPUS)
def test_tokens_are_those_of_x86_64(cpu: str, program: Path, artifact: Path) -> None:
    """Greedy ones, and drawn ones, which feel the last bits of every probability."""
    with EngineProcess([str(QEMU), "-cpu", cpu, program]) as process, Engine(artifact) as engine, engine.session() as session:
        loaded = process.call("load", artifact=str(artifact), expert_percent=40, threads=2)
        assert loaded["event"] == "loaded", loaded
        for prompt in PROMPTS:
            session.reset()
            expected = session.generate(Tokenizer(artifact).encode(prompt), 64, stop_tokens=[]).token_ids
            tokens, _, _ = process.generate(prompt=prompt, max_new_tokens=64, stop_tokens=[], reset=True)
            assert tokens == expected, prompt
            session.reset()
            drawn = session.generate(Tokenizer(artifact).encode(prompt), 64, Sampling(temperature=1.5, seed=7), stop_tokens=[]).token_ids
            tokens, _, _ = process.generate(prompt=prompt, max_new_tokens=64, stop_tokens=[], temperature=1.5, seed=7, reset=True)
            assert tokens == drawn, prompt


def test_other_kernels_are_refused_with_that_reason(program: Path, demo_artifact: Path, demo_model: Path, tmp_path: Path) -> None:
    other = compile_model(demo_model, tmp_path / "q4.cfmoe", quant="q4", targets=["aarch64"])
    with EngineProcess([str(QEMU), program]) as process:
        event = process.call("load", artifact=str(other))
        assert event["event"] == "error" and event["kind"] == "user"
        assert re.search(r"needs the kernels cfmoe_\w+_aarch64_ .*same shapes and quantisation", event["message"])
        assert process.call("load", artifact=str(demo_artifact))["event"] == "error"

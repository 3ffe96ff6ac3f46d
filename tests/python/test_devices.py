"""Whole models on GPUs, through the software drivers that tests have: lavapipe for Vulkan, PoCL for OpenCL. Against the CPU's kernels."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import conftest
from cfmoe.runtime import CFMoEError, Engine, Tokenizer, devices
from support import Cli, error_line

PROMPT = "Once upon a time there was a girl who lived in a house near the forest. She liked to read, and every day she went to"
KINDS = ("vulkan", "opencl")
OPENCL_LATER = ("vulkan", pytest.param("opencl", marks=pytest.mark.slow))  # PoCL compiles whole plans for half a minute
# Of logits against the CPU, by preset: f32 sums in another order, f16 rounds the KV cache in between too.
TOLERANCE = {"f32": 1e-3, "f16": 2e-2}


def compiled(model: Path, quant: str) -> Path:
    """An artifact for this CPU and both kinds of GPUs, kept as those of conftest.py are."""
    out = conftest.CACHE / f"{model.name}-gpu-{quant}-{conftest._key(model)}"
    conftest.CACHE.mkdir(parents=True, exist_ok=True)
    with open(conftest.CACHE / f"{model.name}-gpu-{quant}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (out / "manifest.json").exists():
            command = [
                sys.executable,
                "-m",
                "cfmoe.cli",
                "compile",
                model,
                "--target",
                "llvm,vulkan,opencl",
                "--quant",
                quant,
                "--out",
                out,
            ]
            subprocess.run(command, check=True, capture_output=True)
    return out


@pytest.fixture(scope="session")
def kernel_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture(autouse=True)
def shared_cache(kernel_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PoCL takes half a minute for a model's kernels: once is enough."""
    monkeypatch.setenv("CFMOE_CACHE_DIR", str(kernel_cache))


@pytest.fixture(scope="session")
def f32(demo_model: Path) -> Path:
    return compiled(demo_model, "f32")


def ids_of(artifact: Path, count: int) -> list[int]:
    ids = Tokenizer(artifact).encode(PROMPT)
    return (ids * (1 + count // len(ids)))[:count]


def logits(artifact: Path, count: int, decoded: int, **options: object) -> np.ndarray:
    """Of `count` prompt tokens, then `decoded` more through the decode program: [count + decoded, vocabulary]."""
    ids = ids_of(artifact, count + decoded)
    with Engine(artifact, context_size=512, **options) as engine:  # type: ignore[arg-type]
        session = engine.session()
        return np.concatenate([session.feed(ids[:count]), session.feed(ids[count:], decode=True)])


def tokens(artifact: Path, **options: object) -> list[int]:
    with Engine(artifact, context_size=256, **options) as engine:  # type: ignore[arg-type]
        return engine.session().generate(ids_of(artifact, 30), 64, stop_tokens=[]).token_ids


@pytest.mark.parametrize("kind", OPENCL_LATER)
def test_f32_logits_and_tokens_are_those_of_the_cpu(f32: Path, kind: str) -> None:
    expected, got = (logits(f32, 70, 8, device=device) for device in ("cpu", kind))
    assert np.abs(got - expected).max() <= TOLERANCE["f32"]
    assert tokens(f32, device=kind) == tokens(f32)


@pytest.mark.parametrize("kind", OPENCL_LATER)
def test_quantised_logits_are_those_of_the_cpu(demo_model: Path, kind: str) -> None:
    """A last bit of a sum can tip a quantised activation to the next code, which single logits show: docs/gpu.md."""
    artifact = compiled(demo_model, "mixed")
    expected, got = (logits(artifact, 40, 8, device=device) for device in ("cpu", kind))
    assert np.abs(got - expected).mean() <= 5e-2
    assert (got.argmax(axis=1) == expected.argmax(axis=1)).mean() >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quant", ["f32", "f16"])
def test_the_larger_model_too(moe_63m: Path, kind: str, quant: str) -> None:
    artifact = compiled(moe_63m, quant)
    expected, got = (logits(artifact, 60, 8, device=device) for device in ("cpu", kind))
    assert np.abs(got - expected).max() <= TOLERANCE[quant]
    if quant == "f32":
        assert tokens(artifact, device=kind) == tokens(artifact)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_f16_logits_are_those_of_the_cpu(demo_model: Path, kind: str) -> None:
    artifact = compiled(demo_model, "f16")
    expected, got = (logits(artifact, 40, 8, device=device) for device in ("cpu", kind))
    assert np.abs(got - expected).max() <= TOLERANCE["f16"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_budget_kind_of_memory_and_io_gives_the_same_bits(f32: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = logits(f32, 40, 8, device=kind)
    for budget, io in (("50%", "direct"), ("15%", "buffered"), ("3%", "mmap")):
        assert np.array_equal(logits(f32, 40, 8, device=kind, memory_budget=budget, io=io), expected)
    monkeypatch.setenv("CFMOE_DEVICE_MEMORY", "separate")
    for budget in ("100%", "10%"):
        assert np.array_equal(logits(f32, 40, 8, device=kind, memory_budget=budget), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_phases_on_different_devices_share_experts_and_cache(f32: Path, kind: str) -> None:
    expected = tokens(f32)
    for placement in ((kind, "cpu"), ("cpu", kind)):
        with Engine(f32, context_size=256, memory_budget="40%", prefill_device=placement[0], decode_device=placement[1]) as engine:
            assert (engine.prefill_device, engine.decode_device) == placement
            assert engine.placement == "/".join(placement)
            assert engine.session().generate(ids_of(f32, 30), 64, stop_tokens=[]).token_ids == expected


def test_a_budget_can_change_between_tokens(f32: Path) -> None:
    expected = tokens(f32, device="vulkan")
    with Engine(f32, context_size=256, device="vulkan") as engine:
        seen: list[int] = []

        def on_token(token: int) -> None:
            seen.append(token)
            memory = engine.set_memory_budget(f"{(10, 100, 55, 30)[len(seen) % 4]}%")
            assert memory.pool_bytes == memory.expert_slots * (memory.pool_bytes // memory.expert_slots)
            if len(seen) % 10 == 0:
                engine.trim()

        assert engine.session().generate(ids_of(f32, 30), 64, stop_tokens=[], on_token=on_token).token_ids == expected == seen


def test_the_validation_layer_has_nothing_to_say(f32: Path) -> None:
    """A full run, in shared and in separate memory, with loads in between; messages become errors, or text on standard error at the end."""
    for memory in ("", "separate"):
        environment = os.environ | {"CFMOE_VULKAN_VALIDATE": "1", "CFMOE_DEVICE_MEMORY": memory}
        command = [sys.executable, "-m", "cfmoe.cli", "run", f32, "--prompt", PROMPT, "--max-new-tokens", "8"]
        command += ["--device", "vulkan", "--memory-budget", "20%", "--context-size", "256", "--json"]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert result.returncode == 0, result.stderr
        assert result.stderr == ""
        assert json.loads(result.stdout)["new_tokens"] == 8


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_kernel_cache_is_made_anew(f32: Path, kind: str, kernel_cache: Path) -> None:
    expected = logits(f32, 10, 1, device=kind)
    for path in kernel_cache.glob(f"{kind}-*.bin"):
        path.write_bytes(path.read_bytes()[:50] + b"nonsense")
    assert np.array_equal(logits(f32, 10, 1, device=kind), expected)


def test_the_command_line_chooses_devices(f32: Path, cli: Cli) -> None:
    common = ["run", f32, "--prompt", PROMPT, "--max-new-tokens", "4", "--context-size", "128", "--json"]
    runs = {}
    for options in ([], ["--device", "vulkan"], ["--prefill-device", "vulkan"], ["--device", "opencl", "--decode-device", "cpu"]):
        result = cli(*common, *options)
        assert result.returncode == 0, result.stderr
        document = json.loads(result.stdout)
        runs[document["device"]] = document["token_ids"]
    assert list(runs) == ["cpu", "vulkan", "vulkan/cpu", "opencl/cpu"]
    assert len({tuple(ids) for ids in runs.values()}) == 1


def test_auto_takes_no_software_for_a_gpu(f32: Path, cli: Cli) -> None:
    result = cli("run", f32, "--prompt", PROMPT, "--max-new-tokens", "2", "--device", "auto", "--json")
    assert json.loads(result.stdout)["device"] == "cpu"
    assert result.stderr.count("warning: ") == 1
    assert "--device auto: running on the CPU: llvmpipe" in result.stderr


def test_bench_measures_placements_and_names_the_fastest(f32: Path, cli: Cli) -> None:
    options = ["--devices", "cpu,vulkan", "--prompt-tokens", "16", "--new-tokens", "4", "--repeat", "1"]
    document = json.loads(cli("bench", f32, *options, "--json").stdout)
    assert [result["device"] for result in document["results"]] == ["cpu", "vulkan", "vulkan/cpu", "cpu/vulkan"]
    assert document["fastest_device"] in {"cpu", "vulkan", "vulkan/cpu", "cpu/vulkan"}
    assert document["refused"] == {}
    assert "gpu is unknown" in error_line(cli("bench", f32, "--devices", "gpu"))


def test_doctor_lists_devices_with_driver_and_features(cli: Cli) -> None:
    found = json.loads(cli("doctor", "--json").stdout)["devices"]
    for kind in KINDS:
        assert found[kind]["reason"] is None
        assert found[kind]["found"][0]["driver"]
        assert devices(kind)[0].type == "cpu"


def test_errors_name_the_remedy(f32: Path, demo_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def message(call: Callable[[], object]) -> str:
        with pytest.raises(CFMoEError) as caught:
            call()
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "has none for vulkan" in (text := message(lambda: Engine(demo_artifact, device="vulkan"))) and "--target llvm,vulkan" in text
    assert "cuda is unknown: use cpu, vulkan" in message(lambda: Engine(f32, device="cuda"))
    assert "one copy of the experts" in message(lambda: Engine(f32, prefill_device="vulkan", decode_device="opencl"))
    monkeypatch.setenv("CFMOE_VULKAN_DEVICE", "GeForce")
    assert "GeForce names no vulkan device" in message(lambda: Engine(f32, device="vulkan"))
    monkeypatch.delenv("CFMOE_VULKAN_DEVICE")
    monkeypatch.setenv("CFMOE_DEVICE_MEMORY", "separate")
    assert "does not reach the memory of llvmpipe" in message(lambda: Engine(f32, prefill_device="vulkan"))


@pytest.mark.parametrize("variable", ["VK_ICD_FILENAMES", "OCL_ICD_VENDORS"])
def test_without_a_driver_there_is_one_line(f32: Path, cli: Cli, variable: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The loaders are pointed at nothing, as where no driver is installed."""
    monkeypatch.setenv(variable, str(tmp_path / "nothing"))
    kind = "vulkan" if variable == "VK_ICD_FILENAMES" else "opencl"
    line = error_line(cli("run", f32, "--prompt", "x", "--device", kind))
    assert "install the driver" in line and "--device cpu" in line


@pytest.mark.parametrize("damage", ["library", "kernel"])
def test_kernels_that_do_not_compile_are_named(demo_model: Path, tmp_path: Path, damage: str) -> None:
    """The library of an artifact of one's own making: the digests are right, the code is not."""
    from cfmoe.artifact import Artifact

    source = compiled(demo_model, "f32")
    target = next(name for name in Artifact.open(source).manifest.targets if name.startswith("opencl"))
    out = tmp_path / "artifact"
    out.mkdir()
    for path in source.rglob("*"):
        if path.is_file():
            (out / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            os.link(path, out / path.relative_to(source))
    library = out / "lib" / target / "kernels.cl"
    text = library.read_text("utf-8")
    library.unlink()
    changed = text.replace("{", "}", 1) if damage == "library" else text.replace("embedding_0_rows", "x_embedding_0_rows")
    library.write_text(changed, "utf-8")
    reseal(out, f"lib/{target}/kernels.cl")
    with pytest.raises(CFMoEError, match="do not compile" if damage == "library" else "has no kernel"):
        Engine(out, device="opencl")


def reseal(artifact: Path, relative: str) -> None:
    """Makes the manifest say what the file `relative` has become."""
    import hashlib

    import xxhash

    path = artifact / "manifest.json"
    manifest = json.loads(path.read_text("utf-8"))
    data = (artifact / relative).read_bytes()
    manifest["files"][relative] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "xxh3_64": xxhash.xxh3_64_hexdigest(data)}
    del manifest["xxh3_64"]
    body = json.dumps(manifest, indent=2)[: -len("\n}")]
    path.unlink()
    path.write_text(f'{body},\n  "xxh3_64": "{xxhash.xxh3_64_hexdigest(body.encode())}"\n}}\n', "utf-8")

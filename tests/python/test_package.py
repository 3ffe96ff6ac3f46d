"""cfmoe package: what it refuses and says, without tools; slow: the APK of the demo model, and the engine out of it under qemu."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cfmoe.artifact import Artifact
from cfmoe.artifact.retarget import TargetFiles, retarget
from cfmoe.compile import compiler, decoder_facts
from cfmoe.compile.checkpoint import Checkpoint
from cfmoe.compile.families import resolve
from cfmoe.errors import CFMoEError
from cfmoe.package import android_tools, native, packager
from cfmoe.runtime import Engine, Tokenizer
from engine_process import EngineProcess
from support import ROOT, Cli, error_line, load_alignments
from tiny_families import TINY, tiny_checkpoint

QEMU = shutil.which("qemu-aarch64-static")


def _copy(artifact: Path, out: Path) -> Path:
    return Path(shutil.copytree(artifact, out))


def _nothing_left(directory: Path, *expected: str) -> None:
    assert sorted(path.name for path in directory.iterdir()) == sorted(expected)


@pytest.mark.parametrize("platform", packager.PLATFORMS)
def test_a_damaged_artifact_is_refused(platform: str, demo_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packager, "_check_tools", lambda platform: None)
    broken = _copy(demo_artifact, tmp_path / "broken")
    data = bytearray((broken / "weights.bin").read_bytes())
    data[1000] ^= 1
    (broken / "weights.bin").write_bytes(data)
    with pytest.raises(CFMoEError, match=r"weights\.bin is damaged: .*copy the artifact again"):
        packager.package(broken, platform, tmp_path / "out")
    _nothing_left(tmp_path, "broken")


@pytest.mark.parametrize("platform", packager.PLATFORMS)
def test_too_little_space_is_refused(platform: str, demo_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packager, "_check_tools", lambda platform: None)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(packager.shutil, "disk_usage", lambda _place: usage._replace(free=1 << 20))
    with pytest.raises(CFMoEError, match=r"has 1 MiB free.* takes \d+ MiB; free some space"):
        packager.package(demo_artifact, platform, tmp_path / "out")
    _nothing_left(tmp_path)


def test_an_existing_output_needs_force_and_must_be_a_package(demo_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packager, "_check_tools", lambda platform: None)
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("dear to somebody")
    with pytest.raises(CFMoEError, match="exists; give --force to replace it"):
        packager.package(demo_artifact, "android", out)
    with pytest.raises(CFMoEError, match="is something else; --force replaces packages only"):
        packager.package(demo_artifact, "android", out, force=True)
    assert (out / "thesis.txt").exists()
    _nothing_left(tmp_path, "out")


def test_everything_that_is_missing_is_named_at_once(demo_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ANDROID_HOME", raising=False)
    monkeypatch.setenv("CFMOE_ANDROID_TOOLS", str(tmp_path / "none"))
    monkeypatch.setattr(native, "_tool", lambda name: None)
    monkeypatch.setattr(android_tools, "_command", lambda name: None)
    with pytest.raises(CFMoEError) as caught:
        packager.package(demo_artifact, "android", tmp_path / "out")
    message = str(caught.value)
    assert "\n" not in message
    for what in ("cmake", "ninja", "aapt2", "apksigner", "Kotlin", "sudo apt-get install", "pip install cmake"):
        assert what in message, what
    assert message.count("sudo apt-get install") == 1
    _nothing_left(tmp_path)


def test_wrong_options_are_refused(cli: Cli, demo_artifact: Path, tmp_path: Path) -> None:
    options = ("--out", tmp_path / "out")
    assert "'desktop' is not one of" in error_line(cli("package", demo_artifact, "--platform", "desktop", *options))
    assert "does not exist" in error_line(cli("package", "nowhere", "--platform", "android", *options))
    assert "signs Android packages" in error_line(cli("package", demo_artifact, "--platform", "ios", "--keystore", "k", *options))
    assert "is no file; make one with keytool" in error_line(
        cli("package", demo_artifact, "--platform", "android", "--keystore", "k", *options)
    )


def test_a_wrong_ndk_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ANDROID_NDK_HOME", str(tmp_path))
    with pytest.raises(CFMoEError, match=r"ANDROID_NDK_HOME is .*, where no NDK is"):
        native.ndk()


def test_every_preset_is_one_of_cmake() -> None:
    known = {p["name"] for p in json.loads((ROOT / "CMakePresets.json").read_text())["configurePresets"] if not p.get("hidden")}
    assert set(native.PRESETS) == known


def test_a_failing_build_says_why_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CFMOE_NATIVE_CACHE", str(tmp_path / "cache"))
    fake = tmp_path / "cmake"
    fake.write_text("#!/bin/sh\necho 'engine.cc:1: error: no such thing'\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setattr(native, "_tool", lambda name: fake)
    with pytest.raises(CFMoEError, match=r"native code for linux-arm64 cannot be built: engine\.cc:1: error: no such thing"):
        native.build(native.PRESETS["linux-arm64"])
    assert not list((tmp_path / "cache").rglob("cfmoe-engine"))


def test_a_build_directory_of_elsewhere_is_thrown_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CMake refuses one that was made for another checkout, or in another place."""
    monkeypatch.setenv("CFMOE_NATIVE_CACHE", str(tmp_path))
    fake = tmp_path / "cmake"
    fake.write_text("#!/bin/sh\necho 'error: not today'\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setattr(native, "_tool", lambda name: fake)
    directory = tmp_path / "build-ios-arm64"
    for home, place, stays in ((ROOT, directory, True), (tmp_path, directory, False), (ROOT, tmp_path / "old", False)):
        directory.mkdir(exist_ok=True)
        (directory / "CMakeCache.txt").write_text(f"CMAKE_CACHEFILE_DIR:INTERNAL={place}\nCMAKE_HOME_DIRECTORY:INTERNAL={home}\n")
        with pytest.raises(CFMoEError, match="not today"):
            native.build(native.PRESETS["ios-arm64"])
        assert directory.exists() == stays


@contextlib.contextmanager
def _build_that_never_ends(directory: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A process in `native.build`, with a cache in `directory`, and the number of the compiler that it has started."""
    fake = directory / "cmake"
    fake.write_text(f"#!/bin/sh\nsleep 300 &\necho $! > {directory}/compiler\nwait\n")
    fake.chmod(0o755)
    code = f"from cfmoe.package import native\nfrom pathlib import Path\nnative._tool = lambda name: Path({str(fake)!r})\n"
    code += "native.build(native.PRESETS['linux-arm64'])\n"
    environment = os.environ | {"CFMOE_NATIVE_CACHE": str(directory / "cache")}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.DEVNULL)
    started = directory / "compiler"
    try:
        for _ in range(600):
            if started.exists() and started.read_text().strip():
                break
            time.sleep(0.1)
        compiler = int(started.read_text())
        yield process, compiler
    finally:
        process.kill()
        process.wait()
        if started.exists() and _runs(int(started.read_text())):
            os.kill(int(started.read_text()), signal.SIGKILL)


def _runs(number: int) -> bool:
    try:
        return "zombie" not in Path(f"/proc/{number}/status").read_text()
    except OSError:
        return False


def test_an_interrupted_build_takes_its_compilers_with_it(tmp_path: Path) -> None:
    with _build_that_never_ends(tmp_path) as (process, compiler):
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) != 0
        for _ in range(100):
            if not _runs(compiler):
                return
            time.sleep(0.1)
        pytest.fail("the compiler still runs")


def test_compilers_of_a_killed_build_keep_their_directory(tmp_path: Path) -> None:
    with _build_that_never_ends(tmp_path) as (process, compiler):
        process.kill()
        process.wait()
        with open(tmp_path / "cache" / "linux-arm64.lock") as file:
            with pytest.raises(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.kill(compiler, signal.SIGKILL)  # the shell that waits for it ends with it
            for _ in range(100):
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return
                time.sleep(0.1)
        pytest.fail("nobody works there any more, and it is locked")


def test_a_full_cache_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CFMOE_NATIVE_CACHE", str(tmp_path / "cache"))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(native.shutil, "disk_usage", lambda _place: usage._replace(free=5 << 20))
    with pytest.raises(CFMoEError, match=r"cache has 5 MiB free and .* takes 512 MiB; free .*, or name another .*CFMOE_NATIVE_CACHE"):
        native.build(native.PRESETS["ios-arm64"])
    assert not (tmp_path / "cache" / "build-ios-arm64").exists()


@pytest.mark.parametrize("case", sorted(TINY))
def test_the_decoder_in_the_manifest_is_the_checkpoints(case: str, tmp_path: Path, demo_model: Path) -> None:
    model = tiny_checkpoint(case, tmp_path / "model", demo_model / "tokenizer.json")
    config = compiler._generation_facts(model, resolve(Checkpoint(model).config, "config.json")[0])
    text = json.dumps(decoder_facts.record(config))
    assert decoder_facts.restore(json.loads(text), "manifest.json") == config


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_layers", "6"),
        ("num_layers", True),
        ("num_heads", 1 << 40),
        ("rope", {"theta": 1.0}),
        ("moe_layers", 3),
        ("rms_norm_eps", None),
    ],
)
def test_a_decoder_that_is_none_is_refused(field: str, value: object, demo_artifact: Path) -> None:
    facts = json.loads((demo_artifact / "manifest.json").read_text())["decoder"]
    with pytest.raises(CFMoEError, match=rf"m\.json: decoder\.{field}.*compile the model again"):
        decoder_facts.restore(facts | {field: value}, "m.json")
    with pytest.raises(CFMoEError, match=r"m\.json: decoder is"):
        decoder_facts.restore({name: v for name, v in facts.items() if name != field}, "m.json")


def test_other_targets_keep_the_artifact_whole(demo_artifact: Path, tmp_path: Path) -> None:
    artifact = Artifact.open(demo_artifact)
    (name,) = artifact.manifest.targets
    entry = json.loads((demo_artifact / "manifest.json").read_text())["targets"][name]
    renamed = entry | {"plan": "lib/other/plan.json", "library": "lib/other/kernels.so"}
    files = {renamed[key]: demo_artifact / entry[key] for key in ("plan", "library")}
    (tmp_path / "out").mkdir()
    made = Artifact.open(retarget(artifact, {name: TargetFiles(renamed, files)}, tmp_path / "out"))
    assert made.verify() > 0
    assert not (made.path / entry["plan"]).exists()
    assert made.manifest.model == artifact.manifest.model
    with Engine(made.path) as engine, engine.session() as session:
        assert session.generate([1, 2, 3], 2, stop_tokens=[]).token_ids


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept builds and Android's tools; what `make android-tools` brings has to be there."""
    monkeypatch.setenv("CFMOE_NATIVE_CACHE", str(ROOT / "build" / "native"))
    monkeypatch.setenv("CFMOE_ANDROID_TOOLS", os.environ.get("CFMOE_ANDROID_TOOLS", str(ROOT / "build" / "android-tools")))
    for variable in ("ANDROID_HOME", "ANDROID_NDK_HOME"):
        monkeypatch.delenv(variable, raising=False)
    missing = [*native.missing(), *(tool.name for tool in android_tools.missing_tools())]
    if missing or QEMU is None:
        pytest.fail(f"missing: {', '.join([*missing, *([] if QEMU else ['qemu-aarch64-static'])])}; make android-tools")


@pytest.mark.slow
def test_the_engine_in_the_apk_gives_the_tokens_of_x86_64(tools: None, demo_artifact: Path, cli: Cli, tmp_path: Path) -> None:
    """From `cfmoe package` to 64 tokens, by way of nothing but what the APK holds."""
    out = tmp_path / "out"
    done = cli("package", demo_artifact, "--platform", "android", "--out", out, "--json", timeout=1800)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    apk = Path(facts["product"])
    assert sorted(path.name for path in out.iterdir()) == sorted([apk.name, "package.json"])
    assert facts["targets"] == ["aarch64-i8mm", "aarch64-dotprod", "aarch64"] and "ANDROID_NDK_HOME" in facts["notes"][0]

    signature = subprocess.run(["apksigner", "verify", "-v", apk], capture_output=True, text=True, check=True).stdout
    assert "Verified using v2 scheme (APK Signature Scheme v2): true" in signature
    badging = subprocess.run(["aapt2", "dump", "badging", apk], capture_output=True, text=True, check=True).stdout
    assert "package: name='org.cfmoe.app'" in badging and "'arm64-v8a'" in badging and "uses-permission" not in badging
    with zipfile.ZipFile(apk) as archive:
        assert archive.testzip() is None
        archive.extractall(tmp_path / "apk")
    unpacked = tmp_path / "apk"
    classes = subprocess.run(["dexdump", "-l", "plain", unpacked / "classes.dex"], capture_output=True, text=True, check=True).stdout
    assert re.search(r"Class descriptor\s+: 'Lorg/cfmoe/app/MainActivity;'", classes)
    program = unpacked / "lib" / "arm64-v8a" / "libcfmoe-engine.so"
    (model,) = (unpacked / "assets" / "models").iterdir()
    for file in (program, *model.glob("lib/*/kernels.so")):
        assert min(load_alignments(file)) >= 16384, file

    program.chmod(0o755)
    assert Artifact.open(model).verify() > 0
    prompt = "The proposal adds"
    with Engine(demo_artifact) as engine, engine.session() as session:
        expected = session.generate(Tokenizer(demo_artifact).encode(prompt), 64, stop_tokens=[]).token_ids
    with EngineProcess([str(QEMU), program]) as process:
        loaded = process.call("load", artifact=str(model), expert_percent=40, threads=2)
        assert loaded["event"] == "loaded", loaded
        tokens, _, _ = process.generate(prompt=prompt, max_new_tokens=64, stop_tokens=[])
    assert tokens == expected
    # The same again is refused, and with --force takes what was kept and makes the same bytes.
    assert "--force" in error_line(cli("package", demo_artifact, "--platform", "android", "--out", out))
    before = apk.read_bytes()
    again = cli("package", demo_artifact, "--platform", "android", "--out", out, "--force", "--json", timeout=600)
    assert again.returncode == 0, again.stderr
    assert apk.read_bytes() == before

"""cfmoe package --platform ios but for its long builds: small real archives, the artifact's own kernels. What Xcode would open, what is
refused, and what an interruption leaves."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
import os
import plistlib
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cfmoe.artifact import Artifact
from cfmoe.compile.further_target import FurtherTarget
from cfmoe.errors import CFMoEError
from cfmoe.package import native, packager
from cfmoe.runtime import Engine
from ios_symbols import c_library, standard_library
from mach_o import read_object, write_small_archive
from support import ROOT
from xcode_project import file_paths, settings_paths

SLICES = {"ios-arm64": "arm64-apple-ios15.0", "ios-arm64-simulator": "arm64-apple-ios15.0-simulator"}


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("archives")
    return {name: write_small_archive(directory / name / "libcfmoe.a", target) for name, target in SLICES.items()}


@pytest.fixture
def short(
    archives: dict[str, Path], demo_artifact: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small archives in place of the engine's, and as a phone's kernels those that the artifact has for this machine."""
    name, entry = next(iter(json.loads((demo_artifact / "manifest.json").read_text())["targets"].items()))
    directory = tmp_path_factory.mktemp("kernels")
    shutil.copy(demo_artifact / entry["plan"], directory / "plan.json")
    shutil.copy(demo_artifact / entry["library"], directory / "kernels.so")
    kernels = [FurtherTarget(name, entry, "cfmoe_0123456789abcdef_", directory)]
    monkeypatch.setattr(packager, "phone_kernels", lambda *_arguments: kernels)
    monkeypatch.setattr(native, "build", lambda preset, *_arguments: archives[preset.name])


def _digests(directory: Path) -> dict[str, str]:
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


@pytest.mark.usefixtures("short")
def test_the_project_has_all_that_it_refers_to(demo_artifact: Path, archives: dict[str, Path], tmp_path: Path) -> None:
    from pbxproj import XcodeProject

    out = tmp_path / "out"
    made = packager.package(demo_artifact, "ios", out)
    assert made.product == out / "CFMoE" / "ios_app" / "CFMoE.xcodeproj"
    assert sorted(path.name for path in out.iterdir()) == ["CFMoE", "package.json"]
    summary = json.loads((out / "package.json").read_text())
    assert (summary["platform"], out / summary["product"]) == ("ios", made.product)
    assert any("compile with --target llvm,metal" in note for note in made.notes)

    project, app = XcodeProject.load(str(made.product / "project.pbxproj")), made.product.parent
    named = {**file_paths(project, app), **settings_paths(project, app)}
    assert len(named) > 25 and any(name.startswith("HEADER_SEARCH_PATHS") for name in named)
    assert [path for path in named.values() if not path.exists()] == []
    for path in out.rglob("*"):
        assert path.exists() and path.resolve().is_relative_to(out), f"{path} leads out of the package"
    framework = app / "Libraries" / "CFMoE.xcframework"
    for row in plistlib.loads((framework / "Info.plist").read_bytes())["AvailableLibraries"]:
        library = framework / row["LibraryIdentifier"] / row["LibraryPath"]
        assert library.read_bytes() == archives[row["LibraryIdentifier"]].read_bytes()
    (model,) = (app / "Model").iterdir()
    assert Artifact.open(model).verify() > 0
    with Engine(model) as engine, engine.session() as session:
        assert session.generate([1, 2, 3], 2, stop_tokens=[]).token_ids

    with pytest.raises(CFMoEError, match="--force"):
        packager.package(demo_artifact, "ios", out)
    before = _digests(out)
    packager.package(demo_artifact, "ios", out, force=True)
    assert _digests(out) == before


@pytest.mark.slow
@pytest.mark.usefixtures("short")
def test_kernels_for_metal_go_along(demo_artifact: Path, demo_model: Path, tmp_path: Path) -> None:
    from cfmoe.compile import compile_model

    metal = Artifact.open(compile_model(demo_model, tmp_path / "metal", targets=["metal"]))
    made = packager.package(metal.path, "ios", tmp_path / "out")
    assert made.targets[-1] == "metal-generic" and not any("Metal" in note for note in made.notes)
    (model,) = (made.product.parent / "Model").iterdir()
    packed = Artifact.open(model)
    assert packed.verify() > 0
    assert set(packed.manifest.targets) == {"metal-generic", *Artifact.open(demo_artifact).manifest.targets}
    target = packed.manifest.targets["metal-generic"]
    assert target.device == "metal" and target.library.endswith("kernels.metal")
    for name in (target.library, target.plan):
        assert (model / name).read_bytes() == (metal.path / name).read_bytes()


def _interrupt_at(stage: str, act: Callable[[], object]) -> Callable[[str, int, int], None]:
    def progress(at: str, done: int, _total: int) -> None:
        if at == stage and done > 0:
            act()

    return progress


def _raise() -> None:
    raise KeyboardInterrupt


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("stage", ["artifact", "model"])
def test_an_interruption_leaves_nothing(stage: str, demo_artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        packager.package(demo_artifact, "ios", tmp_path / "deep" / "out", progress=_interrupt_at(stage, _raise))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("short")
def test_what_a_kill_leaves_is_swept_by_the_next(demo_artifact: Path, tmp_path: Path) -> None:
    packager.package(demo_artifact, "ios", tmp_path / "out")
    before = _digests(tmp_path / "out")
    child = os.fork()
    if child == 0:
        packager.package(
            demo_artifact,
            "ios",
            tmp_path / "out",
            force=True,
            progress=_interrupt_at("model", lambda: os.kill(os.getpid(), signal.SIGKILL)),
        )
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2
    assert _digests(tmp_path / "out") == before
    packager.package(demo_artifact, "ios", tmp_path / "out", force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("part", ["libcfmoe.a", "project.pbxproj", "kernels.so"])
def test_a_disk_that_fills_leaves_nothing(part: str, demo_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = shutil.copyfile

    def copyfile(source: str | Path, target: str | Path, **options: bool) -> object:
        if Path(target).name == part:
            Path(target).write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        return whole(source, target, **options)

    monkeypatch.setattr(shutil, "copyfile", copyfile)
    with pytest.raises(CFMoEError, match=r"cannot write .*: no space left on device; free some space there or choose another place"):
        packager.package(demo_artifact, "ios", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_source_compiles_for_ios(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The preset, from its flags to the object of one source: the platform, and nothing wanted that the oldest iOS lacks."""
    for variable in ("ZIG_GLOBAL_CACHE_DIR", "ZIG_LOCAL_CACHE_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / "zig"))
    name = "CMakeFiles/cfmoe_core.dir/runtime_ext/src/tokenizer/byte_level_bpe.cc.obj"
    cmake, ninja = str(native._tool("cmake")), str(native._tool("ninja"))
    options = [f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    configure = [cmake, "--preset", "ios-arm64", "-B", str(tmp_path / "build"), *options]
    for command in (configure, [ninja, "-C", str(tmp_path / "build"), name]):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=600, check=False)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    made = read_object(name, (tmp_path / "build" / name).read_bytes())
    assert (made.platform, made.version) == (2, 15 << 16)
    assert not {section for section in made.sections if "DWARF" in section}
    outside = {symbol for symbol in made.wanted if "cfmoe" not in symbol}
    assert len(outside) > 20 and outside - c_library() - standard_library() - {"___dso_handle"} == set()


def test_everything_that_is_missing_is_named_at_once(demo_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(native, "_tool", lambda name: None)
    monkeypatch.setattr(native.importlib.util, "find_spec", lambda name, *rest: None if name in ("ziglang", "tvm") else found(name, *rest))
    with pytest.raises(CFMoEError) as caught:
        packager.package(demo_artifact, "ios", tmp_path / "out")
    message = str(caught.value)
    assert "\n" not in message and "aapt" not in message
    assert message.startswith("missing for --platform ios: cmake, ninja, zig, the kernel compiler; run ")
    for remedy in ("pip install cmake", "pip install ninja", "pip install 'cfmoe[cross]'", "pip install 'cfmoe[compile]'"):
        assert remedy in message
    assert list(tmp_path.iterdir()) == []


def test_ziglang_without_its_compiler_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package whose executable is gone: the check of tools names it, and a build all the same, in one line, and keeps nothing."""
    half = importlib.util.spec_from_file_location("ziglang", tmp_path / "half" / "ziglang" / "__init__.py")
    found = importlib.util.find_spec
    with monkeypatch.context() as patch:
        patch.setattr(native.importlib.util, "find_spec", lambda name, *rest: half if name == "ziglang" else found(name, *rest))
        assert native.missing() == {"zig": "pip install --force-reinstall ziglang"}
    monkeypatch.setenv("CFMOE_NATIVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "half"))
    (tmp_path / "half" / "ziglang").mkdir(parents=True)
    (tmp_path / "half" / "ziglang" / "__init__.py").touch()
    with pytest.raises(CFMoEError, match=r"ios-arm64 cannot be built: CMake Error .*pip install --force-reinstall ziglang") as caught:
        native.build(native.PRESETS["ios-arm64"])
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").rglob("*.a"))

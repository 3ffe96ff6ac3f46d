"""The iOS app as far as Linux can tell: the Xcode project is complete, everything parses, the Metal device is valid Objective-C++,
what is packaged holds together. Marked `swift`: CFMoEKit's own tests with the real engine, and SwiftUI's types, in a Debian trixie root."""

from __future__ import annotations

import importlib.resources
import importlib.util
import json
import os
import plistlib
import re
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cfmoe.artifact.reader import Artifact
from cfmoe.errors import CFMoEError
from cfmoe.package import xcode
from mach_o import write_small_archive
from model_archives import write_archives
from objective_cxx import check_metal
from support import ROOT, load_script
from xcode_project import file_paths

APP = ROOT / "ios_app"
KIT = APP / "CFMoEKit"
PROJECT = APP / "CFMoE.xcodeproj" / "project.pbxproj"
METAL = ROOT / "runtime_ext" / "src" / "device" / "metal"
PROMPT = "The proposal adds a new statement to the language. It"


def _project_text() -> str:
    text = load_script(APP / "tools" / "make_project.py").text()
    assert isinstance(text, str)
    return text


def _phase(project: Any, isa: str) -> list[Any]:
    (phase,) = project.objects.get_objects_in_section(isa)
    return [project.objects[key] for key in phase.files]


def test_the_project_is_what_its_sources_make() -> None:
    assert PROJECT.read_text() == _project_text(), "run ios_app/tools/make_project.py"


def test_the_project_builds_every_source() -> None:
    from pbxproj import XcodeProject

    project = XcodeProject.load(str(PROJECT))
    paths = file_paths(project, APP)
    made_later = {APP / "Libraries" / "CFMoE.xcframework", APP / "Model"}
    assert {path for path in paths.values() if not path.exists()} - made_later == set()
    compiled = {paths[row.fileRef] for row in _phase(project, "PBXSourcesBuildPhase")}
    assert compiled == {*(APP / "CFMoE").rglob("*.swift"), *METAL.glob("*.mm")}
    copied = {paths[row.fileRef].name for row in _phase(project, "PBXResourcesBuildPhase")}
    assert copied == {"Assets.xcassets", "PrivacyInfo.xcprivacy", "Model"}
    linked = _phase(project, "PBXFrameworksBuildPhase")
    assert APP / "Libraries" / "CFMoE.xcframework" in {paths.get(row["fileRef"]) for row in linked if "fileRef" in row}
    (product,) = [project.objects[row["productRef"]] for row in linked if "productRef" in row]
    package = project.objects[product.package]
    assert (product.productName, package.relativePath) == ("CFMoEKit", "CFMoEKit")
    for row in project.objects.get_objects_in_section("XCBuildConfiguration"):
        settings = row.buildSettings
        for name in ("INFOPLIST_FILE", "CODE_SIGN_ENTITLEMENTS"):
            assert name not in settings or (APP / settings[name]).is_file()
    # The reader has found every object.
    assert set(re.findall(r"^\t\t([0-9A-F]{24}) = ", PROJECT.read_text(), re.M)) == set(project.objects.get_keys())


def test_property_lists_and_assets() -> None:
    resources = APP / "CFMoE" / "Resources"
    info = plistlib.loads((resources / "Info.plist").read_bytes())
    assert info["CFBundleIdentifier"] == "$(PRODUCT_BUNDLE_IDENTIFIER)" and "UILaunchScreen" in info
    # An iPad shows two apps side by side, which takes every orientation.
    assert len(info["UISupportedInterfaceOrientations~ipad"]) == 4
    # The app asks for nothing of the user's, and reaches no network.
    assert not [name for name in info if name.endswith("UsageDescription") or name == "NSAppTransportSecurity"]
    entitlements = plistlib.loads((resources / "CFMoE.entitlements").read_bytes())
    assert entitlements == {"com.apple.developer.kernel.increased-memory-limit": True}
    privacy = plistlib.loads((resources / "PrivacyInfo.xcprivacy").read_bytes())
    assert privacy["NSPrivacyTracking"] is False and privacy["NSPrivacyCollectedDataTypes"] == []
    for contents in resources.rglob("Contents.json"):
        for image in json.loads(contents.read_text()).get("images", []):
            data = (contents.parent / image["filename"]).read_bytes()
            assert data[:8] == b"\x89PNG\r\n\x1a\n"
            width, height, _, colour = struct.unpack_from(">IIBB", data, 16)
            assert f"{width}x{height}" == image["size"] and colour in (2, 3)  # no transparency: the store refuses it


def test_swift_sources_parse() -> None:
    import tree_sitter
    import tree_sitter_swift

    parser = tree_sitter.Parser(tree_sitter.Language(tree_sitter_swift.language()))
    sources = [*(APP / "CFMoE").rglob("*.swift"), *KIT.rglob("*.swift")]
    assert len(sources) > 40
    bad = [path for path in sources if parser.parse(path.read_bytes()).root_node.has_error]
    assert bad == []
    assert parser.parse(b"struct A { func f( { }").root_node.has_error
    for path in sources:
        first = path.read_text().splitlines()[0]
        assert first.startswith("// "), f"{path} does not say what it is for"


def test_the_package_sees_the_engines_own_header() -> None:
    header = KIT / "Sources" / "CCFMoE" / "cfmoe.h"
    assert header.resolve() == ROOT / "runtime_ext" / "include" / "cfmoe" / "cfmoe.h"


@pytest.mark.parametrize("source", ["metal_device.mm", "metal_stream.mm"])
def test_the_metal_device_is_valid(source: str, tmp_path: Path) -> None:
    result = check_metal(METAL / source, "arm64-apple-ios15.0")
    assert result.returncode == 0, result.stderr
    # What is no member of the device interface or of Metal is noticed.
    text = (METAL / source).read_text()
    for right, wrong in {"metal_device.mm": ("facts.max_scalars", "facts.scalars"), "metal_stream.mm": (" commit]", " commmit]")}.items():
        if right == source:
            assert wrong[0] in text
            changed = tmp_path / source
            changed.write_text(text.replace(*wrong))
            assert check_metal(changed, "arm64-apple-ios15.0").returncode != 0


@pytest.mark.slow
@pytest.mark.parametrize("target", ["arm64-apple-ios15.0-simulator", "arm64-apple-macos12.0"])
def test_the_metal_device_is_valid_elsewhere(target: str) -> None:
    for source in sorted(METAL.glob("*.mm")):
        result = check_metal(source, target)
        assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def metal_artifact(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model with kernels for Metal."""
    from cfmoe.compile import compile_model

    return compile_model(demo_model, tmp_path_factory.mktemp("metal") / "artifact", targets=["metal"])


@pytest.mark.slow
def test_metal_kernels_are_called_as_they_want(metal_artifact: Path) -> None:
    """The signatures in kernels.metal are those that metal_stream.mm serves: buffers in order, then scalars on 8 bytes each."""
    (target,) = Artifact.open(metal_artifact).manifest.targets.values()
    source = (metal_artifact / target.library).read_text()
    kernels = json.loads((metal_artifact / target.plan).read_text())["kernels"]
    for name, kernel in kernels.items():
        match = re.search(rf"kernel void {kernel['entry']}\((.*?)\) {{", source, re.S)
        assert match is not None, name
        parameters = [part.strip() for part in match[1].split(",\n")]
        buffers = [part for part in parameters if part.startswith("device ")]
        assert [int(re.findall(r"buffer\((\d+)\)", part)[0]) for part in buffers] == list(range(kernel["buffers"])), name
        blocks = [part for part in parameters if part.startswith("constant ")]
        assert len(blocks) == (kernel["scalars"] > 0), name
        if blocks:
            assert f"buffer({kernel['buffers']})" in blocks[0], name
            fields = re.search(rf"struct {blocks[0].split()[1].rstrip('&')} {{(.*?)}};", source, re.S)
            assert fields is not None
            assert re.fullmatch(r"(\s*int \w+\[2\];)*\s*", fields[1]) and fields[1].count(";") == kernel["scalars"], name


@pytest.mark.slow
def test_metal_kernels_are_valid(metal_artifact: Path, tmp_path: Path) -> None:
    """By clang, against declarations of what they use of the Metal shading language."""
    (target,) = Artifact.open(metal_artifact).manifest.targets.values()
    source = metal_artifact / target.library
    flags = ["-x", "c++", "-std=c++20", "-fsyntax-only", "-nostdinc", "-nostdinc++", "-Wno-unknown-attributes"]

    def check(path: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "ziglang", "clang", *flags, "-isystem", str(ROOT / "tests" / "metal_stubs"), str(path)]
        return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=300, check=False)

    result = check(source)
    assert result.returncode == 0, result.stderr[:4000]
    wrong = tmp_path / "wrong.metal"
    wrong.write_text(source.read_text().replace("rint(", "rounded(", 1))
    assert check(wrong).returncode != 0


def test_what_is_packaged_holds_together(demo_artifact: Path, tmp_path: Path) -> None:
    from pbxproj import XcodeProject

    device = write_small_archive(tmp_path / "device" / "libcfmoe.a", "arm64-apple-ios15.0")
    simulator = write_small_archive(tmp_path / "simulator" / "libcfmoe.a", "arm64-apple-ios15.0-simulator")
    steps: list[tuple[int, int]] = []
    libraries = {"ios-arm64": device, "ios-arm64-simulator": simulator}
    out = tmp_path / "packaged"
    project_path = xcode.assemble(APP, libraries, demo_artifact, out, progress=lambda _stage, done, total: steps.append((done, total)))
    assert project_path == out / "ios_app" / "CFMoE.xcodeproj"
    assert steps and steps[-1][0] == steps[-1][1]
    project = XcodeProject.load(str(project_path / "project.pbxproj"))
    assert [path for path in file_paths(project, out / "ios_app").values() if not path.exists()] == []
    (model,) = (out / "ios_app" / "Model").iterdir()
    Artifact.open(model).verify()
    framework = out / "ios_app" / "Libraries" / "CFMoE.xcframework"
    rows = plistlib.loads((framework / "Info.plist").read_bytes())["AvailableLibraries"]
    assert [(row["LibraryIdentifier"], row.get("SupportedPlatformVariant")) for row in rows] == [
        ("ios-arm64", None),
        ("ios-arm64-simulator", "simulator"),
    ]
    for row in rows:
        packed = framework / row["LibraryIdentifier"] / row["LibraryPath"]
        assert packed.read_bytes() == libraries[row["LibraryIdentifier"]].read_bytes()
    # Nothing in it points out of it: links, and what the Metal sources include.
    for path in out.rglob("*"):
        assert path.exists() and path.resolve().is_relative_to(out), path
    for source in (out / "runtime_ext" / "src").rglob("*"):
        for name in re.findall(r'^#include "(.+)"', source.read_text(), re.M) if source.is_file() else ():
            assert (out / "runtime_ext" / "src" / name).is_file(), f"{source} includes {name}"
    with pytest.raises(CFMoEError, match="exists"):
        xcode.assemble(APP, libraries, demo_artifact, out)
    xcode.assemble(APP, {"ios-arm64": device}, demo_artifact, out, force=True)
    assert not (framework / "ios-arm64-simulator").exists()


def test_wrong_parts_are_refused(demo_artifact: Path, tmp_path: Path) -> None:
    device = write_small_archive(tmp_path / "device" / "libcfmoe.a", "arm64-apple-ios15.0")
    mac = write_small_archive(tmp_path / "mac" / "libcfmoe.a", "arm64-apple-macos12.0")
    linux = write_small_archive(tmp_path / "linux" / "libcfmoe.a", "aarch64-linux-musl")
    text = tmp_path / "text.a"
    text.write_text("no archive")
    cut = tmp_path / "cut.a"
    cut.write_bytes(device.read_bytes()[:-100])
    out = tmp_path / "out"
    for libraries, message in (
        ({}, "needs a static library"),
        ({"ios-arm64": mac}, "is for platform 1"),
        ({"ios-arm64": linux}, "no Mach-O objects"),
        ({"ios-arm64": text}, "no static library"),
        ({"ios-arm64": cut}, "damaged"),
        ({"ios-arm64": tmp_path / "gone.a"}, "gone.a"),
        ({"ios-arm64": device, "tvos-arm64": device}, "no platform tvos-arm64"),
        ({"ios-arm64": device, "ios-arm64-simulator": device}, "is for platform 2"),
    ):
        with pytest.raises(CFMoEError, match=message):
            xcode.assemble(APP, libraries, demo_artifact, out)
    with pytest.raises(CFMoEError, match="checkout"):
        xcode.assemble(tmp_path / "elsewhere", {"ios-arm64": device}, demo_artifact, out)
    with pytest.raises(CFMoEError, match=r"manifest\.json"):
        xcode.assemble(APP, {"ios-arm64": device}, tmp_path, out)

    def interrupt(_stage: str, _done: int, _total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        xcode.assemble(APP, {"ios-arm64": device}, demo_artifact, out, progress=interrupt)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith((".out", "out"))]


SWIFT_BUILD = ROOT / "build" / "swift"
# The user's real cache: a test's own home would mean a new root every time.
SWIFT_ROOT = os.environ.get("CFMOE_SWIFT_ROOT") or str(
    Path(os.environ.get("XDG_CACHE_HOME") or Path(os.environ.get("HOME", "/root")) / ".cache") / "cfmoe" / "swift-trixie"
)


def _in_swift_root(command: Sequence[str | Path], binds: Sequence[Path], **environment: str | Path) -> subprocess.CompletedProcess[str]:
    variables = os.environ | {name: str(value) for name, value in environment.items()}
    variables |= {"CFMOE_SWIFT_ROOT": SWIFT_ROOT, "CFMOE_SWIFT_BINDS": os.pathsep.join(map(str, (ROOT, *binds)))}
    call = [str(APP / "tools" / "swift_root.sh"), "run", *map(str, command)]
    return subprocess.run(call, cwd=KIT, env=variables, capture_output=True, encoding="utf-8", timeout=1800, check=False)


def _swift(command: str, binds: Sequence[Path] = (), **environment: str | Path) -> subprocess.CompletedProcess[str]:
    with importlib.resources.as_file(importlib.resources.files("cfmoe.runtime").joinpath("libcfmoe.so")) as library:
        folder = library.parent
    tvm_ffi = importlib.util.find_spec("tvm_ffi")
    assert tvm_ffi is not None and tvm_ffi.submodule_search_locations
    libraries = [folder, Path(tvm_ffi.submodule_search_locations[0]) / "lib"]
    call = ["swift", command, "--scratch-path", SWIFT_BUILD, "-Xlinker", f"-L{folder}", "-Xlinker", "--allow-shlib-undefined"]
    search = os.pathsep.join(map(str, libraries))
    return _in_swift_root(call, [*libraries, *binds], LD_LIBRARY_PATH=search, **environment)


@pytest.fixture(scope="module")
def swift_root() -> None:
    """The trixie root: set up on first use, as root, from Debian's mirror."""
    setup = [str(APP / "tools" / "swift_root.sh"), "setup"]
    result = subprocess.run(setup, env=os.environ | {"CFMOE_SWIFT_ROOT": SWIFT_ROOT}, capture_output=True, encoding="utf-8", timeout=3600)
    assert result.returncode == 0, result.stderr


@pytest.mark.swift
@pytest.mark.usefixtures("swift_root")
def test_cfmoekit_with_the_real_engine(demo_artifact: Path, demo_model: Path, tmp_path: Path) -> None:
    from artifacts import write
    from cfmoe.compile import compile_model
    from cfmoe.runtime import Engine, Tokenizer
    from chat_artifact import write_chat_artifact, write_conversations
    from engine_process import host_engine

    archives = tmp_path / "archives"
    write_archives(write(tmp_path / "tiny"), archives)
    write_archives(demo_artifact, tmp_path / "all")
    (tmp_path / "all" / "good-deflated.zip").rename(archives / "demo.zip")
    with Engine(demo_artifact) as engine, engine.session() as session:
        tokens = session.generate(Tokenizer(demo_artifact).encode(PROMPT), 64).token_ids
    (tmp_path / "tokens.json").write_text(json.dumps(tokens))
    chat = write_chat_artifact(demo_artifact, demo_model, tmp_path / "chat")
    conversations = write_conversations(tmp_path / "conversations.json")
    lengths = ["--prompt-tokens", "64", "--new-tokens", "32"]
    bench = [host_engine(), "bench", demo_artifact, "--memory-budget", "100%,25%", *lengths, "--json"]
    (tmp_path / "bench.json").write_bytes(subprocess.run(bench, check=True, capture_output=True, timeout=300).stdout)
    result = _swift(
        "test",
        [tmp_path, demo_artifact],
        CFMOE_ARTIFACT=demo_artifact,
        CFMOE_CHAT_ARTIFACT=chat,
        CFMOE_CONVERSATIONS=conversations,
        CFMOE_METAL_ARTIFACT=compile_model(demo_model, tmp_path / "metal", targets=["llvm", "metal"]),
        CFMOE_ARCHIVES=archives,
        CFMOE_EXPECTED_TOKENS=tmp_path / "tokens.json",
        CFMOE_EXPECTED_BENCH=tmp_path / "bench.json",
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    executed = [int(count) for count in re.findall(r"Executed (\d+) tests", result.stdout)]
    assert max(executed) >= 35, result.stdout[-2000:]
    assert "warning:" not in result.stdout + result.stderr


@pytest.mark.swift
@pytest.mark.usefixtures("swift_root")
def test_the_app_parses_and_type_checks(tmp_path: Path) -> None:
    built = _swift("build")
    assert built.returncode == 0, built.stdout[-4000:] + built.stderr
    check = [APP / "tools" / "check_sources.sh", SWIFT_BUILD]
    checked = _in_swift_root(check, [])
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "parsed" in checked.stdout and "type-checked" in checked.stdout
    # Formatted as .swift-format says: formatting again changes nothing.
    swift_files = [*(APP / "CFMoE").rglob("*.swift"), *KIT.rglob("Sources/**/*.swift"), *KIT.rglob("Tests/**/*.swift")]
    formatter = ["swift", "format", "--configuration", APP / ".swift-format"]
    formatted = _in_swift_root([*formatter, *swift_files], [])
    assert formatted.stdout == "".join(path.read_text() for path in swift_files), "run swift format -i"
    # A wrong call of the package, and one of SwiftUI, are noticed.
    for right, wrong in (("residents.count)", "residents.count(ofRow: 1))"), (".frame(height:", ".frame(tall:")):
        path = APP / "CFMoE" / "Views" / "HeatMapView.swift"
        text = path.read_text()
        assert right in text
        changed = tmp_path / "HeatMapView.swift"
        changed.write_text(text.replace(right, wrong))
        refused = _in_swift_root(check, [tmp_path], CFMOE_REPLACE=changed)
        assert refused.returncode != 0 and "error:" in refused.stderr, refused.stdout + refused.stderr

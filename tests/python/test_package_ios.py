"""The archive that an iOS app links: Mach-O for iOS, kernels inside, no symbol for others but the C API, nothing wanted that iOS lacks.
And a whole program of it, the Metal device and a main function, as Xcode would link one, but by zig's linker."""

from __future__ import annotations

import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import ziglang

from cfmoe.artifact import Artifact
from cfmoe.package import native
from cfmoe.package.kernels import phone_kernels
from ios_symbols import STANDARD_LIBRARY, c_library, standard_library
from mach_o import Object, objects, write_members
from objective_cxx import compile_metal
from support import ROOT

PLATFORMS = {"ios-arm64": 2, "ios-arm64-simulator": 7}  # of LC_BUILD_VERSION
ZIG = Path(ziglang.__file__).parent
# What the Metal device uses of Foundation, Metal, the runtime of Objective-C and clang's own library.
_CLASSES = ("MTLCompileOptions", "MTLComputePipelineDescriptor", "NSArray", "NSProcessInfo", "NSString")
_RUNTIME = ("alloc", "alloc_init", "autoreleasePoolPop", "autoreleasePoolPush", "autoreleaseReturnValue", "enumerationMutation", "msgSend")
_RUNTIME += ("release", "retain", "retainAutoreleasedReturnValue", "retainAutoreleaseReturnValue", "storeStrong", "retainBlock")
FRAMEWORKS = {f"_OBJC_CLASS_$_{name}" for name in _CLASSES} | {f"_objc_{name}" for name in _RUNTIME}
FRAMEWORKS |= {"_MTLCreateSystemDefaultDevice", "___NSArray0__", "___isPlatformVersionAtLeast", "__objc_empty_cache"}

_C_FLAGS = ["-target", "aarch64-ios.15.0", "-O2", "-isystem", str(ZIG / "lib" / "libc" / "include" / "any-darwin-any")]
_C_FLAGS += ["-I", str(ROOT / "runtime_ext" / "include")]

pytestmark = pytest.mark.cross


@pytest.fixture(autouse=True)
def kept_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CFMOE_NATIVE_CACHE", str(ROOT / "build" / "native"))


def _archive(name: str, artifact: Path) -> tuple[Path, set[str]]:
    """The archive for the platform `name`, and what the names of its kernels begin with."""
    preset = native.PRESETS[name]
    kernels = phone_kernels(Artifact.open(artifact), preset.triple)
    prefixes = [k.prefix for k in kernels]
    return native.build(preset, [k.object_file for k in kernels], prefixes), set(prefixes)


def _zig(*arguments: str) -> None:
    result = subprocess.run([sys.executable, "-m", "ziglang", *arguments], capture_output=True, encoding="utf-8", timeout=600, check=False)
    assert result.returncode == 0, result.stderr[-4000:]


def _stub(directory: Path, name: str, install_name: str, symbols: set[str]) -> Path:
    """What a linker needs to know of a library of the system: that it has `symbols`. zig takes names such as libc for its own."""
    rows = ", ".join(f"'{symbol}'" for symbol in sorted(symbols))
    text = f"targets: [ arm64-ios ]\ninstall-name: '{install_name}'\nexports:\n  - targets: [ arm64-ios ]\n    symbols: [ {rows} ]\n"
    made = directory / f"{name}.tbd"
    made.write_text(f"--- !tapi-tbd\ntbd-version: 4\n{text}...\n")
    return made


def _commands(data: bytes, count: int) -> tuple[set[str], tuple[int, int], list[tuple[int, int]]]:
    """Of a Mach-O program: the libraries that it loads, platform and least version, address and file offset of each segment."""
    loaded: set[str] = set()
    platform = (-1, -1)
    segments = []
    at = 32
    for _ in range(count):
        command, size = struct.unpack_from("<2I", data, at)
        if command == 0xC:  # LC_LOAD_DYLIB
            loaded.add(data[at + struct.unpack_from("<I", data, at + 8)[0] : at + size].split(b"\0")[0].decode())
        elif command == 0x32:  # LC_BUILD_VERSION
            platform = struct.unpack_from("<2I", data, at + 8)
        elif command == 0x19:  # LC_SEGMENT_64
            address, _, offset = struct.unpack_from("<3Q", data, at + 24)
            segments.append((address, offset))
        at += size
    return loaded, platform, segments


def _check_objects(name: str, read: list[Object]) -> None:
    assert len(read) > 30
    for each in read:
        assert (each.platform, each.version) == (PLATFORMS[name], 15 << 16), each.name
    # What the linker is told to load, all of it, defines nothing twice.
    seen: dict[str, Object] = {}
    for each in read:
        for symbol in each.exported | each.private:
            first = seen.setdefault(symbol, each)
            assert first is each or symbol in first.weak & each.weak, f"{symbol} is in {first.name} and {each.name}"


@pytest.mark.parametrize("name", PLATFORMS)
def test_the_archive_is_for_its_platform_and_exports_the_c_api(name: str, demo_artifact: Path) -> None:
    archive, prefixes = _archive(name, demo_artifact)
    read = objects(archive)
    _check_objects(name, read)
    exported = {symbol for each in read for symbol in each.exported}
    headers = "".join(path.read_text() for path in (ROOT / "runtime_ext" / "include" / "cfmoe").glob("*.h"))
    api = {f"_{function}" for function in re.findall(r"^CFMOE_API [^;(]*?\b(cfmoe_\w+)\(", headers, re.M)}
    assert "_cfmoe_engine_open" in api
    kernel_names = {symbol for symbol in exported if symbol.removeprefix("___tvm_ffi_").lstrip("_").startswith(tuple(prefixes))}
    for prefix in prefixes:
        assert any(symbol.startswith(f"___tvm_ffi_{prefix}") for symbol in kernel_names), prefix
    # Weak ones of TVM's compiler: by which kernels find the runtime where they are loaded, and conversions that no kernel for ARM64 calls.
    generated = {symbol for symbol in exported if "TVMBackend" in symbol or "tvm_ffi_library" in symbol}
    generated |= {"___extendhfsf2", "___truncsfhf2"} & {symbol for each in read for symbol in each.weak}
    assert exported - kernel_names - generated == api

    wanted = {symbol for each in read for symbol in each.wanted} - {symbol for each in read for symbol in each.exported | each.private}
    # The last is the linker's own.
    assert wanted - c_library() - standard_library() - {"___dso_handle"} == set(), (
        f"see whether the libc++ of iOS 15 has these, and write them into {STANDARD_LIBRARY.relative_to(ROOT)}"
    )


def test_a_program_of_archive_and_metal_device_links(demo_artifact: Path, tmp_path: Path) -> None:
    archive, prefixes = _archive("ios-arm64", demo_artifact)
    parts = write_members(archive, tmp_path / "archive")
    parts += [compile_metal(source, "arm64-apple-ios15.0", tmp_path) for source in ("metal_device.mm", "metal_stream.mm")]
    main = tmp_path / "main.o"
    _zig("cc", *_C_FLAGS, "-c", str(ROOT / "runtime_ext" / "examples" / "complete.c"), "-o", str(main))
    parts.append(main)
    libraries = [
        _stub(tmp_path, "apple_c", "/usr/lib/libSystem.B.dylib", c_library()),
        _stub(tmp_path, "apple_cxx", "/usr/lib/libc++.1.dylib", standard_library()),
        _stub(tmp_path, "frameworks", "/frameworks", FRAMEWORKS),
    ]
    program = tmp_path / "program"
    (tmp_path / "sysroot").mkdir()
    _zig("cc", *_C_FLAGS, "--sysroot", str(tmp_path / "sysroot"), *map(str, [*parts, *libraries]), "-o", str(program))
    data = program.read_bytes()
    magic, cpu, _, kind, count = struct.unpack_from("<5I", data)
    assert (magic, cpu, kind) == (0xFEEDFACF, 0x0100000C, 2)
    loaded, platform, segments = _commands(data, count)
    assert loaded == {"/usr/lib/libSystem.B.dylib", "/usr/lib/libc++.1.dylib", "/frameworks"}
    assert platform == (2, 15 << 16)
    assert segments and all(address % 16384 == 0 and offset % 16384 == 0 for address, offset in segments)
    for prefix in prefixes:
        assert prefix.encode() in data
    # The linker notices what is missing, and what is there twice.
    few = [part for part in parts if "kernel_library" not in part.name]
    assert len(few) == len(parts) - 1
    for wrong, message in ((few, "undefined symbol"), ([*parts, main], "duplicate symbol")):
        with pytest.raises(AssertionError, match=message):
            _zig("cc", *_C_FLAGS, "--sysroot", str(tmp_path / "sysroot"), *map(str, [*wrong, *libraries]), "-o", str(tmp_path / "wrong"))

"""The archive that an iOS app links: Mach-O for iOS, kernels inside, and no symbol for others but the C API."""

from __future__ import annotations

import importlib.util
import re
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from cfmoe.artifact import Artifact
from cfmoe.package import native
from cfmoe.package.kernels import phone_kernels
from support import ROOT

PLATFORMS = {"ios-arm64": 2, "ios-arm64-simulator": 7}  # of LC_BUILD_VERSION
_SYMTAB, _BUILD_VERSION = 0x2, 0x32
_EXTERNAL, _PRIVATE, _TYPE = 0x01, 0x10, 0x0E

pytestmark = [
    pytest.mark.cross,
    pytest.mark.skipif(importlib.util.find_spec("ziglang") is None, reason="zig is missing: pip install 'cfmoe[cross]'"),
]


def members(archive: Path) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the object files of a BSD archive."""
    data = archive.read_bytes()
    assert data.startswith(b"!<arch>\n")
    at = 8
    while at < len(data):
        header = data[at : at + 60]
        name, size = header[:16].decode().strip(), int(header[48:58])
        body = data[at + 60 : at + 60 + size]
        if name.startswith("#1/"):
            length = int(name[3:])
            name, body = body[:length].rstrip(b"\0").decode(), body[length:]
        if not name.startswith("__.SYMDEF"):
            yield name, body
        at += 60 + size + size % 2


def read_object(data: bytes) -> tuple[int, int, set[str], set[str]]:
    """Platform, least version (as in LC_BUILD_VERSION), symbols that are defined for others, symbols that are wanted of others."""
    magic, cpu, _, kind, count = struct.unpack_from("<5I", data)
    assert (magic, cpu, kind) == (0xFEEDFACF, 0x0100000C, 1), "not a 64-bit ARM Mach-O object"
    platform = version = -1
    defined: set[str] = set()
    wanted: set[str] = set()
    at = 32
    for _ in range(count):
        command, size = struct.unpack_from("<2I", data, at)
        if command == _BUILD_VERSION:
            platform, version = struct.unpack_from("<2I", data, at + 8)
        if command == _SYMTAB:
            symbols, symbol_count, strings, _ = struct.unpack_from("<4I", data, at + 8)
            for i in range(symbol_count):
                name_at, flags = struct.unpack_from("<IB", data, symbols + 16 * i)
                if not flags & _EXTERNAL or flags & _PRIVATE:
                    continue
                name = data[strings + name_at : data.index(b"\0", strings + name_at)].decode()
                (defined if flags & _TYPE else wanted).add(name)
        at += size
    return platform, version, defined, wanted


@pytest.mark.parametrize("name", PLATFORMS)
def test_the_archive_is_for_its_platform_and_exports_the_c_api(name: str, demo_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CFMOE_NATIVE_CACHE", str(ROOT / "build" / "native"))
    preset = native.PRESETS[name]
    kernels = phone_kernels(Artifact.open(demo_artifact), preset.triple)
    archive = native.build(preset, [k.object_file for k in kernels], [k.prefix for k in kernels])
    exported: set[str] = set()
    wanted: set[str] = set()
    seen = 0
    for member, data in members(archive):
        platform, version, defined, undefined = read_object(data)
        assert (platform, version) == (PLATFORMS[name], 15 << 16), member
        exported |= defined
        wanted |= undefined
        seen += 1
    assert seen > 30
    header = (ROOT / "runtime_ext" / "include" / "cfmoe" / "cfmoe.h").read_text()
    api = {f"_{function}" for function in re.findall(r"\b(cfmoe_\w+)\(", header)}
    pattern = r"___tvm_ffi_(cfmoe_[0-9a-f]{16}_aarch64(?:_dotprod)?_)"
    kernel_names = {symbol for symbol in exported if re.match(pattern, symbol)}
    assert {match[1] for symbol in kernel_names if (match := re.match(pattern, symbol))} == {k.prefix for k in kernels}
    # Weak ones of the compiler's, by which kernels find the runtime where they are loaded.
    backend = {symbol for symbol in exported if "TVMBackend" in symbol or "tvm_ffi_library" in symbol}
    assert exported - kernel_names - backend == api
    # What it wants of others comes from iOS: the C library and the C++ standard library.
    assert not {symbol for symbol in wanted - exported if "tvm" in symbol.lower() or "cfmoe" in symbol}

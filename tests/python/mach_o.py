"""Reads what a linker reads of static libraries for Apple's platforms: the objects in an archive, their platform and their symbols."""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

_MAGIC, _ARM64, _OBJECT = 0xFEEDFACF, 0x0100000C, 1
_SEGMENT, _SYMTAB, _BUILD_VERSION = 0x19, 0x2, 0x32
_EXTERNAL, _PRIVATE, _TYPE, _WEAK = 0x01, 0x10, 0x0E, 0x80  # N_EXT, N_PEXT, N_TYPE; N_WEAK_DEF of n_desc


@dataclass
class Object:
    """An object file. `version`: the least one of the system, 16 bits for the major number. Symbols as they are written there, with an
    underscore before C's names."""

    name: str
    platform: int = -1
    version: int = -1
    exported: set[str] = field(default_factory=set)
    private: set[str] = field(default_factory=set)  # for the other objects of the same program alone
    weak: set[str] = field(default_factory=set)  # of the two above, those of which a linker takes any
    wanted: set[str] = field(default_factory=set)
    sections: set[str] = field(default_factory=set)


def objects(archive: Path) -> list[Object]:
    """The objects of a BSD archive. Fails where it has no table of contents, or one of them is none for 64-bit ARM."""
    assert archive.read_bytes()[68:].startswith(b"__.SYMDEF"), f"{archive} has no table of contents"
    return [read_object(name, body) for name, body in _members(archive.read_bytes())]


def write_small_archive(out: Path, target: str) -> Path:
    """An archive at `out` with one object of one function, for `target`."""
    out.parent.mkdir(parents=True, exist_ok=True)
    source, made = out.with_suffix(".c"), out.with_suffix(".o")
    source.write_text("int cfmoe_test(void) { return 1; }\n")
    for command in (["clang", f"--target={target}", "-c", str(source), "-o", str(made)], ["ar", "rcD", str(out), str(made)]):
        subprocess.run([sys.executable, "-m", "ziglang", *command], check=True, timeout=120)
    return out


def write_members(archive: Path, out: Path) -> list[Path]:
    """The objects of `archive` as files in the new directory `out`."""
    out.mkdir()
    written = []
    for number, (name, body) in enumerate(_members(archive.read_bytes())):
        written.append(out / f"{number:03}-{name}")
        written[-1].write_bytes(body)
    return written


def _members(data: bytes) -> Iterator[tuple[str, bytes]]:
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
            assert (at + 60 + size - len(body)) % 8 == 0, f"{name} is not where Apple's linker takes it"
            yield name, body
        at += 60 + size + size % 2


def read_object(name: str, data: bytes) -> Object:
    """The object file `data`, called `name`. Fails where it is none for 64-bit ARM."""
    magic, cpu, _, kind, count = struct.unpack_from("<5I", data)
    assert (magic, cpu, kind) == (_MAGIC, _ARM64, _OBJECT), f"{name} is no 64-bit ARM Mach-O object"
    read = Object(name)
    at = 32
    for _ in range(count):
        command, size = struct.unpack_from("<2I", data, at)
        if command == _BUILD_VERSION:
            read.platform, read.version = struct.unpack_from("<2I", data, at + 8)
        elif command == _SYMTAB:
            _read_symbols(read, data, *struct.unpack_from("<3I", data, at + 8))
        elif command == _SEGMENT:
            for i in range(struct.unpack_from("<I", data, at + 64)[0]):
                section, segment = struct.unpack_from("<16s16s", data, at + 72 + 80 * i)
                read.sections.add(f"{segment.rstrip(bytes(1)).decode()},{section.rstrip(bytes(1)).decode()}")
        at += size
    return read


def _read_symbols(read: Object, data: bytes, symbols: int, count: int, strings: int) -> None:
    for i in range(count):
        name_at, flags, _, description = struct.unpack_from("<IBBH", data, symbols + 16 * i)
        if not flags & _EXTERNAL:
            continue
        name = data[strings + name_at : data.index(b"\0", strings + name_at)].decode()
        if not flags & _TYPE:
            read.wanted.add(name)
            continue
        (read.private if flags & _PRIVATE else read.exported).add(name)
        if description & _WEAK:
            read.weak.add(name)

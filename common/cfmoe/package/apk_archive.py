"""The APK as a file: an archive whose stored entries can be mapped, and what Android asks of native programs in it."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterable
from pathlib import Path

from cfmoe.errors import CFMoEError, os_error

PAGE = 16384  # bytes: Android 15's largest page
_WORD = 4
_ALIGNMENT_FIELD = 0xD935  # Android's: the alignment, then padding; apksigner keeps what it says
_LOCAL_HEADER = 30
_EPOCH = (1981, 1, 1, 1, 1, 2)  # the same bytes whenever it is built
_STORED_FROM = 1 << 20  # bytes: larger assets are read in place, and would gain little
_CHUNK = 1 << 20
_LARGEST = (1 << 31) - 1  # bytes: Android reads an APK's offsets as signed 32-bit numbers
_MACHINES = {"arm64-v8a": 183, "x86_64": 62}  # e_machine
_LOAD = 1  # p_type of a segment that is mapped


def write_archive(base: Path, dex: Iterable[Path], native: dict[str, Path], assets: Path, out: Path) -> None:
    """Writes the unsigned APK: `base` as aapt2 linked it, the dex files, lib/NAME of `native`, and `assets` as assets/.

    Native programs are stored at multiples of 16 KiB, other stored entries at multiples of 4 bytes. Raises CFMoEError where the APK
    would be larger than Android takes, or a file cannot be read or written.
    """
    files = {f"lib/{name}": path for name, path in native.items()}
    files |= {f"assets/{path.relative_to(assets).as_posix()}": path for path in assets.rglob("*") if path.is_file()}
    total = sum(path.stat().st_size for path in files.values())
    if total > _LARGEST - (64 << 20):
        raise CFMoEError(
            f"the APK would have {total >> 20} MiB, more than the 2 GiB that Android takes; leave the model out and import it in the app"
        )
    try:
        with zipfile.ZipFile(out, "w") as archive, zipfile.ZipFile(base) as linked:
            for entry in sorted(linked.infolist(), key=lambda entry: entry.filename):
                _add(archive, entry.filename, linked.read(entry), entry.compress_type)
            for path in dex:
                _add(archive, path.name, path.read_bytes(), zipfile.ZIP_DEFLATED)
            for name in sorted(files):
                _add_file(archive, name, files[name])
    except OSError as error:
        raise os_error(error, error.filename or out, "write") from error


def check_native(abi: str, path: Path) -> None:
    """Raises CFMoEError unless `path` is a 64-bit ELF file for `abi` whose segments fit pages of 16 KiB."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise os_error(error, path, "read") from error
    if abi not in _MACHINES:
        raise CFMoEError(f"the ABI {abi} is unknown; choose from {', '.join(_MACHINES)}")
    if len(data) < 64 or data[:6] != b"\x7fELF\x02\x01":
        raise CFMoEError(f"{path} is no 64-bit ELF file; build it for {abi}")
    machine, offset = struct.unpack_from("<H", data, 18)[0], struct.unpack_from("<Q", data, 32)[0]
    if machine != _MACHINES[abi]:
        raise CFMoEError(f"{path} is for another CPU (ELF machine {machine}); build it for {abi}")
    size, count = struct.unpack_from("<HH", data, 54)
    if size != 56 or offset + count * size > len(data):
        raise CFMoEError(f"{path} is damaged: its program headers lie outside of it; build it again")
    for index in range(count):
        kind = struct.unpack_from("<I", data, offset + index * size)[0]
        alignment = struct.unpack_from("<Q", data, offset + index * size + 48)[0]
        if kind == _LOAD and alignment % PAGE:
            raise CFMoEError(f"{path} has a segment aligned to {alignment} bytes; link it with -Wl,-z,max-page-size={PAGE}")


def check_alignment(apk: Path) -> None:
    """Raises CFMoEError where a stored entry of the finished APK does not lie where `write_archive` puts it."""
    with zipfile.ZipFile(apk) as archive, open(apk, "rb") as raw:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                continue
            raw.seek(entry.header_offset)
            header = raw.read(_LOCAL_HEADER)
            name, extra = struct.unpack_from("<HH", header, 26)
            start = entry.header_offset + _LOCAL_HEADER + name + extra
            if start % _alignment(entry.filename):
                raise CFMoEError(f"{apk}: {entry.filename} lies at {start}, which is no multiple of {_alignment(entry.filename)}")


def _alignment(name: str) -> int:
    return PAGE if name.endswith(".so") else _WORD


def _entry(archive: zipfile.ZipFile, name: str, method: int) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, _EPOCH)
    entry.compress_type = method
    entry.create_system, entry.external_attr = 0, 0
    if method == zipfile.ZIP_STORED:
        alignment = _alignment(name)
        assert archive.fp is not None
        start = archive.fp.tell() + _LOCAL_HEADER + len(name.encode()) + 6
        padding = -start % alignment
        entry.extra = struct.pack("<HHH", _ALIGNMENT_FIELD, 2 + padding, alignment) + bytes(padding)
    return entry


def _add(archive: zipfile.ZipFile, name: str, data: bytes, method: int) -> None:
    archive.writestr(_entry(archive, name, method), data, method, 9)


def _add_file(archive: zipfile.ZipFile, name: str, path: Path) -> None:
    size = path.stat().st_size
    stored = name.startswith("lib/") or size >= _STORED_FROM
    entry = _entry(archive, name, zipfile.ZIP_STORED if stored else zipfile.ZIP_DEFLATED)
    entry.file_size = size
    with open(path, "rb") as source, archive.open(entry, "w") as target:
        while chunk := source.read(_CHUNK):
            target.write(chunk)

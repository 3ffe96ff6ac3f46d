"""Archives of an artifact as the usual packers write them, and ones that an app must refuse: input of the phone apps' import tests."""

from __future__ import annotations

import gzip
import io
import json
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def write_archives(artifact: Path, out: Path) -> list[Path]:
    """Writes good-* and bad-* (zip, tar, tar.gz) into `out`; returns them."""
    out.mkdir(parents=True, exist_ok=True)
    files = {path.relative_to(artifact).as_posix(): path.read_bytes() for path in sorted(artifact.rglob("*")) if path.is_file()}
    for name, compression in (("deflated", zipfile.ZIP_DEFLATED), ("stored", zipfile.ZIP_STORED)):
        _zip(out / f"good-{name}.zip", files.items(), compression)
    _zip(out / "good-zip64.zip", files.items(), zipfile.ZIP_STORED, force_zip64=True)
    folder = {f"folder/of/{path}": data for path, data in files.items()}
    _zip(out / "good-folder.zip", (("__MACOSX/._manifest.json", b"x" * 10), *folder.items()), zipfile.ZIP_DEFLATED)
    _zip64_throughout(out / "good-zip64-fields.zip", files)
    for name, form in (("ustar", tarfile.USTAR_FORMAT), ("gnu", tarfile.GNU_FORMAT), ("pax", tarfile.PAX_FORMAT)):
        _tar(out / f"good-{name}.tar", files, form, prefix="./")
        long = f"{'long' * 30}/" if name != "ustar" else "model/"
        _tar(out / f"good-{name}-folder.tar", files, form, prefix=long)
    tar = (out / "good-gnu-folder.tar").read_bytes()
    (out / "good-gzip.tar.gz").write_bytes(gzip.compress(tar))
    (out / "good-gzip-members.tgz").write_bytes(gzip.compress(tar[:1_000_000]) + gzip.compress(tar[1_000_000:]))
    _write_bad(files, out)
    return sorted(out.iterdir())


def _write_bad(files: dict[str, bytes], out: Path) -> None:
    manifest = json.loads(files["manifest.json"])

    def with_manifest(change: Callable[[dict[str, Any]], object]) -> dict[str, bytes]:
        changed = json.loads(json.dumps(manifest))
        change(changed)
        return {**files, "manifest.json": json.dumps(changed).encode()}

    entry = {"size": 4, "sha256": "0" * 64, "xxh3_64": "0" * 16}
    escape = with_manifest(lambda m: m["files"].update({"../../escape": entry}))
    _zip(out / "bad-escape.zip", {**escape, "../../escape": b"evil"}.items(), zipfile.ZIP_STORED)
    _tar(out / "bad-escape.tar", {**escape, "../../escape": b"evil"}, tarfile.PAX_FORMAT)
    _tar(
        out / "bad-absolute.tar",
        {**with_manifest(lambda m: m["files"].update({"/tmp/escape": entry})), "/tmp/escape": b"evil"},
        tarfile.GNU_FORMAT,
    )
    damaged = {**files, "weights.bin": files["weights.bin"][:-1] + bytes([files["weights.bin"][-1] ^ 1])}
    _zip(out / "bad-damaged.zip", damaged.items(), zipfile.ZIP_DEFLATED)
    _tar(out / "bad-damaged.tar", damaged, tarfile.USTAR_FORMAT)
    _zip(out / "bad-lacking.zip", ((path, data) for path, data in files.items() if path != "experts.bin"), zipfile.ZIP_STORED)
    _zip(out / "bad-method.zip", files.items(), zipfile.ZIP_BZIP2)
    _zip(out / "bad-no-manifest.zip", [("notes.txt", b"hello")], zipfile.ZIP_STORED)
    _linked(out / "bad-link.tar", files)
    whole = (out / "good-deflated.zip").read_bytes()
    (out / "bad-cut.zip").write_bytes(whole[: len(whole) // 2])
    _patch_members(out / "bad-encrypted.zip", whole, flags=1)
    _patch_members(out / "bad-bomb.zip", _bomb(files), size=files["weights.bin"])
    (out / "bad-gzip.tar.gz").write_bytes(b"\x1f\x8b\x08\x00" + bytes(600))
    packed = (out / "good-gzip.tar.gz").read_bytes()
    (out / "bad-gzip-cut.tar.gz").write_bytes(packed[: len(packed) // 2])
    (out / "bad-gzip-text.gz").write_bytes(gzip.compress(b"no archive " * 1000))


def _zip(path: Path, files: Any, compression: int, force_zip64: bool = False) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in files:
            with archive.open(zipfile.ZipInfo(name), "w", force_zip64=force_zip64) if force_zip64 else _member(archive, name) as member:
                member.write(data)


def _member(archive: zipfile.ZipFile, name: str) -> Any:
    info = zipfile.ZipInfo(name)
    info.compress_type = archive.compression
    return archive.open(info, "w")


def _tar(path: Path, files: dict[str, bytes], form: int, prefix: str = "") -> None:
    with tarfile.open(path, "w", format=form) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(prefix + name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def _linked(path: Path, files: dict[str, bytes]) -> None:
    """The weights are a symbolic link to a file of the system."""
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            if name == "weights.bin":
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
                archive.addfile(info)
                continue
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def _bomb(files: dict[str, bytes]) -> bytes:
    """The weights' member inflates to far more than their size."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, bytes(64 << 20) if name == "weights.bin" else data)
    return buffer.getvalue()


def _central_rows(data: bytes) -> Iterator[int]:
    """Where the rows of a zip's central directory begin."""
    end = data.rindex(b"PK\x05\x06")
    count, offset = struct.unpack_from("<H", data, end + 10)[0], struct.unpack_from("<I", data, end + 16)[0]
    for _ in range(count):
        yield offset
        offset += 46 + sum(struct.unpack_from("<HHH", data, offset + 28))


def _patch_members(path: Path, data: bytes, flags: int = 0, size: bytes | None = None) -> None:
    """Sets general-purpose flags in every row of the directory, or the size of weights.bin to that of `size`."""
    out = bytearray(data)
    for row in _central_rows(data):
        struct.pack_into("<H", out, row + 8, struct.unpack_from("<H", data, row + 8)[0] | flags)
        name = data[row + 46 : row + 46 + struct.unpack_from("<H", data, row + 28)[0]]
        if size is not None and name == b"weights.bin":
            struct.pack_into("<I", out, row + 24, len(size))
    path.write_bytes(out)


def _zip64_throughout(path: Path, files: dict[str, bytes]) -> None:
    """A zip whose directory has all sizes and offsets in zip64 fields, as one of more than 4 GiB has."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    whole = buffer.getvalue()
    rows = list(_central_rows(whole))
    begin = rows[0]
    out = bytearray(whole[:begin])
    directory = bytearray()
    for row in rows:
        name_size = struct.unpack_from("<H", whole, row + 28)[0]
        packed, size = struct.unpack_from("<II", whole, row + 20)
        header = struct.unpack_from("<I", whole, row + 42)[0]
        fixed = bytearray(whole[row : row + 46])
        struct.pack_into("<II", fixed, 20, 0xFFFFFFFF, 0xFFFFFFFF)
        struct.pack_into("<HHH", fixed, 28, name_size, 28, 0)
        struct.pack_into("<I", fixed, 42, 0xFFFFFFFF)
        directory += fixed + whole[row + 46 : row + 46 + name_size] + struct.pack("<HHQQQ", 1, 24, size, packed, header)
    record = struct.pack("<IQHHIIQQQQ", 0x06064B50, 44, 45, 45, 0, 0, len(rows), len(rows), len(directory), begin)
    locator = struct.pack("<IIQI", 0x07064B50, 0, begin + len(directory), 1)
    end = struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    path.write_bytes(bytes(out + directory) + record + locator + end)

"""Reads the text of a data file: plain text or JSON lines, either of them also compressed with xz."""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from cfmoe.errors import CFMoEError, os_error

SEPARATOR = "\n\n"  # between the documents of a .jsonl file
_PIECE = 1 << 20


def decode_utf8(data: bytes, where: Path | str) -> str:
    """`data` as text; CFMoEError names the offset of the first byte that is not UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CFMoEError(f"{where} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}; convert it to UTF-8") from error


def read_text(path: Path, max_bytes: int | None = None) -> str:
    """The text of `path`: .txt as it is; .jsonl the `text` field of each line, joined by an empty line; .xz of either.

    At most the first `max_bytes` bytes of that text in UTF-8; a character that does not fit whole is left out.
    """
    kind = Path(path.stem).suffix if path.suffix == ".xz" else path.suffix
    if kind not in (".txt", ".jsonl"):
        raise CFMoEError(f"{path} is neither .txt, .jsonl nor .xz of one of them; rename or convert it")
    try:
        with lzma.open(path) if path.suffix == ".xz" else open(path, "rb") as file:
            data = _read_documents(file, path, max_bytes) if kind == ".jsonl" else _read_plain(file, max_bytes)
    except OSError as error:
        raise os_error(error, path, "read") from error
    except (lzma.LZMAError, EOFError) as error:
        raise CFMoEError(f"{path} is not a whole xz file: {error}; copy it again") from error
    if max_bytes is not None and len(data) > max_bytes:
        data = data[: _character_start(data, max_bytes)]
    return decode_utf8(data, path)


def _character_start(data: bytes, end: int) -> int:
    """`end`, or where the character that `end` would cut begins."""
    while end > 0 and data[end] & 0xC0 == 0x80:
        end -= 1
    return end


def _read_plain(file: BinaryIO | lzma.LZMAFile, max_bytes: int | None) -> bytes:
    return file.read() if max_bytes is None else file.read(max_bytes + 1)


def _read_documents(file: BinaryIO | lzma.LZMAFile, path: Path, max_bytes: int | None) -> bytes:
    data = bytearray()
    for text in _documents(file, path):
        if data:
            data += SEPARATOR.encode()
        data += text.encode("utf-8", "replace")  # JSON can spell lone surrogates, UTF-8 cannot
        if max_bytes is not None and len(data) > max_bytes:
            break
    return bytes(data)


def _documents(file: BinaryIO | lzma.LZMAFile, path: Path) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(decode_utf8(line, f"{path} line {number}"))
        except ValueError as error:
            raise CFMoEError(f"{path} line {number} is not JSON: {error}; mend the line") from error
        text = row.get("text") if isinstance(row, dict) else None
        if not isinstance(text, str):
            raise CFMoEError(f'{path} line {number} has no field "text" that is a text; mend the line')
        yield text

"""The two digests of the format: SHA-256 for people, XXH3-64 for the engine, both computed while bytes go by."""

from __future__ import annotations

import hashlib
import importlib.util
from typing import TYPE_CHECKING

from cfmoe.errors import CFMoEError

if TYPE_CHECKING:
    import xxhash

Bytes = bytes | memoryview


def have_xxhash() -> bool:
    """Whether XXH3 can be computed here: the base install has no xxhash, since the engine brings its own."""
    return importlib.util.find_spec("xxhash") is not None


def xxh3_64(data: Bytes) -> str:
    """XXH3-64 of `data`, seed 0, as 16 lower-case hexadecimal digits. Needs xxhash."""
    return _xxh3(data).hexdigest()


def _xxh3(data: Bytes = b"") -> xxhash.xxh3_64:
    try:
        import xxhash
    except ImportError as error:
        raise CFMoEError("the package xxhash is missing; install cfmoe[compile]") from error
    return xxhash.xxh3_64(data)


class StreamDigest:
    """Size and both digests of a stream of bytes."""

    def __init__(self) -> None:
        self.size = 0
        self._sha256 = hashlib.sha256()
        self._xxh3 = _xxh3()

    def update(self, data: Bytes) -> None:
        self.size += len(data)
        self._sha256.update(data)
        self._xxh3.update(data)

    def entry(self) -> dict[str, int | str]:
        """The file's row in the manifest's table."""
        return {"size": self.size, "sha256": self._sha256.hexdigest(), "xxh3_64": self._xxh3.hexdigest()}

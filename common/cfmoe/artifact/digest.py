"""The two digests of the format: SHA-256 for people, XXH3-64 for the engine, both computed while bytes go by."""

from __future__ import annotations

import hashlib

import xxhash

Bytes = bytes | memoryview


def xxh3_64(data: Bytes) -> str:
    """XXH3-64 of `data`, seed 0, as 16 lower-case hexadecimal digits."""
    return xxhash.xxh3_64_hexdigest(data)


class StreamDigest:
    """Size and both digests of a stream of bytes."""

    def __init__(self) -> None:
        self.size = 0
        self._sha256 = hashlib.sha256()
        self._xxh3 = xxhash.xxh3_64()

    def update(self, data: Bytes) -> None:
        self.size += len(data)
        self._sha256.update(data)
        self._xxh3.update(data)

    def entry(self) -> dict[str, int | str]:
        """The file's row in the manifest's table."""
        return {"size": self.size, "sha256": self._sha256.hexdigest(), "xxh3_64": self._xxh3.hexdigest()}

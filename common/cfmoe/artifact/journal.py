"""What a conversion that was interrupted had done: the digests of the expert records that it wrote, in order."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from cfmoe.artifact.digest import xxh3_64
from cfmoe.errors import os_error

_NAME = "records.journal"


class Journal:
    """A text file in the staging directory: first what is converted, then a line per record once it is written.

    A line says only what was asked of the system: after a power failure records may be missing or torn, so each is read back and compared.
    """

    def __init__(self, staging: Path, records: Path, fingerprint: str, shown: Path) -> None:
        """Takes up what `staging` holds of a conversion with the same `fingerprint`; clears it otherwise. Errors name `shown`."""
        self._path, self._records, self._shown = staging / _NAME, records, shown
        try:
            lines = self._path.read_text("ascii", "replace").split("\n") if self._path.exists() else []
            # The last element follows the last line break: a line that was cut short, or nothing.
            self._digests = lines[1:-1] if lines[:1] == [fingerprint] and records.exists() else []
            for path in staging.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif not self._digests or path not in (self._path, records):
                    path.unlink()
            if not self._digests:
                self._path.write_text(f"{fingerprint}\n")
        except OSError as error:
            raise os_error(error, shown, "write") from error
        self._fingerprint = fingerprint

    def restore(self, record_bytes: int, stride: int, take: Callable[[str, bytes], None]) -> None:
        """Hands `take` the digest and the padded bytes of each record that is whole, in order, and cuts both files behind the last."""
        kept: list[str] = []
        try:
            if self._digests:
                for digest, data in zip(self._digests, self._read(stride), strict=False):
                    if len(data) < stride or xxh3_64(memoryview(data)[:record_bytes]) != digest or any(data[record_bytes:]):
                        break
                    take(digest, data)
                    kept.append(digest)
                os.truncate(self._records, len(kept) * stride)
                self._path.write_text("\n".join([self._fingerprint, *kept]) + "\n")
            self._file = open(self._path, "a")  # noqa: SIM115 (ended by close)
        except OSError as error:
            raise os_error(error, self._shown, "write") from error

    def _read(self, stride: int) -> Iterator[bytes]:
        with open(self._records, "rb") as file:
            while data := file.read(stride):
                yield data

    def note(self, digest: str) -> None:
        """The next record is written."""
        try:
            self._file.write(f"{digest}\n")
            self._file.flush()
        except OSError as error:
            raise os_error(error, self._shown, "write") from error

    def remove(self) -> None:
        """The artifact is complete."""
        self._file.close()
        self._path.unlink()

"""Plain read bandwidth of memory and of storage, in bytes per second: what decode is bounded by."""

from __future__ import annotations

import mmap
import os
import random
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cfmoe.errors import os_error

MEMORY_BYTES = 512 << 20  # per measurement: far beyond any cache
STORAGE_BYTES = 256 << 20
READ_BYTES = 4 << 20  # per read: the size of a large expert record
_ALIGNMENT = 16384


@dataclass(frozen=True)
class StorageBandwidth:
    """`sequential` and `random` in bytes per second at queue depth 1; `direct` says whether the page cache was bypassed."""

    sequential: float
    random: float
    direct: bool


def memory_bandwidth(threads: int, repeat: int = 5) -> float:
    """Best of `repeat` sweeps in which `threads` threads read 512 MiB between them; bytes per second."""
    parts = np.array_split(np.zeros(MEMORY_BYTES // 8, np.int64), threads)
    for part in parts:
        part += 1  # touches every page, which zeros does not
    best = 0.0
    for _ in range(repeat):
        workers = [threading.Thread(target=np.bitwise_or.reduce, args=(part,)) for part in parts]
        start = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        best = max(best, MEMORY_BYTES / (time.perf_counter() - start))
    return best


def storage_bandwidth(directory: Path) -> StorageBandwidth:
    """Writes a temporary file of 256 MiB into `directory` and reads it in pieces of 4 MiB, in order and shuffled.

    Past the page cache (O_DIRECT) where the file system allows it. Raises CFMoEError where the file cannot be written.
    """
    path = directory / f".cfmoe-doctor-{os.getpid()}"
    try:
        try:
            _write(path)
            return _read(path)
        finally:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise os_error(error, path, "measure the storage with") from error


def _write(path: Path) -> None:
    piece = random.Random(0).randbytes(READ_BYTES)
    with open(path, "xb", buffering=0) as file:
        for _ in range(STORAGE_BYTES // READ_BYTES):
            file.write(piece)
        os.fsync(file.fileno())


def _read(path: Path) -> StorageBandwidth:
    direct = hasattr(os, "O_DIRECT")
    try:
        descriptor = os.open(path, os.O_RDONLY | (os.O_DIRECT if direct else 0))
    except OSError:
        direct = False  # tmpfs and some overlays refuse O_DIRECT
        descriptor = os.open(path, os.O_RDONLY)
    try:
        if not direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        offsets = list(range(0, STORAGE_BYTES, READ_BYTES))
        sequential = _timed_reads(descriptor, offsets)
        random.Random(1).shuffle(offsets)
        return StorageBandwidth(sequential, _timed_reads(descriptor, offsets), direct)
    finally:
        os.close(descriptor)


def _timed_reads(descriptor: int, offsets: list[int]) -> float:
    with mmap.mmap(-1, READ_BYTES + _ALIGNMENT) as buffer:  # anonymous maps start at a page, which O_DIRECT wants
        view = memoryview(buffer)[:READ_BYTES]
        start = time.perf_counter()
        done = sum(os.preadv(descriptor, [view], offset) for offset in offsets)
        seconds = time.perf_counter() - start
        view.release()
    return done / seconds

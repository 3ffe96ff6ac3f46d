"""Read speeds of memory and of storage: what decode is bounded by."""

from __future__ import annotations

import mmap
import os
import random
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cfmoe.errors import os_error

MEMORY_BYTES = 512 << 20  # per measurement: far beyond any cache
STORAGE_BYTES = 256 << 20
READ_SIZES = (64 << 10, 256 << 10, 1 << 20, 4 << 20)  # bytes of a read: expert records lie between
_ALIGNMENT = 16384
_READERS = 2  # the engine's I/O threads


@dataclass(frozen=True)
class StorageSpeed:
    """Reading n bytes takes `latency_s` + n / bandwidth, of one read at a time or of two; bytes per second.

    direct: the page cache was bypassed.
    """

    latency_s: float
    bytes_per_s: float
    bytes_per_s_2: float
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


def storage_speed(directory: Path) -> StorageSpeed:
    """Writes a temporary file of 256 MiB into `directory` and reads shuffled pieces of 64 KiB to 4 MiB of it.

    Past the page cache (O_DIRECT) where the file system allows it. Raises CFMoEError where the file cannot be written.
    """
    path = directory / f".cfmoe-doctor-{os.getpid()}"
    try:
        try:
            _write(path)
            return file_speed(path, READ_SIZES)
        finally:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise os_error(error, path, "measure the storage with") from error


def file_speed(path: Path, sizes: Sequence[int], repeat: int = 24) -> StorageSpeed:
    """Speed of reading `path` in pieces of `sizes` bytes, multiples of 16 KiB, at shuffled places; medians of `repeat` reads.

    One piece at a time and as many at once as two readers have in the engine: two, and four. Raises OSError.
    """
    with _uncached(path) as (descriptor, direct):
        times = {}
        with ThreadPoolExecutor(_READERS) as readers:
            for size in sizes:
                for count in (1, 2, 4):
                    times[count, size] = _read_time(readers, descriptor, path.stat().st_size, size, count, repeat)
        return StorageSpeed(*_fit(times), direct)


def streaming_speed(path: Path, size: int, total: int = 1 << 30) -> float:
    """Bytes per second of two readers that are never idle, over `total` bytes of `path` in shuffled pieces of `size`, a multiple of 16 KiB.

    It is what storage could give to an engine that always has the next read waiting. Raises OSError.
    """
    with _uncached(path) as (descriptor, _):
        pieces = max(1, path.stat().st_size // size)
        places = random.Random(size).choices(range(pieces), k=max(_READERS, total // size))

        def read(mine: Sequence[int]) -> None:
            with mmap.mmap(-1, size) as buffer:
                for place in mine:
                    os.preadv(descriptor, [buffer], place * size)

        with ThreadPoolExecutor(_READERS) as readers:
            start = time.perf_counter()
            list(readers.map(read, [places[first::_READERS] for first in range(_READERS)]))
            return len(places) * size / (time.perf_counter() - start)


@contextmanager
def _uncached(path: Path) -> Iterator[tuple[int, bool]]:
    """A descriptor of `path` and whether reads of it go past the page cache; where they cannot, what the cache has of it is dropped."""
    direct = hasattr(os, "O_DIRECT")
    try:
        descriptor = os.open(path, os.O_RDONLY | (os.O_DIRECT if direct else 0))
    except OSError:
        direct = False  # tmpfs and some overlays refuse O_DIRECT
        descriptor = os.open(path, os.O_RDONLY)
    try:
        if not direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        yield descriptor, direct
    finally:
        os.close(descriptor)


def _fit(times: dict[tuple[int, int], float]) -> tuple[float, float, float]:
    """Latency and the two bandwidths that explain the times of (reads at once, bytes of each), by least squares of relative errors."""
    rows = [[1.0, size if count == 1 else 0.0, count * size if count > 1 else 0.0] for count, size in times]
    seconds = np.array(list(times.values()))
    solution, *_ = np.linalg.lstsq(np.array(rows) / seconds[:, None], np.ones(len(rows)), rcond=None)
    if solution[0] < 0:  # a storage so even that the noise is larger than its latency
        solution[1:], *_ = np.linalg.lstsq(np.array(rows)[:, 1:] / seconds[:, None], np.ones(len(rows)), rcond=None)
    latency, one, two = (max(float(value), 0.0) for value in solution)
    return latency, 1 / max(one, 1e-15), 1 / max(two, 1e-15)


def _write(path: Path) -> None:
    piece = random.Random(0).randbytes(1 << 20)
    with open(path, "xb", buffering=0) as file:
        for _ in range(STORAGE_BYTES // len(piece)):
            file.write(piece)
        os.fsync(file.fileno())


def _read_time(readers: ThreadPoolExecutor, descriptor: int, file_bytes: int, size: int, count: int, repeat: int) -> float:
    """Median seconds until `count` reads of `size` bytes that were asked for at once have ended."""
    places = random.Random(size)
    last = max(0, (file_bytes - size) // _ALIGNMENT)
    buffers = [mmap.mmap(-1, size) for _ in range(count)]  # page-aligned, as O_DIRECT wants it
    try:
        seconds = []
        for _ in range(repeat):
            offsets = [places.randint(0, last) * _ALIGNMENT for _ in range(count)]
            start = time.perf_counter()
            reads = [readers.submit(os.preadv, descriptor, [buffer], offset) for buffer, offset in zip(buffers, offsets, strict=True)]
            for read in reads:
                read.result()
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds)
    finally:
        for buffer in buffers:
            buffer.close()

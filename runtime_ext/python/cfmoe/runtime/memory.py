"""Resident memory of this process: how far it grew, at its peak, since a moment chosen by the caller."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_SAMPLE_SECONDS = 0.005


def resident_bytes() -> int:
    """Resident memory now. Raises OSError where the system does not tell."""
    return _status_bytes("VmRSS")


def peak_resident_bytes() -> int:
    """Largest resident memory since the process began, or since it was last reset. Raises OSError where the system does not tell."""
    return _status_bytes("VmHWM")


def _status_bytes(key: str) -> int:
    if sys.platform != "linux":
        raise OSError(f"{sys.platform} has no {_STATUS}")
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    raise OSError(f"{_STATUS} has no {key}")


class PeakGrowth:
    """Measures the growth of resident memory from entering on.

    Exact where the system lets a process reset its own peak, or once the peak rises; sampled every 5 ms otherwise.
    """

    def __init__(self) -> None:
        self.exact = False
        self._baseline = 0
        self._peak = 0
        self._first_peak = 0
        self._stop = threading.Event()
        self._sampler: threading.Thread | None = None

    def __enter__(self) -> Self:
        self.exact = _reset_peak()
        self._baseline = self._peak = resident_bytes()
        self._first_peak = peak_resident_bytes()
        if not self.exact:
            self._sampler = threading.Thread(target=self._sample, name="cfmoe-memory", daemon=True)
            self._sampler.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._update()
        if self._sampler is not None:
            self._stop.set()
            self._sampler.join()

    @property
    def bytes(self) -> int:
        """Growth so far, at its peak; 0 if memory never grew."""
        self._update()
        return self._peak - self._baseline

    def _update(self) -> None:
        peak = peak_resident_bytes()
        # A peak from before says nothing, unless it was passed.
        if self.exact or peak > self._first_peak:
            self._peak = max(self._peak, peak)
        self._peak = max(self._peak, resident_bytes())

    def _sample(self) -> None:
        while not self._stop.wait(_SAMPLE_SECONDS):
            self._peak = max(self._peak, resident_bytes())


def _reset_peak() -> bool:
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:  # no such file, or not permitted: sampling takes its place
        return False
    return True

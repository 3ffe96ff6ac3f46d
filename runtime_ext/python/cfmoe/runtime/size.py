"""Sizes as people write them: bytes, binary and decimal units, and shares of the experts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from cfmoe.runtime.errors import CFMoEError

_UNITS = {
    "": 1,
    "b": 1,
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
    "tib": 1 << 40,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "k": 1 << 10,
    "m": 1 << 20,
    "g": 1 << 30,
    "t": 1 << 40,
}
_PATTERN = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([A-Za-z]*)", re.ASCII)
_LARGEST = (1 << 63) - 1


@dataclass(frozen=True)
class Budget:
    """A memory budget: so many bytes for everything, or the fixed parts and a share of the experts. Both 0: all experts."""

    bytes: int = 0
    percent: float = 0.0


def parse_size(text: str | int) -> int:
    """Bytes of ``800MiB``, ``1.5 GB``, ``4096``; units without an ``i`` and with a ``b`` are decimal. Raises CFMoEError."""
    if isinstance(text, int):
        value = text
    else:
        match = _PATTERN.fullmatch(text.strip())
        factor = _UNITS.get(match[2].lower()) if match else None
        if match is None or factor is None:
            raise CFMoEError(f"{text!r} is no size: write bytes or a number with a unit, for instance 800MiB or 1.5GiB")
        number = match[1]
        # Exact: the binary fraction nearest to a decimal one may lie below it.
        value = int(Fraction(number if number[-1] != "." else number[:-1]) * factor)
    if not 0 < value <= _LARGEST:
        raise CFMoEError(f"{text!r} is no usable size: use at least one byte and less than 8 EiB")
    return value


def parse_budget(text: str | int | None) -> Budget:
    """A budget of ``800MiB``, ``50%`` (of the experts), bytes, or None (all experts as far as memory goes). Raises CFMoEError."""
    if text is None:
        return Budget()
    if isinstance(text, str) and text.strip().endswith("%"):
        number = text.strip()[:-1].strip()
        if not re.fullmatch(r"[0-9]+(\.[0-9]*)?|\.[0-9]+", number, re.ASCII) or not 0 < float(number) <= 100:
            raise CFMoEError(f"{text!r} is no share of the experts: use more than 0% and at most 100%, for instance 50%")
        return Budget(percent=float(number))
    return Budget(bytes=parse_size(text))


def format_size(size: int) -> str:
    """``size`` bytes with a binary unit and two decimals: ``12.50 MiB``; below 1 KiB plain bytes."""
    if size < 1024:
        return f"{size} B"
    value = float(size)
    for unit in ("KiB", "MiB", "GiB"):
        value /= 1024
        if value < 1023.995:
            return f"{value:.2f} {unit}"
    return f"{value / 1024:.2f} TiB"

"""The GPUs that the runtime can use, as their drivers describe them."""

from __future__ import annotations

import ctypes
import json
from dataclasses import dataclass

from cfmoe.runtime import _capi

_FIRST_CAPACITY = 65536


@dataclass(frozen=True)
class Device:
    """One device; CFMOE_VULKAN_DEVICE or CFMOE_OPENCL_DEVICE select it by ``index``.

    ``type`` is discrete, integrated, cpu or other; ``features`` are in the names of an artifact's targets. ``unified``: the CPU reaches
    all its memory, so phases can be split between both.
    """

    index: int
    name: str
    type: str
    driver: str
    features: tuple[str, ...]
    unified: bool
    memory_bytes: int


def devices(kind: str) -> list[Device]:
    """All devices of a kind, ``vulkan`` or ``opencl``. Raises CFMoEError where no driver is installed."""
    lib = _capi.library()
    error = _capi.ErrorText()
    capacity = _FIRST_CAPACITY
    while True:
        out = ctypes.create_string_buffer(capacity)
        size = ctypes.c_size_t()
        error.check(lib.cfmoe_devices(kind.encode(), out, capacity, ctypes.byref(size), *error.arguments))
        if size.value < capacity:
            break
        capacity = size.value + 1
    return [Device(**{**entry, "features": tuple(entry["features"])}) for entry in json.loads(out.value)]

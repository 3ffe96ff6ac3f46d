"""Device profiles: the speeds that bound decoding, of phones from published figures and of this machine by measurement."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

from cfmoe.errors import CFMoEError, os_error
from cfmoe.measure.bandwidth import StorageSpeed


@dataclass(frozen=True)
class DeviceProfile:
    """Speeds in bytes per second and times in seconds; `source` says where they come from.

    Reading m expert records of b bytes at once takes `storage_latency_s` + m·b / bandwidth, with the bandwidth of one read at a time for
    m = 1 and that of two at a time beyond; each record costs the processor `miss_overhead_s`. A kernel reads weights at `kernel_efficiency`
    of the memory's bandwidth, and every layer costs `layer_overhead_s` beside.
    """

    name: str
    source: str
    memory_bytes_per_s: float
    kernel_efficiency: float
    layer_overhead_s: float
    miss_overhead_s: float
    storage_latency_s: float
    storage_bytes_per_s: float  # one read at a time
    storage_bytes_per_s_2: float  # two reads at a time

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in ("name", "source"):
                if not isinstance(value, str) or not value:
                    raise CFMoEError(f'device profile: "{field.name}" is {value!r}, not a text; give one')
            elif not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value < 0:
                raise CFMoEError(f'device profile: "{field.name}" is {value!r}, not a positive number; give one')
            elif value == 0 and not field.name.endswith(("latency_s", "overhead_s")):
                raise CFMoEError(f'device profile: "{field.name}" is 0; give the speed that was measured')

    def read_seconds(self, records: int, record_bytes: int) -> float:
        """Time until all of `records` records that are asked for at once have arrived."""
        if records == 0:
            return 0.0
        bandwidth = self.storage_bytes_per_s if records == 1 else self.storage_bytes_per_s_2
        return self.storage_latency_s + records * record_bytes / bandwidth

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


# What the expert kernels reach of plain reading (docs/performance.md), what a layer of small kernels costs beside, and what a missing
# expert costs in waking threads; of this machine's order, for devices that nobody calibrated.
KERNEL_EFFICIENCY, _LAYER_OVERHEAD_S, _MISS_OVERHEAD_S = 0.85, 20e-6, 30e-6


def measured_profile(cpu: dict[str, Any], memory_bytes_per_s: float, storage: StorageSpeed) -> DeviceProfile:
    """The profile of this machine; `cpu` as cfmoe.measure.machine describes it."""
    source = "measured past the page cache" if storage.direct else "measured through the page cache, which flatters the storage"
    return DeviceProfile(
        f"{cpu['name']}, {cpu['usable_cpus']} CPUs",
        source,
        memory_bytes_per_s,
        KERNEL_EFFICIENCY,
        _LAYER_OVERHEAD_S,
        _MISS_OVERHEAD_S,
        storage.latency_s,
        storage.bytes_per_s,
        storage.bytes_per_s_2,
    )


def known_devices() -> list[DeviceProfile]:
    """The table that comes with CFMoE."""
    text = resources.files("cfmoe.planner").joinpath("devices.json").read_text("utf-8")
    return [DeviceProfile(**row) for row in json.loads(text)]


def find_device(name_or_file: str) -> DeviceProfile:
    """A device of the table by name, or a file that `cfmoe doctor --measure --out` or a person wrote.

    Raises CFMoEError listing the names where it is neither.
    """
    known = {device.name: device for device in known_devices()}
    if name_or_file in known:
        return known[name_or_file]
    path = Path(name_or_file)
    if not path.exists():
        raise CFMoEError(f"--device-profile {name_or_file} is neither a file nor one of: {', '.join(known)}")
    try:
        row = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise os_error(error, path, "read") from error
    except ValueError as error:
        raise CFMoEError(f"{path} is not JSON: {error}; write it with cfmoe doctor --measure --out {path}") from error
    names = {field.name for field in fields(DeviceProfile)}
    if not isinstance(row, dict) or set(row) != names:
        given = set(row) if isinstance(row, dict) else set()
        wrong = sorted(names ^ given)
        raise CFMoEError(f"{path} is no device profile: {', '.join(wrong)} missing or unknown; see cfmoe doctor --measure --out")
    try:
        return DeviceProfile(**row)
    except CFMoEError as error:
        raise CFMoEError(f"{path}: {error}") from error

"""What this machine is: CPU and its features, memory, tools, packages, drivers. Reads files and asks tools for their version only."""

from __future__ import annotations

import ctypes.util
import dataclasses
import os
import platform
import re
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# The features that kernels are chosen by, as /proc/cpuinfo spells them.
_KERNEL_FEATURES = {
    *("sse4_1", "avx", "f16c", "fma", "avx2", "avx_vnni", "amx_int8"),
    *("avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("neon", "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2", "sme"),
}

_TOOLS = ("g++", "clang++", "cmake", "ninja", "clang-format", "glslangValidator", "spirv-opt", "adb", "java")

_PACKAGES = {
    "run": ("apache-tvm-ffi", "numpy", "tokenizers", "typer", "rich", "xxhash"),
    "compile": ("apache-tvm", "ml_dtypes", "safetensors"),
    "tune": ("torch", "transformers", "peft", "accelerate"),
    "report": ("matplotlib",),
    "chat": ("jinja2",),
}


def describe() -> dict[str, Any]:
    """Everything below in one object, ready for JSON."""
    packages = {name: _package(name) for names in _PACKAGES.values() for name in names}
    return {
        "os": _operating_system(),
        "cpu": cpu(),
        "memory": memory(),
        "python": platform.python_version(),
        "tools": {name: _tool(name) for name in _TOOLS},
        "packages": packages,
        "missing": {use: [name for name in names if packages[name] is None] for use, names in _PACKAGES.items()},
        "drivers": {"opencl": _opencl(), "vulkan": _vulkan()},
        "devices": {kind: _devices(kind) for kind in ("vulkan", "opencl")},
    }


def cpu() -> dict[str, Any]:
    """Name, architecture, cores and the features that kernels are chosen by."""
    fields = _cpuinfo()
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    return {
        "name": fields.get("model name", fields.get("Hardware", platform.processor() or "unknown")),
        "arch": platform.machine(),
        "physical_cores": physical_cores(),
        "usable_cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "features": sorted(_KERNEL_FEATURES & flags),
    }


def physical_cores() -> int:
    """Cores, hardware threads of one core counted once."""
    cores = set()
    for path in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/topology/thread_siblings_list"):
        cores.add(_text(path))
    return len(cores) or os.cpu_count() or 1


def memory() -> dict[str, int | None]:
    """Bytes of memory in all, available now, and the limit of the control group (None: no limit)."""
    fields = dict(re.findall(r"^(\w+):\s+(\d+) kB", _text(Path("/proc/meminfo")), re.MULTILINE))
    limit = _text(Path("/sys/fs/cgroup/memory.max")).strip()
    return {
        "total_bytes": int(fields["MemTotal"]) * 1024 if "MemTotal" in fields else None,
        "available_bytes": int(fields["MemAvailable"]) * 1024 if "MemAvailable" in fields else None,
        "limit_bytes": int(limit) if limit.isdigit() else None,
    }


def _cpuinfo() -> dict[str, str]:
    fields: dict[str, str] = {}
    for line in _text(Path("/proc/cpuinfo")).splitlines():
        name, colon, value = line.partition(":")
        if colon:
            fields.setdefault(name.strip(), value.strip())
    return fields


def _operating_system() -> str:
    name = re.search(r'^PRETTY_NAME="?([^"\n]+)', _text(Path("/etc/os-release")), re.MULTILINE)
    return f"{name.group(1) if name else platform.system()}, {platform.system()} {platform.release()}"


def _tool(name: str) -> str | None:
    """The first line that has a number of what the tool says about its version; None if it is not on the path."""
    if shutil.which(name) is None:
        return None
    try:
        result = subprocess.run(
            [name, "--version"], stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"does not answer: {type(error).__name__}"
    lines = [line.strip() for line in (result.stdout + result.stderr).splitlines() if re.search(r"\d", line)]
    return lines[0] if lines else "unknown version"


def _package(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _opencl() -> dict[str, Any]:
    return {"library": ctypes.util.find_library("OpenCL"), "drivers": _names("/etc/OpenCL/vendors", "*.icd")}


def _vulkan() -> dict[str, Any]:
    drivers = _names("/usr/share/vulkan/icd.d", "*.json") + _names("/etc/vulkan/icd.d", "*.json")
    return {"library": ctypes.util.find_library("vulkan"), "drivers": drivers}


def _devices(kind: str) -> dict[str, Any]:
    """What the runtime finds, or why it finds nothing."""
    from cfmoe.runtime import CFMoEError, RuntimeFault, devices

    try:
        return {"found": [dataclasses.asdict(device) for device in devices(kind)], "reason": None}
    except (CFMoEError, RuntimeFault) as error:
        return {"found": [], "reason": str(error)}


def _names(directory: str, pattern: str) -> list[str]:
    return sorted(path.name for path in Path(directory).glob(pattern))


def _text(path: Path) -> str:
    """The file's text; empty where this system has no such file."""
    try:
        return path.read_text("utf-8", "replace")
    except OSError:
        return ""

"""Metal kernels on the CPU, for tests alone: the same interface as gpu_device.VulkanDevice.

kernels.metal is compiled as C++ (tests/metal_stubs/metal_stdlib); its kernels are called as runtime_ext/src/device/metal calls them:
buffers in order, then one block of scalars, each on 8 bytes.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from support import ROOT

_STUBS = ROOT / "tests" / "metal_stubs"
_KERNEL = re.compile(r"kernel void (\w+)\((.*?)\) \{", re.S)


class MetalBuffer:
    def __init__(self, array: np.ndarray) -> None:
        self.size = max(16, array.nbytes)
        self.memory = np.zeros(self.size + 64, np.uint8)
        start = -self.memory.ctypes.data % 64
        self.array = self.memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
        self.array[...] = array
        self.address = self.memory.ctypes.data + start


class MetalOnCpu:
    name = "Metal kernels on the CPU"

    def __init__(self) -> None:
        self.directory = tempfile.TemporaryDirectory(prefix="cfmoe-metal-")
        self.runner = self._path("workgroup.o")
        subprocess.run(["g++", "-std=c++20", "-O2", "-fPIC", "-c", str(_STUBS / "workgroup.cc"), "-o", str(self.runner)], check=True)
        self.libraries: dict[bytes, Any] = {}

    def _path(self, name: str) -> Path:
        return Path(self.directory.name) / name

    def upload(self, array: np.ndarray) -> MetalBuffer:
        return MetalBuffer(np.ascontiguousarray(array))

    def kernel(self, code: bytes, entry: str, buffers: int, scalars: int, local: Sequence[int]) -> MetalKernel:
        if code not in self.libraries:
            self.libraries[code] = self._build(code.decode())
        return MetalKernel(self.libraries[code], entry, buffers, scalars, local)

    def _build(self, text: str) -> Any:
        number = len(self.libraries)
        source, made, library = (self._path(f"kernels{number}{suffix}") for suffix in (".cc", ".o", ".so"))
        source.write_text(text + "\n" + "\n".join(_wrapper(match[1], match[2]) for match in _KERNEL.finditer(text)))
        flags = ["-x", "c++", "-std=c++20", "-O1", "-fPIC", "-ffp-contract=off", "-fno-exceptions", "-fno-rtti", "-nostdinc", "-nostdinc++"]
        compile_kernels = [sys.executable, "-m", "ziglang", "clang", *flags, "-mf16c", "-Wno-unknown-attributes", "-isystem", str(_STUBS)]
        result = subprocess.run([*compile_kernels, "-c", str(source), "-o", str(made)], capture_output=True, encoding="utf-8", check=False)
        assert result.returncode == 0, result.stderr[:4000]
        subprocess.run(["g++", "-shared", str(made), str(self.runner), "-o", str(library), "-lm"], check=True)
        return ctypes.CDLL(str(library))


def _wrapper(name: str, parameters: str) -> str:
    """A function of one signature for all kernels, which calls `name` with the types that it declares."""
    arguments = []
    for parameter in (part.strip() for part in parameters.split(",\n")):
        kind, rest = parameter.split(maxsplit=1)
        index = re.search(r"buffer\((\d+)\)", parameter)
        if kind == "device":
            assert index is not None
            arguments.append(f"({rest.split('*')[0]}*)buffers[{index[1]}]")
        elif kind == "constant":
            arguments.append(f"*(const {rest.split('&')[0]}*)block")
        else:
            place = "group" if "threadgroup_position_in_grid" in parameter else "thread_index"
            size = int(kind[4:] or 1)
            values = ", ".join(f"{place}[{i}]" for i in range(size))
            arguments.append(values if size == 1 else f"{kind}{{{values}}}")
    call = f"{name}({', '.join(arguments)});"
    return f'extern "C" void run_{name}(void** buffers, const int* block, const uint* group, const uint* thread_index) {{ {call} }}'


class MetalKernel:
    def __init__(self, library: Any, entry: str, buffers: int, scalars: int, local: Sequence[int]) -> None:
        self.body = ctypes.cast(getattr(library, f"run_{entry}"), ctypes.c_void_p)
        self.run, self.entry, self.buffers, self.scalars, self.local = library.cfmoe_run, entry, buffers, scalars, local

    def __call__(self, bindings: Sequence[tuple[MetalBuffer, int]], scalars: Sequence[int], grid: Sequence[int]) -> None:
        """Runs the kernel."""
        assert len(bindings) == self.buffers and len(scalars) == self.scalars
        addresses = (ctypes.c_void_p * (self.buffers + 1))(*(buffer.address + offset for buffer, offset in bindings))
        block = (ctypes.c_int32 * (2 * self.scalars + 2))(*(value for scalar in scalars for value in (scalar, 0)))
        three = ctypes.c_uint32 * 3
        assert self.run(self.body, addresses, block, three(*grid), three(*self.local)) == 0, f"{self.entry}: threads part at a barrier"

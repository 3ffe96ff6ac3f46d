"""Calls of compiled kernels on given buffers, run in this process or by a program for another machine."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tvm
import tvm_ffi

from cfmoe.compile.targets import CpuTarget
from support import ROOT
from test_kernels import aligned

_CODES = {"i": 0, "u": 1, "f": 2}  # DLPack's


class KernelScript:
    """Kernels are called in the order of `call`; every buffer's last contents are the result."""

    def __init__(self) -> None:
        self.buffers: list[np.ndarray] = []
        self._calls: list[tuple[str, list[tuple[bool, int]]]] = []

    def buffer(self, array: np.ndarray) -> int:
        """The number by which `call` knows it."""
        self.buffers.append(array)
        return len(self.buffers) - 1

    def call(self, kernel: str, buffers: Sequence[int], *numbers: int) -> None:
        self._calls.append((kernel, [*((True, b) for b in buffers), *((False, n) for n in numbers)]))

    def run(self, module: Any) -> list[np.ndarray]:
        """With a module of this machine's."""
        buffers = [aligned(buffer) for buffer in self.buffers]
        for kernel, arguments in self._calls:
            module[kernel](*(tvm_ffi.from_dlpack(buffers[value]) if is_buffer else value for is_buffer, value in arguments))
        return buffers

    def run_program(self, command: Sequence[str | Path], kernels: Sequence[str], directory: Path) -> list[np.ndarray]:
        """With the program that `build_host` has made for `kernels`, started by `command`."""
        words = [len(self.buffers)]
        parts = []
        for buffer in self.buffers:
            words += [_CODES[buffer.dtype.kind], buffer.dtype.itemsize * 8, buffer.ndim, *buffer.shape]
            parts.append(struct.pack(f"<{len(words)}q", *words) + buffer.tobytes())
            words = []
        words = [len(self._calls)]
        for kernel, arguments in self._calls:
            words += [kernels.index(kernel), len(arguments), *(word for argument in arguments for word in map(int, argument))]
        given, made = directory / "input", directory / "output"
        given.write_bytes(b"".join(parts) + struct.pack(f"<{len(words)}q", *words))
        subprocess.run([*command, given, made], check=True, timeout=300)
        data, results, at = made.read_bytes(), [], 0
        for buffer in self.buffers:
            results.append(np.frombuffer(data, buffer.dtype, buffer.size, at).reshape(buffer.shape))
            at += buffer.nbytes
        assert at == len(data)
        return results


def build_host(target: CpuTarget, functions: dict[str, Any], directory: Path) -> Path:
    """A static program for `target` that runs the scripts of `functions`."""
    directory.mkdir()
    module = tvm.compile(tvm.IRModule(functions), target=target.tvm_target())
    module.mod.write_to_file(str(directory / "kernels.o"), "o")
    (directory / "kernels.inc").write_text("".join(f"KERNEL({name})\n" for name in functions))
    program = directory / "kernel_host"
    includes = [f"-I{tvm_ffi.libinfo.find_include_path()}", f"-I{tvm_ffi.libinfo.find_dlpack_include_path()}"]
    sources = [ROOT / "tests" / "cpp" / "kernel_host.c", directory / "kernels.o"]
    define = f'-DKERNELS="{directory / "kernels.inc"}"'
    compiler = [sys.executable, "-m", "ziglang", "cc", "-target", f"{target.arch}-linux-musl", "-static", "-O2"]
    # The C library that zig builds once is kept where native builds keep it.
    cache = str(ROOT / "build" / "native" / "zig")
    environment = os.environ | {"ZIG_GLOBAL_CACHE_DIR": cache, "ZIG_LOCAL_CACHE_DIR": cache}
    subprocess.run([*compiler, define, *includes, *sources, "-o", program], check=True, env=environment, timeout=600)
    return program

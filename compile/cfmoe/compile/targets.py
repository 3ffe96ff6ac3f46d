"""CPU targets: what each is called, what it needs and how its kernels are built."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tvm
from tvm.target import Target

from cfmoe.compile.kernels.simd import Simd
from cfmoe.errors import CFMoEError


@dataclass(frozen=True)
class CpuTarget:
    """`features` are LLVM's names of what the CPU must have; the runtime checks them before it loads a kernel."""

    name: str
    arch: str
    mcpu: str
    attributes: tuple[str, ...]
    features: tuple[str, ...]
    simd: Simd

    def tvm_target(self, triple: str | None = None) -> Target:
        """`triple`, LLVM's name of a platform, is for others than Linux."""
        options: dict[str, object] = {"kind": "llvm", "mcpu": self.mcpu}
        if triple is not None or self.arch != host_arch():
            options["mtriple"] = triple or _TRIPLES[self.arch]
        if self.attributes:
            options["mattr"] = list(self.attributes)
        return Target(options)


# Kernels use no C library, so that one of them serves every Linux of an architecture, Android's among them.
_TRIPLES = {"x86_64": "x86_64-unknown-linux-gnu", "aarch64": "aarch64-unknown-linux-gnu"}
# Android 15 and later have pages of 16 KiB.
_LINK_OPTIONS = ("-Wl,-z,max-page-size=16384",)
_AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd", "avx512vnni")
CPU_TARGETS = (
    CpuTarget("x86_64-avx512vnni", "x86_64", "x86-64-v4", ("+avx512vnni",), _AVX512, Simd(16, "vnni")),
    CpuTarget("x86_64-avx2", "x86_64", "x86-64-v3", (), ("avx2", "fma", "f16c"), Simd(8, "madd")),
    CpuTarget("x86_64", "x86_64", "x86-64", (), (), Simd(4, "none", fused=False)),
    CpuTarget(
        "aarch64-i8mm", "aarch64", "generic", ("+neon", "+dotprod", "+i8mm"), ("neon", "dotprod", "i8mm"), Simd(4, "usdot", matrix=True)
    ),
    CpuTarget("aarch64-dotprod", "aarch64", "generic", ("+neon", "+dotprod"), ("neon", "dotprod"), Simd(4, "sdot")),
    CpuTarget("aarch64", "aarch64", "generic", ("+neon",), ("neon",), Simd(4, "none")),
)


def host_arch() -> str:
    return {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())


def host_features() -> set[str]:
    """LLVM's names of the features that this CPU has."""
    features = tvm.get_global_func("target.llvm_get_cpu_features")(Target({"kind": "llvm", "mcpu": host_cpu()}))
    return {str(name) for name in features}


def host_cpu() -> str:
    """LLVM's name of this CPU: the "native" that TVM itself would silently turn into a generic one."""
    return str(tvm.get_global_func("tvm.codegen.llvm.GetHostCPUName")())


def resolve(name: str) -> CpuTarget:
    """`llvm` is the best target that this machine runs; otherwise a target's own name. Raises CFMoEError for anything else."""
    by_name = {target.name: target for target in CPU_TARGETS}
    if name in by_name:
        return by_name[name]
    if name != "llvm":
        gpus = "vulkan, opencl and metal, each with -adreno, -mali or -desktop"
        raise CFMoEError(f"--target {name} is not available; available are llvm (this machine), {', '.join(by_name)}, and {gpus}")
    arch = host_arch()
    have = host_features()
    for target in CPU_TARGETS:
        if target.arch == arch and set(target.features) <= have:
            return target
    raise CFMoEError(f"--target llvm: no CPU target for this machine ({arch}); available are {', '.join(by_name)}")


def build(mod: tvm.IRModule, target: CpuTarget, out: Path) -> None:
    """Compiles the PrimFuncs of `mod` into the shared library `out`. Raises CFMoEError where no linker for the target is at hand."""
    with tvm.transform.PassContext(opt_level=3):
        module = tvm.compile(mod, target=target.tvm_target())
    if target.arch == host_arch():
        module.export_library(str(out), options=list(_LINK_OPTIONS) if sys.platform == "linux" else None)
        return
    command = _cross_linker(target.arch)

    def link(output: str, objects: Sequence[str] | str, *_args: object, **_kwargs: object) -> None:
        files = [objects] if isinstance(objects, str) else list(objects)
        done = subprocess.run([*command, "-shared", "-nostdlib", *_LINK_OPTIONS, "-o", output, *files], capture_output=True, text=True)
        if done.returncode != 0:
            raise CFMoEError(f"{command[0]} cannot link the kernels of {target.name}: {' '.join(done.stderr.split())}")

    module.export_library(str(out), fcompile=link)


def static_prefix(kernel_set: str, target: CpuTarget) -> str:
    """What precedes the names of the kernels of a target's `kernel_set` where they are linked into the engine itself."""
    return f"cfmoe_{kernel_set[:16]}_{target.name.replace('-', '_')}_"


def build_static(mod: tvm.IRModule, target: CpuTarget, kernel_set: str, out: Path, triple: str | None = None) -> None:
    """Compiles the PrimFuncs of `mod` into the object file `out`, which registers them in the program that links it.

    `kernel_set` is the target's own; `triple` is that of `CpuTarget.tvm_target`.
    """
    prefix = static_prefix(kernel_set, target)
    named = {prefix + var.name_hint: f.with_attr("global_symbol", prefix + var.name_hint) for var, f in mod.functions_items()}
    with tvm.transform.PassContext(opt_level=3):
        module = tvm.compile(tvm.IRModule(named, attrs={"system_lib_prefix": prefix}), target=target.tvm_target(triple))
    module.mod.write_to_file(str(out), "o")


def _cross_linker(arch: str) -> list[str]:
    gcc = f"{arch}-linux-gnu-gcc"
    if importlib.util.find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", "cc", "-target", f"{arch}-linux-musl"]
    if shutil.which(gcc):
        return [gcc]
    raise CFMoEError(f"no linker for {arch} is at hand: install cfmoe[cross], which brings zig, or {gcc}")

"""CPU targets: what each is called, what it needs and how its kernels are built."""

from __future__ import annotations

import platform
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

    def tvm_target(self) -> Target:
        options: dict[str, object] = {"kind": "llvm", "mcpu": self.mcpu}
        if self.attributes:
            options["mattr"] = list(self.attributes)
        return Target(options)


_AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd", "avx512vnni")
CPU_TARGETS = (
    CpuTarget("x86_64-avx512vnni", "x86_64", "x86-64-v4", ("+avx512vnni",), _AVX512, Simd(16, "vnni")),
    CpuTarget("x86_64-avx2", "x86_64", "x86-64-v3", (), ("avx2", "fma", "f16c"), Simd(8, "madd")),
    CpuTarget("x86_64", "x86_64", "x86-64", (), (), Simd(4, "none")),
)


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
        raise CFMoEError(f"--target {name} is not available; available are llvm (this machine) and {', '.join(by_name)}")
    arch = {"AMD64": "x86_64"}.get(platform.machine(), platform.machine())
    have = host_features()
    for target in CPU_TARGETS:
        if target.arch == arch and set(target.features) <= have:
            return target
    raise CFMoEError(f"--target llvm: no CPU target for this machine ({arch}); available are {', '.join(by_name)}")


def build(mod: tvm.IRModule, target: CpuTarget, out: Path) -> None:
    """Compiles the PrimFuncs of `mod` into the shared library `out`."""
    with tvm.transform.PassContext(opt_level=3):
        tvm.compile(mod, target=target.tvm_target()).export_library(str(out))

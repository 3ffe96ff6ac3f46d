"""The kernels of one GPU target as a library file and the entries of its plan."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tvm
from tvm import tirx
from tvm.target import Target

from cfmoe.compile.codegen import glsl, opencl, spirv
from cfmoe.compile.kernels.gpu.profile import Profile
from cfmoe.compile.plan_expression import expression

_WORD = 4


@dataclass(frozen=True)
class KernelSet:
    """`entries` are the plan's `kernels`; `features` what the device must have; `digest` is SHA-256 of the sources."""

    library: bytes
    entries: dict[str, dict[str, Any]]
    features: tuple[str, ...]
    digest: str


def lower(functions: dict[str, tirx.PrimFunc], target: Target) -> tvm.IRModule:
    """Device functions with loops unrolled and intrinsics as `target` names them."""
    mod = tvm.IRModule({name: function.with_attr("target", target) for name, function in functions.items()})
    passes = [
        tirx.transform.VectorizeLoop(),
        tirx.transform.UnrollLoop(),
        tirx.transform.StmtSimplify(),
        tirx.transform.RemoveNoOp(),
        tirx.transform.LowerIntrin(),
    ]
    return tvm.transform.Sequential(passes)(mod)


def _entry(shader: glsl.Shader, code: tuple[int, int], entry: str) -> dict[str, Any]:
    symbols = {scalar: f"s{i}" for i, scalar in enumerate(shader.scalars)}
    return {
        "code": list(code),
        "entry": entry,
        "local": list(shader.local),
        "grid": [expression(extent, symbols) for extent in shader.grid],
        "buffers": shader.buffers,
        "scalars": len(shader.scalars),
        "writes": list(shader.writes),
    }


def _shaders(functions: dict[str, tirx.PrimFunc], profile: Profile, kind: str) -> dict[str, glsl.Shader]:
    mod = lower(functions, Target({"kind": kind}))
    by_name = {var.name_hint: function for var, function in mod.functions_items()}
    return {name: glsl.emit(by_name[name], name, profile.features, profile.shared_bytes) for name in sorted(functions)}


def build_vulkan(functions: dict[str, tirx.PrimFunc], profile: Profile, dump: Path | None) -> KernelSet:
    """One SPIR-V module per kernel, one after the other; with `dump` their GLSL as well. Raises CFMoEError where a tool refuses one."""
    shaders = _shaders(functions, profile, "vulkan")
    if dump is not None:
        dump.mkdir(parents=True, exist_ok=True)
        for name, shader in shaders.items():
            (dump / f"{name}.comp").write_text(shader.source)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        codes = pool.map(lambda shader: spirv.assemble(shader.name, shader.source), shaders.values())
    library, entries = bytearray(), {}
    for (name, shader), code in zip(shaders.items(), codes, strict=True):
        if dump is not None:
            (dump / f"{name}.spv").write_bytes(code)
        entries[name] = _entry(shader, (len(library), len(code)), spirv.entry_point(name))
        library += code + bytes(-len(code) % _WORD)
    digest = hashlib.sha256("".join(s.source for s in shaders.values()).encode()).hexdigest()
    features = sorted({f for s in shaders.values() for f in s.features})
    return KernelSet(bytes(library), entries, tuple(features), digest)


def build_source(functions: dict[str, tirx.PrimFunc], profile: Profile, kind: str, dump: Path | None) -> KernelSet:
    """OpenCL C or MSL (`kind`: opencl, metal) of all kernels in one source."""
    # The interface is the shaders': the same functions, the same walk.
    shaders = _shaders(functions, profile, "vulkan")
    tagged = {name: f.with_attr("tirx.kernel_launch_params", list(shaders[name].launch)) for name, f in functions.items()}
    source = opencl.emit(lower(tagged, Target({"kind": kind})), kind)
    if dump is not None:
        dump.mkdir(parents=True, exist_ok=True)
        (dump / f"kernels.{'cl' if kind == 'opencl' else 'metal'}").write_text(source)
    library = source.encode()
    entries = {name: _entry(shader, (0, len(library)), name) for name, shader in shaders.items()}
    return KernelSet(library, entries, (), hashlib.sha256(library).hexdigest())

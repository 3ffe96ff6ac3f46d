"""GPU targets: what each is called, and its kernels, plan and library."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tvm import tirx

from cfmoe.artifact.writer import ArtifactWriter
from cfmoe.compile import plan
from cfmoe.compile.codegen.kernel_set import KernelSet, build_source, build_vulkan
from cfmoe.compile.decoder import Decoder
from cfmoe.compile.decoder_config import DecoderConfig, Quantisation
from cfmoe.compile.kernels.expert import ExpertShape
from cfmoe.compile.kernels.gpu import expert
from cfmoe.compile.kernels.gpu.profile import Profile
from cfmoe.compile.kernels.gpu.profiles import PROFILES
from cfmoe.compile.passes import pipeline
from cfmoe.compile.passes.fuse_row_kernels import FuseRowKernels
from cfmoe.compile.passes.lower_to_gpu_kernels import GpuKernels, LowerToGpuKernels
from cfmoe.compile.passes.split_decode_attention import SplitDecodeAttention
from cfmoe.errors import CFMoEError

DEVICES = {"vulkan": "kernels.spv", "opencl": "kernels.cl", "metal": "kernels.metal"}


@dataclass(frozen=True)
class GpuTarget:
    device: str
    profile: Profile

    @property
    def name(self) -> str:
        return f"{self.device}-{self.profile.name}"


def resolve(name: str) -> GpuTarget | None:
    """`vulkan`, `opencl` and `metal` are their generic targets; None for other names. Raises CFMoEError for an unknown profile."""
    device, _, profile = name.partition("-")
    if device not in DEVICES:
        return None
    if (profile or "generic") not in PROFILES:
        raise CFMoEError(f"--target {name}: {device} has no profile {profile}; profiles are {', '.join(PROFILES)}")
    chosen = PROFILES[profile or "generic"]
    return GpuTarget(device, chosen if device == "vulkan" else chosen.without_vulkan())


def expert_kernels(profile: Profile, config: DecoderConfig, quantisation: Quantisation) -> dict[str, tirx.PrimFunc]:
    """The four kernels of the routed experts by name."""
    shape = ExpertShape(
        quantisation["expert"], config.hidden_size, config.expert_ffn_size, bias=config.expert_bias, swiglu=config.expert_swiglu
    )
    kernels = {}
    for phase in ("prefill", "decode"):
        for part, emit in (("gate_up", expert.gate_up), ("down", expert.down)):
            name = f"expert_{part}_{phase}"
            kernels[name] = emit(name, profile, shape, phase == "decode")
    return kernels


def build(
    target: GpuTarget,
    config: DecoderConfig,
    quantisation: Quantisation,
    chunk: int,
    dump_ir: Path | None = None,
) -> tuple[dict[str, Any], KernelSet]:
    """plan.json and the kernels that it names. Raises CFMoEError where a tool is missing."""
    found = GpuKernels()
    mod, parameters = Decoder(config, quantisation, gathers=True).export()
    bounds = plan.symbol_bounds(config, chunk)
    first = [SplitDecodeAttention(target.profile.attention_splits)]
    mod = pipeline.run(mod, LowerToGpuKernels(target.profile, found), bounds, dump_ir, first, [FuseRowKernels()])
    found.functions |= expert_kernels(target.profile, config, quantisation)
    if dump_ir is not None:
        (dump_ir / "99_kernels.py").write_text("\n".join(f.script() for _, f in sorted(found.functions.items())))
    shaders = dump_ir / "shaders" if dump_ir is not None else None
    if target.device == "vulkan":
        kernels = build_vulkan(found.functions, target.profile, shaders)
    else:
        kernels = build_source(found.functions, target.profile, target.device, shaders)
    document = plan.emit_gpu(mod, config, quantisation, chunk, [name for name, _ in parameters], found, kernels.entries)
    return document, kernels


def write(
    writer: ArtifactWriter,
    target: GpuTarget,
    config: DecoderConfig,
    quantisation: Quantisation,
    chunk: int,
    dump_ir: Path | None,
) -> tuple[dict[str, Any], str]:
    """Adds the target's files; returns its entry of the manifest and the name of its kernel set."""
    document, kernels = build(target, config, quantisation, chunk, dump_ir)
    folder = f"lib/{target.name}"
    writer.add_file(f"{folder}/plan.json", json.dumps(document, separators=(",", ":")).encode())
    writer.add_file(f"{folder}/{DEVICES[target.device]}", kernels.library)
    entry = {
        "device": target.device,
        "arch": "generic",
        "features": list(kernels.features),
        "library": f"{folder}/{DEVICES[target.device]}",
        "plan": f"{folder}/plan.json",
    }
    return entry, kernels.digest

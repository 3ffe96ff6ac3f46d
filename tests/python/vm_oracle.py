"""A compiled decoder in TVM's Relax VM: the oracle of what plan.json and the runtime make of the same kernels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from tvm import relax
from tvm.relax import transform

from cfmoe.artifact.reader import Artifact
from cfmoe.compile import plan, targets
from cfmoe.compile.checkpoint import Checkpoint
from cfmoe.compile.decoder import Decoder
from cfmoe.compile.decoder_config import DecoderConfig, Quantisation
from cfmoe.compile.families import resolve
from cfmoe.compile.kernels.builder import TILE
from cfmoe.compile.kernels.expert import scratch_width
from cfmoe.compile.kernels.matmul import FORMATS
from cfmoe.compile.passes import pipeline
from cfmoe.compile.passes.lower_to_kernels import LowerToKernels

# TVM's own build without the passes that expect schedulable kernels, and without a memory plan.
VM_PASSES = (
    transform.LegalizeOps,
    transform.ToNonDataflow,
    transform.RemovePurityChecking,
    transform.CallTIRRewrite,
    transform.LowerAllocTensor,
    transform.KillAfterLastUse,
    transform.LowerRuntimeBuiltin,
    transform.ComputePrimValue,
    transform.VMShapeLower,
    transform.AttachGlobalSymbol,
)


def route(logits: np.ndarray, config: DecoderConfig) -> tuple[np.ndarray, np.ndarray]:
    """(ids int32, weights fp32) of one token's experts by descending score, ties to the lower id. Sums run from left to right.

    The runtime's exponential is one of fp64, rounded: numpy's of fp32 differs from it in the last bit.
    """
    logits = logits[: config.num_experts]
    sigmoid = config.router_score == "sigmoid"
    scores = np.exp((-logits if sigmoid else logits - logits.max()).astype(np.float64)).astype(np.float32)
    scores = np.float32(1) / (np.float32(1) + scores) if sigmoid else scores / np.cumsum(scores)[-1]
    allowed = scores.reshape(config.router_groups, -1).copy()
    allowed[np.argsort(-allowed.max(1), kind="stable")[config.router_top_groups :]] = -2
    ids = np.argsort(-allowed.reshape(-1), kind="stable")[: config.top_k].astype(np.int32)
    weights = scores[ids]
    factor = np.float32(config.router_scale)
    return ids, weights * (factor / np.cumsum(weights)[-1] if config.router_renormalise else factor)


def aligned(size: int, dtype: str) -> np.ndarray:
    """`size` elements on a cache line, as the kernels want them."""
    raw = np.empty(size * np.dtype(dtype).itemsize + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : raw.size - 64 + start].view(dtype)


class VmOracle:
    """The decoder of checkpoint `model`, whose compiled form is `artifact`, in the VM; phases of the compiler named in `skip` are left out.

    Weights and the kernels of the experts come from the artifact. Every tensor has memory of its own: there is no memory plan to be wrong.
    """

    def __init__(self, model: Path, artifact: Path, skip: Sequence[str] = ()) -> None:
        opened = Artifact.open(artifact)
        self.chunk = opened.manifest.prefill_chunk
        self.config, _ = resolve(Checkpoint(model).config, str(model / "config.json"))
        quantisation = Quantisation.named(opened.manifest.quantisation_preset)
        self.format = FORMATS[quantisation["expert"]]
        target = targets.resolve("llvm")
        self.expert_kernels = tvm_ffi.load_module(str(artifact / opened.manifest.targets[target.name].library))
        self.stride = opened.index.experts.record_stride
        records = np.fromfile(artifact / "experts.bin", self.format.dtype)
        self.slab = aligned(records.size, self.format.dtype)
        self.slab[:] = records

        mod, parameters = Decoder(self.config, quantisation).export()
        mod = pipeline.bound_symbols(mod, plan.symbol_bounds(self.config, self.chunk))
        passes = dict(pipeline.phases(LowerToKernels(target.simd)))
        assert set(skip) <= set(passes)
        for name in list(passes)[: list(passes).index("lower_to_kernels") + 1]:
            if name not in skip:
                mod = tvm.transform.Sequential(list(passes[name]))(mod)
        lowering = tvm.transform.Sequential([make() for make in VM_PASSES])
        built = tvm.compile(mod, target=target.tvm_target(), relax_pipeline=lowering)
        # The VM looks these up by name when it starts.
        tvm.register_global_func("cfmoe.route", self._route, override=True)
        tvm.register_global_func("cfmoe.experts", self._experts, override=True)
        self.vm = relax.VirtualMachine(built, tvm.cpu())

        dense = (artifact / "weights.bin").read_bytes()
        weights = {}
        for entry in opened.index.weights:
            weights[entry.name] = np.frombuffer(dense, entry.dtype, int(np.prod(entry.shape)), entry.offset).reshape(entry.shape)
        self.weights = [tvm.runtime.tensor(weights[name]) for name, _ in parameters]
        c, dtype = self.config, quantisation.kv_dtype
        blocks = -(-c.context_size // 16)
        self.keys = [tvm.runtime.tensor(np.zeros((c.num_kv_heads, blocks, c.head_dim, 16), dtype)) for _ in range(c.num_layers)]
        self.values = [tvm.runtime.tensor(np.zeros((c.num_kv_heads, 16 * blocks, c.value_dim), dtype)) for _ in range(c.num_layers)]
        self.position = 0
        self.phase = ""

    def prefill(self, tokens: Sequence[int]) -> np.ndarray:
        """Logits behind every token, fp32 [tokens, vocab]."""
        return np.concatenate([self._run("prefill", tokens[i : i + self.chunk]) for i in range(0, len(tokens), self.chunk)])

    def decode(self, tokens: Sequence[int]) -> np.ndarray:
        """The same, token by token."""
        return np.concatenate([self._run("decode", [token]) for token in tokens])

    def _run(self, phase: str, tokens: Sequence[int]) -> np.ndarray:
        self.phase = phase
        inputs = tvm.runtime.tensor(np.array(tokens, np.int32))
        position = tvm.runtime.ShapeTuple([self.position])
        hidden = self.vm[phase](inputs, position, self.keys, self.values, *self.weights).numpy()
        self.position += len(tokens)
        return np.concatenate([self.vm["head"](tvm.runtime.tensor(row[None]), *self.weights).numpy() for row in hidden])

    def _route(self, logits: Any, _layer: int, _groups: int, _top_groups: int, ids: Any, weights: Any) -> None:
        rows = [route(row, self.config) for row in logits.numpy()]
        ids.copyfrom(np.stack([row[0] for row in rows]))
        weights.copyfrom(np.stack([row[1] for row in rows]))

    def _experts(self, activation: Any, ids: Any, layer: int, rows: Any, _scratch: Any) -> None:
        """One expert after the other, from a slab that holds them all; `layer` counts layers with experts."""
        chosen = ids.numpy().reshape(-1)
        c = self.config
        slab = tvm_ffi.from_dlpack(self.slab)
        gate_up, down = (self.expert_kernels[f"expert_{part}_{self.phase}"] for part in ("gate_up", "down"))
        width = scratch_width(self.format.name, c.expert_ffn_size)
        for expert in sorted(set(chosen.tolist())):
            offset = (layer * c.num_experts + expert) * self.stride // 4
            places = np.flatnonzero(chosen == expert)
            rows_in, rows_out = aligned(len(places), "int32"), aligned(len(places), "int32")
            rows_in[:], rows_out[:] = places // c.top_k, places
            scratch = tvm_ffi.from_dlpack(aligned(len(places) * width, self.format.activation_dtype).reshape(-1, width))
            gate_up(activation, tvm_ffi.from_dlpack(rows_in), slab, scratch, offset, 0, c.expert_ffn_size // TILE)
            down(scratch, tvm_ffi.from_dlpack(rows_out), slab, rows, offset, 0, c.hidden_size // TILE)

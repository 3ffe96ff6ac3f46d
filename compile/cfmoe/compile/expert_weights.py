"""The routed experts of a checkpoint, one at a time, out of any layout that families use."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cfmoe.compile.checkpoint import Checkpoint
from cfmoe.compile.decoder_config import DecoderConfig
from cfmoe.compile.families.base import WeightNames

# FP4 E2M1: sign, two bits of exponent, one of mantissa (OCP Microscaling Formats 1.0, section 5.3.3).
_FP4 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0], np.float32)
_MXFP4_GROUP = 32


@dataclass(frozen=True)
class ExpertWeights:
    """Matrices are (outputs, inputs); biases fp32, or None where the family has none."""

    gate: np.ndarray  # (ffn, hidden)
    up: np.ndarray  # (ffn, hidden)
    down: np.ndarray  # (hidden, ffn)
    gate_bias: np.ndarray | None = None  # (ffn,)
    up_bias: np.ndarray | None = None
    down_bias: np.ndarray | None = None  # (hidden,)


def mxfp4(
    blocks: np.ndarray,  # uint8 (rows, groups, 16): two codes a byte, the lower half first
    scales: np.ndarray,  # uint8 (rows, groups): exponents, biased by 127
) -> np.ndarray:
    """fp32 (rows, 32 * groups)."""
    rows, groups, _ = blocks.shape
    values = np.empty((rows, groups, _MXFP4_GROUP), np.float32)
    values[..., 0::2] = _FP4[blocks & 15]
    values[..., 1::2] = _FP4[blocks >> 4]
    values *= np.ldexp(np.float32(1.0), scales.astype(np.int32) - 127)[..., None]
    return values.reshape(rows, groups * _MXFP4_GROUP)


def read_expert(checkpoint: Checkpoint, config: DecoderConfig, names: WeightNames, layer: int, expert: int) -> ExpertWeights:
    """Expert `expert` of the model's layer `layer`. Raises CFMoEError where a tensor is missing or has another shape."""
    hidden, ffn, count = config.hidden_size, config.expert_ffn_size, config.num_experts
    gate_up_name, down_name = names.fused_gate_up.format(l=layer), names.fused_down.format(l=layer)

    def packed(name: str, outputs: int, inputs: int) -> np.ndarray:
        groups = inputs // _MXFP4_GROUP
        blocks = checkpoint.read(f"{name}_blocks", (count, outputs, groups, _MXFP4_GROUP // 2), expert, types=("U8",))
        return mxfp4(blocks, checkpoint.read(f"{name}_scales", (count, outputs, groups), expert, types=("U8",)))

    if not names.fused_transposed:
        if gate_up_name in checkpoint:
            gate_up = checkpoint.read(gate_up_name, (count, 2 * ffn, hidden), expert)
            return ExpertWeights(gate_up[:ffn], gate_up[ffn:], checkpoint.read(down_name, (count, hidden, ffn), expert))
        gate, up, down = names.parts
        shapes = ((gate, ffn, hidden), (up, ffn, hidden), (down, hidden, ffn))
        return ExpertWeights(*(checkpoint.read(names.expert.format(l=layer, e=expert, part=part), (n, k)) for part, n, k in shapes))
    if f"{gate_up_name}_blocks" in checkpoint:
        gate_up, down_weight = packed(gate_up_name, 2 * ffn, hidden), packed(down_name, hidden, ffn)
    else:
        gate_up = checkpoint.read(gate_up_name, (count, hidden, 2 * ffn), expert).T
        down_weight = checkpoint.read(down_name, (count, ffn, hidden), expert).T
    gate_up_bias = checkpoint.read(f"{gate_up_name}_bias", (count, 2 * ffn), expert).astype(np.float32)
    down_bias = checkpoint.read(f"{down_name}_bias", (count, hidden), expert).astype(np.float32)
    return ExpertWeights(gate_up[0::2], gate_up[1::2], down_weight, gate_up_bias[0::2], gate_up_bias[1::2], down_bias)

"""What an artifact of a checkpoint would take, without compiling it."""

from __future__ import annotations

from pathlib import Path

from cfmoe.artifact.layout import EXPERT_ALIGNMENT
from cfmoe.compile.checkpoint import Checkpoint
from cfmoe.compile.decoder_config import PRESETS, DecoderConfig, Quantisation
from cfmoe.compile.families import resolve
from cfmoe.compile.kernels.expert import record_sections
from cfmoe.compile.kernels.matmul import FORMATS, packed_size
from cfmoe.errors import CFMoEError
from cfmoe.planner.footprint import DEFAULT_CONTEXT, Footprint, kv_bytes, workspace_bytes

_CHUNK = 256  # compile_model's default


def footprint_of_checkpoint(model: Path, quant: str = "mixed", context_size: int | None = None) -> Footprint:
    """The sizes of `model` in preset `quant`; the workspace is estimated, the others follow from the configuration.

    Raises CFMoEError where the preset or the checkpoint's family is unknown.
    """
    if quant not in PRESETS:
        raise CFMoEError(f"--quant {quant} is unknown; known are {', '.join(PRESETS)}")
    config, _ = resolve(Checkpoint(model).config, str(model / "config.json"))
    quantisation = Quantisation.named(quant)
    record = sum(
        size for _, size in record_sections(quantisation["expert"], config.hidden_size, config.expert_ffn_size, config.expert_bias).values()
    )
    context = min(config.context_size, context_size or DEFAULT_CONTEXT)
    return Footprint(
        model.resolve().name,
        len(config.moe_layers),
        config.num_experts,
        config.top_k,
        _weights_bytes(config, quantisation),
        kv_bytes(config.num_layers, config.num_kv_heads, config.head_dim + config.value_dim, context, quantisation.kv_dtype),
        workspace_bytes(_CHUNK, config.hidden_size),
        record,
        -(-record // EXPERT_ALIGNMENT) * EXPERT_ALIGNMENT,
        estimated=True,
    )


def _matrix(kind: str, width: int, outputs: int) -> int:
    fmt = FORMATS[kind]
    return packed_size(fmt, width, outputs) * (fmt.words32 * 4 // fmt.words)


def _weights_bytes(c: DecoderConfig, q: Quantisation) -> int:
    """Always-resident matrices; vectors are too small to count."""
    attention = sum(_matrix(q["attention"], *shape) for shape in c.attention_matrices())
    total = c.num_layers * attention + _matrix(q["embedding"], c.hidden_size, c.vocab_size)
    if not c.tie_embeddings:
        total += _matrix(q["head"], c.hidden_size, c.vocab_size)
    dense_layers = c.num_layers - len(c.moe_layers)
    for layers, ffn in ((dense_layers, c.dense_ffn_size), (len(c.moe_layers), c.shared_ffn_size)):
        if layers and ffn:
            total += layers * (2 * _matrix(q["dense"], c.hidden_size, ffn) + _matrix(q["dense"], ffn, c.hidden_size))
    gates = [c.num_experts, *([1] if c.shared_gate else [])]
    return total + len(c.moe_layers) * sum(_matrix("f32", c.hidden_size, outputs) for outputs in gates)

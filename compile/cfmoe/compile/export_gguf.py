"""A checkpoint as one GGUF file for llama.cpp: its architectures' names, row orders and metadata, written tensor by tensor."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cfmoe.compile.checkpoint import Checkpoint, read_json
from cfmoe.compile.decoder_config import DecoderConfig
from cfmoe.compile.expert_weights import ExpertWeights, read_expert
from cfmoe.compile.families import resolve
from cfmoe.compile.families.base import WeightNames
from cfmoe.compile.gguf_tokenizer import add_tokenizer
from cfmoe.compile.rope import Rope, yarn_mscale
from cfmoe.errors import CFMoEError, os_error

Progress = Callable[[str, int, int], None]

# Matrices, and the embedding and head, which 4 bits would harm most.
QUANTS = {"f32": ("F32", "F32"), "f16": ("F16", "F16"), "q8_0": ("Q8_0", "Q8_0"), "q4_0": ("Q4_0", "Q8_0")}
ARCHITECTURES = {
    "deepseek": "deepseek",
    "deepseek_v2": "deepseek2",
    "gpt_oss": "gpt-oss",
    "granitemoe": "granitemoe",
    "mixtral": "llama",
    "olmoe": "olmoe",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
}
# These rotate neighbouring elements of a head, so their rows of q and k are interleaved.
_INTERLEAVED = ("deepseek", "granitemoe", "mixtral")
# These read rope_freqs.weight, by which every frequency is divided.
_FREQUENCY_FACTORS = ("granitemoe", "mixtral")
_DTYPES = {"F32": "f4", "F16": "f2"}  # the others are blocks of bytes
_FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0", "q4_0": "MOSTLY_Q4_0"}


@dataclass(frozen=True)
class _Tensor:
    """`kind`: matrix, table (embedding and head) or plain (kept in f32). `parts` yields the first dimension piece by piece."""

    name: str
    shape: tuple[int, ...]
    kind: str
    parts: Callable[[], Iterator[np.ndarray]]


class _Source:
    """The checkpoint's tensors under llama.cpp's names."""

    def __init__(self, checkpoint: Checkpoint, config: DecoderConfig, names: WeightNames) -> None:
        self.checkpoint, self.c, self.names = checkpoint, config, names

    def _whole(self, name: str, source: str, shape: tuple[int, ...], kind: str, change: Any = None) -> _Tensor:
        def parts() -> Iterator[np.ndarray]:
            value = self.checkpoint.read(source, shape)
            yield change(value) if change else value

        return _Tensor(name, shape, kind, parts)

    def tensors(self) -> Iterator[_Tensor]:
        c, names = self.c, self.names
        table = (c.vocab_size, c.hidden_size)
        yield self._whole("token_embd.weight", names.embedding, table, "table")
        if c.rope.kind == "llama3":
            plain = Rope(c.rope.theta).inverse_frequencies(c.rotary_dim)
            yield _Tensor("rope_freqs.weight", plain.shape, "plain", lambda: iter([plain / c.rope.inverse_frequencies(c.rotary_dim)]))
        for layer in range(c.num_layers):
            yield from self._layer(layer, f"blk.{layer}.")
        yield self._whole("output_norm.weight", names.final_norm, (c.hidden_size,), "plain")
        if not c.tie_embeddings:
            yield self._whole("output.weight", names.head, table, "table")

    def _layer(self, layer: int, to: str) -> Iterator[_Tensor]:
        c, names = self.c, self.names
        norm = "post_attention_norm" if c.family == "gpt_oss" else "ffn_norm"
        for name, source in (("attn_norm", names.input_norm), (norm, names.post_norm)):
            yield self._whole(f"{to}{name}.weight", source.format(l=layer), (c.hidden_size,), "plain")
        prefix = names.attention.format(l=layer)
        yield from self._latent(prefix, to) if c.latent else self._heads(prefix, to)
        yield self._whole(f"{to}attn_output.weight", f"{prefix}o_proj.weight", (c.hidden_size, c.num_heads * c.value_dim), "matrix")
        if c.o_bias:
            yield self._whole(f"{to}attn_output.bias", f"{prefix}o_proj.bias", (c.hidden_size,), "plain")
        if c.sinks:
            yield self._whole(f"{to}attn_sinks.weight", f"{prefix}sinks", (c.num_heads,), "plain")
        if layer not in c.moe_layers:
            yield from self._feed_forward(names.dense, layer, c.dense_ffn_size, to, "")
            return
        router = names.router.format(l=layer)
        yield self._whole(f"{to}ffn_gate_inp.weight", f"{router}.weight", (c.num_experts, c.hidden_size), "plain")
        if c.router_bias:
            yield self._whole(f"{to}ffn_gate_inp.bias", f"{router}.bias", (c.num_experts,), "plain")
        yield from self._experts(layer, to)
        if c.shared_ffn_size:
            yield from self._feed_forward(names.shared, layer, c.shared_ffn_size, to, "_shexp")
            if c.shared_gate:
                gate = names.shared_gate.format(l=layer)
                yield self._whole(f"{to}ffn_gate_inp_shexp.weight", gate, (1, c.hidden_size), "plain", lambda v: v[0])

    def _heads(self, prefix: str, to: str) -> Iterator[_Tensor]:
        c = self.c
        for name, heads in (("q", c.num_heads), ("k", c.num_kv_heads), ("v", c.num_kv_heads)):
            interleave = c.family in _INTERLEAVED and name != "v"
            change = (lambda v, heads=heads: _interleaved(v, heads)) if interleave else None
            yield self._whole(
                f"{to}attn_{name}.weight", f"{prefix}{name}_proj.weight", (heads * c.head_dim, c.hidden_size), "matrix", change
            )
            if c.qkv_bias:
                yield self._whole(f"{to}attn_{name}.bias", f"{prefix}{name}_proj.bias", (heads * c.head_dim,), "plain")
        if c.qk_norm != "none":
            counts = (1, 1) if c.qk_norm == "head" else (c.num_heads, c.num_kv_heads)
            for name, count in zip("qk", counts, strict=True):
                yield self._whole(f"{to}attn_{name}_norm.weight", f"{prefix}{name}_norm.weight", (count * c.head_dim,), "plain")

    def _latent(self, prefix: str, to: str) -> Iterator[_Tensor]:
        """llama.cpp keeps the latent in its cache: the two halves of kv_b apart, the one for keys transposed."""
        c = self.c
        m = c.latent
        assert m is not None
        if m.q_rank:
            yield self._whole(f"{to}attn_q_a.weight", f"{prefix}q_a_proj.weight", (m.q_rank, c.hidden_size), "matrix")
            yield self._whole(f"{to}attn_q_a_norm.weight", f"{prefix}q_a_layernorm.weight", (m.q_rank,), "plain")
        name, source = ("attn_q_b", "q_b_proj") if m.q_rank else ("attn_q", "q_proj")
        yield self._whole(f"{to}{name}.weight", f"{prefix}{source}.weight", (c.num_heads * c.head_dim, m.q_rank or c.hidden_size), "matrix")
        kv_a = (m.kv_rank + m.rope, c.hidden_size)
        yield self._whole(f"{to}attn_kv_a_mqa.weight", f"{prefix}kv_a_proj_with_mqa.weight", kv_a, "matrix")
        yield self._whole(f"{to}attn_kv_a_norm.weight", f"{prefix}kv_a_layernorm.weight", (m.kv_rank,), "plain")

        def half(keys: bool) -> Iterator[np.ndarray]:
            value = self.checkpoint.read(f"{prefix}kv_b_proj.weight", (c.num_heads * (m.nope + m.value), m.kv_rank))
            heads = value.reshape(c.num_heads, m.nope + m.value, m.kv_rank)
            yield heads[:, : m.nope].transpose(0, 2, 1) if keys else heads[:, m.nope :]

        yield _Tensor(f"{to}attn_k_b.weight", (c.num_heads, m.kv_rank, m.nope), "matrix", lambda: half(True))
        yield _Tensor(f"{to}attn_v_b.weight", (c.num_heads, m.value, m.kv_rank), "matrix", lambda: half(False))

    def _feed_forward(self, template: str, layer: int, ffn: int, to: str, suffix: str) -> Iterator[_Tensor]:
        hidden = self.c.hidden_size
        for part, shape in (("gate", (ffn, hidden)), ("up", (ffn, hidden)), ("down", (hidden, ffn))):
            yield self._whole(f"{to}ffn_{part}{suffix}.weight", template.format(l=layer, part=part), shape, "matrix")

    def _experts(self, layer: int, to: str) -> Iterator[_Tensor]:
        c = self.c

        def stack(choose: Callable[[ExpertWeights], np.ndarray | None]) -> Callable[[], Iterator[np.ndarray]]:
            def parts() -> Iterator[np.ndarray]:
                for expert in range(c.num_experts):
                    value = choose(read_expert(self.checkpoint, c, self.names, layer, expert))
                    assert value is not None
                    yield value[None]

            return parts

        hidden, ffn, n = c.hidden_size, c.expert_ffn_size, c.num_experts
        yield _Tensor(f"{to}ffn_gate_exps.weight", (n, ffn, hidden), "matrix", stack(lambda w: w.gate))
        yield _Tensor(f"{to}ffn_up_exps.weight", (n, ffn, hidden), "matrix", stack(lambda w: w.up))
        yield _Tensor(f"{to}ffn_down_exps.weight", (n, hidden, ffn), "matrix", stack(lambda w: w.down))
        if c.expert_bias:
            yield _Tensor(f"{to}ffn_gate_exps.bias", (n, ffn), "plain", stack(lambda w: w.gate_bias))
            yield _Tensor(f"{to}ffn_up_exps.bias", (n, ffn), "plain", stack(lambda w: w.up_bias))
            yield _Tensor(f"{to}ffn_down_exps.bias", (n, hidden), "plain", stack(lambda w: w.down_bias))


def _interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """From the half-split arrangement of rotated rows to pairs side by side."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def _check(c: DecoderConfig) -> None:
    """Refuses what llama.cpp would compute in another way, or not load."""
    arch = ARCHITECTURES[c.family]
    leading = c.moe_layers[0] if c.family.startswith("deepseek") else 0
    renormalises = c.family not in ("deepseek", "deepseek_v2", "olmoe", "qwen2_moe")
    swiglu = c.expert_swiglu
    refusals = (
        (
            c.router_groups > 1,
            f"topk_method: llama.cpp's {arch} ranks groups of experts by the sum of their two highest scores, this model by the highest",
        ),
        (
            c.rope.kind == "llama3" and c.family not in _FREQUENCY_FACTORS,
            f"rope_scaling is of type llama3, for which llama.cpp's {arch} reads no frequency factors",
        ),
        (
            c.moe_layers != tuple(range(leading, c.num_layers)),
            f"layers without experts: llama.cpp's {arch} has them only where DeepSeek has, at the start",
        ),
        (
            c.router_renormalise != renormalises,
            f"norm_topk_prob is {c.router_renormalise}, but llama.cpp's {arch} takes {renormalises}",
        ),
        (c.family == "qwen3_moe" and c.qkv_bias, "attention_bias is True, but llama.cpp's qwen3moe has no such biases"),
        (
            c.family != "gpt_oss" and any(c.windows),
            f"sliding_window is {max(c.windows, default=0)}: llama.cpp's {arch} has none; set it to null if contexts stay below it",
        ),
        (
            c.family == "gpt_oss" and not (c.qkv_bias and c.o_bias),
            "attention_bias is False, but llama.cpp's gpt-oss wants such biases",
        ),
        (
            swiglu is not None and (swiglu.alpha, swiglu.limit) != (1.702, 7.0),
            f"swiglu_limit: llama.cpp's {arch} has 7 and a swiglu_alpha of 1.702 built in",
        ),
        (
            c.family == "olmoe" and c.num_kv_heads != c.num_heads,
            f"num_key_value_heads is {c.num_kv_heads}: llama.cpp's olmoe has norms for as many as num_attention_heads = {c.num_heads}",
        ),
        (
            c.latent is not None and not c.latent.q_rank and c.num_layers not in (26, 27),
            f"q_lora_rank is null, which llama.cpp's {arch} takes with 26 or 27 layers; this model has {c.num_layers}",
        ),
    )
    for refused, reason in refusals:
        if refused:
            raise CFMoEError(f"{reason}; there is no export of it")


def _add_metadata(writer: Any, c: DecoderConfig, name: str, quant: str) -> None:
    import gguf

    writer.add_name(name)
    writer.add_file_type(getattr(gguf.LlamaFileType, _FILE_TYPES[quant]))
    writer.add_context_length(c.context_size)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_layers)
    writer.add_feed_forward_length(c.dense_ffn_size or c.expert_ffn_size)
    writer.add_head_count(c.num_heads)
    writer.add_head_count_kv(1 if c.latent else c.num_kv_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_vocab_size(c.vocab_size)
    writer.add_expert_count(c.num_experts)
    writer.add_expert_used_count(c.top_k)
    writer.add_expert_feed_forward_length(c.expert_ffn_size)
    writer.add_rope_freq_base(c.rope.theta)
    writer.add_rope_dimension_count(c.rotary_dim)
    if c.latent:
        m = c.latent
        writer.add_kv_lora_rank(m.kv_rank)
        if m.q_rank:
            writer.add_q_lora_rank(m.q_rank)
        writer.add_key_length(m.kv_rank + m.rope)
        writer.add_value_length(m.kv_rank)
        writer.add_key_length_mla(c.head_dim)
        writer.add_value_length_mla(m.value)
    else:
        writer.add_key_length(c.head_dim)
        writer.add_value_length(c.head_dim)
    if c.family in ("deepseek", "deepseek_v2"):
        writer.add_leading_dense_block_count(c.moe_layers[0])
        writer.add_expert_shared_count(c.shared_ffn_size // c.expert_ffn_size)
        writer.add_expert_weights_scale(c.router_scale)
        writer.add_expert_weights_norm(c.router_renormalise)
    elif c.shared_ffn_size:
        writer.add_expert_shared_feed_forward_length(c.shared_ffn_size)
    if any(c.windows):
        writer.add_sliding_window(max(c.windows))
        writer.add_sliding_window_pattern([window > 0 for window in c.windows])
    if c.family == "granitemoe":
        writer.add_attention_scale(c.attention_scale)
        writer.add_embedding_scale(c.embedding_multiplier)
        writer.add_residual_scale(c.residual_multiplier)
        writer.add_logit_scale(c.logits_divisor)
    _add_rope(writer, c)


def _add_rope(writer: Any, c: DecoderConfig) -> None:
    import gguf

    rope = c.rope
    if rope.kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope.factor)
    elif rope.kind == "yarn":
        # `truncate` has no counterpart: llama.cpp rounds the ends of the ramp, of gpt-oss's own files too.
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope.factor)
        writer.add_rope_scaling_orig_ctx_len(rope.original_context)
        writer.add_rope_scaling_yarn_beta_fast(rope.beta_fast)
        writer.add_rope_scaling_yarn_beta_slow(rope.beta_slow)
        if c.latent:
            writer.add_rope_scaling_yarn_log_mul(0.1 * rope.mscale_all_dim)
        else:
            # llama.cpp multiplies by YaRN's own amplitude; what is left to say is by how much the model differs.
            writer.add_rope_scaling_attn_factors(rope.amplitude / yarn_mscale(rope.factor, 1.0))


def export_gguf(
    model: Path, out: Path, *, quant: str = "f16", force: bool = False, progress: Progress = lambda _what, _done, _total: None
) -> Path:
    """Writes checkpoint directory `model` to the file `out` for llama.cpp and returns it; one tensor is in memory at a time.

    Routers, norms and biases stay f32. Raises CFMoEError where gguf is missing, the family has no counterpart or `out` exists.
    """
    try:
        import gguf
    except ImportError as error:
        raise CFMoEError(f"the package gguf is missing ({error}); install cfmoe[export]") from error
    if quant not in QUANTS:
        raise CFMoEError(f"--quant {quant} is unknown; known are {', '.join(QUANTS)}")
    if out.is_dir() or (out.exists() and not force):
        raise CFMoEError(f"{out} exists; give {'the path of a file' if out.is_dir() else '--force to replace it'}, or another path")
    checkpoint = Checkpoint(model)
    config, names = resolve(checkpoint.config, str(model / "config.json"))
    _check(config)
    beside = out.with_name(f".{out.name}.{os.getpid()}-{secrets.token_hex(4)}")
    tensors = list(_Source(checkpoint, config, names).tensors())
    matrix, table = (getattr(gguf.GGMLQuantizationType, name) for name in QUANTS[quant])
    kinds = {"matrix": matrix, "table": table, "plain": gguf.GGMLQuantizationType.F32}
    writer = gguf.GGUFWriter(beside, ARCHITECTURES[config.family])
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _add_metadata(writer, config, model.resolve().name, quant)
        add_tokenizer(writer, model, config, read_json(model / "tokenizer.json"))
        for tensor in tensors:
            kind = kinds[tensor.kind]
            block, size = gguf.GGML_QUANT_SIZES[kind]
            dtype = np.dtype(_DTYPES.get(kind.name, "u1"))
            shape = tensor.shape if kind.name in _DTYPES else (*tensor.shape[:-1], tensor.shape[-1] // block * size)
            if tensor.name.endswith("gate_inp_shexp.weight"):
                shape = shape[1:]
            writer.add_tensor_info(tensor.name, shape, dtype, int(np.prod(shape)) * dtype.itemsize, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for number, tensor in enumerate(tensors, 1):
            kind = kinds[tensor.kind]
            parts = [gguf.quants.quantize(np.ascontiguousarray(part, np.float32), kind) for part in tensor.parts()]
            writer.write_tensor_data(np.ascontiguousarray(parts[0] if len(parts) == 1 else np.concatenate(parts)))
            progress("tensors", number, len(tensors))
        writer.close()
        os.replace(beside, out)
    except OSError as error:
        raise os_error(error, out, "write") from error
    finally:
        writer.close()
        beside.unlink(missing_ok=True)
    return out

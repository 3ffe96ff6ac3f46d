"""mlc-chat-config.json: the fields by which MLC-LLM describes a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cfmoe.compile.checkpoint import read_json
from cfmoe.compile.decoder_config import DecoderConfig


def mlc_chat_config(model: Path, c: DecoderConfig, quant: str, prefill_chunk: int, tokenizer_files: list[str]) -> dict[str, Any]:
    """MLC-LLM's fields in MLC-LLM's order. `quantization` names our preset: the weights are in our layout."""
    path = model / "generation_config.json"
    generation = read_json(path) if path.exists() else {}
    config = read_json(model / "config.json")
    model_config = {
        "hidden_size": c.hidden_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "num_experts": c.num_experts,
        "num_experts_per_tok": c.top_k,
        "moe_intermediate_size": c.expert_ffn_size,
        "norm_topk_prob": c.router_renormalise,
        "rms_norm_eps": c.rms_norm_eps,
        "rope_theta": c.rope.theta,
        "tie_word_embeddings": c.tie_embeddings,
        "vocab_size": c.vocab_size,
        "context_window_size": c.context_size,
        "prefill_chunk_size": prefill_chunk,
    }
    return {
        "version": "0.1.0",
        "model_type": c.family,
        "quantization": f"cfmoe-{quant}",
        "model_config": model_config,
        "vocab_size": c.vocab_size,
        "context_window_size": c.context_size,
        "sliding_window_size": -1,
        "prefill_chunk_size": prefill_chunk,
        "attention_sink_size": -1,
        "tensor_parallel_shards": 1,
        "pipeline_parallel_stages": 1,
        "active_vocab_size": c.vocab_size,
        "temperature": generation.get("temperature", 1.0),
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": generation.get("repetition_penalty", 1.0),
        "top_p": generation.get("top_p", 1.0),
        "tokenizer_files": tokenizer_files,
        "tokenizer_info": tokenizer_info(read_json(model / "tokenizer.json")),
        "conv_template": None,
        "pad_token_id": pad if isinstance(pad := config.get("pad_token_id"), int) else 0,
        "bos_token_id": c.bos_token_id,
        "eos_token_id": list(c.eos_token_ids),
        "model_task": "chat",
        "embedding_metadata": None,
    }


def tokenizer_info(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """What MLC-LLM wants to know of a tokenizer.json beside the file itself."""
    decoders, normalizers = _steps(tokenizer.get("decoder"), "decoders"), _steps(tokenizer.get("normalizer"), "normalizers")
    byte_fallback = any(step.get("type") == "ByteFallback" for step in decoders)
    return {
        "token_postproc_method": "byte_fallback" if byte_fallback else "byte_level",
        "prepend_space_in_encode": any(step.get("type") == "Prepend" and step.get("prepend") == "\u2581" for step in normalizers),
        "strip_space_in_decode": any(step.get("type") == "Strip" and step.get("start", 0) > 0 for step in decoders),
    }


def _steps(step: object, plural: str) -> list[dict[str, Any]]:
    """A decoder or normalizer, or the members of a sequence of them."""
    if not isinstance(step, dict):
        return []
    members = step.get(plural) if step.get("type") == "Sequence" else [step]
    return [member for member in members if isinstance(member, dict)] if isinstance(members, list) else []

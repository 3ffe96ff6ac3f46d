"""A tiny artifact made by hand, for tests of the writer and the reader that need no compiler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from cfmoe.artifact.writer import ArtifactWriter

LAYERS, EXPERTS, RECORD_WORDS = 2, 3, 40


def manifest() -> dict[str, Any]:
    return {
        "model": {
            "family": "qwen3_moe",
            "name": "tiny",
            "parameters": 1234,
            "num_layers": LAYERS,
            "hidden_size": 32,
            "vocab_size": 64,
            "context_size": 128,
            "num_heads": 1,
            "num_kv_heads": 1,
            "head_dim": 32,
            "moe_layers": [0, 1],
            "num_experts": EXPERTS,
            "top_k": 2,
            "expert_ffn_size": 32,
            "router": {"score": "softmax", "renormalise": True, "scale": 1.0},
            "bos_token_id": None,
            "eos_token_ids": [0],
        },
        "quantisation": {"preset": "f32", "group_size": 32, "classes": {"expert": "f32"}},
        "prefill_chunk": 16,
        "kv_dtype": "float32",
        "kernel_set": "none",
        "targets": {"x": {"device": "cpu", "arch": "x86_64", "features": [], "library": "lib/x/kernels.so", "plan": "lib/x/plan.json"}},
        "tokenizer_files": ["tokenizer.json"],
        "provenance": {"source": "test"},
    }


def record(layer: int, expert: int) -> np.ndarray:
    return np.arange(RECORD_WORDS, dtype=np.int32) + 1000 * layer + 100 * expert


def fill(writer: ArtifactWriter, tokenizer: bytes = b"{}\n") -> None:
    """Everything but `finish`."""
    writer.add_weight("embedding", np.arange(33, dtype=np.float32))
    writer.add_weight("norm", np.ones((4, 5), np.float16))
    writer.set_expert_layout("f32", LAYERS, EXPERTS, RECORD_WORDS * 4, {"gate_up": (0, 64), "down": (64, 96)})
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            writer.add_expert(layer, expert, record(layer, expert))
    writer.add_file("lib/x/plan.json", b"{}\n")
    writer.add_file("lib/x/kernels.so", bytes(range(256)))
    writer.add_file("tokenizer.json", tokenizer)


def write(out: Path, force: bool = False, tokenizer: bytes = b"{}\n") -> Path:
    with ArtifactWriter(out, force) as writer:
        fill(writer, tokenizer)
        return writer.finish(manifest())

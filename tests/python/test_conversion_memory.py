"""Converting a checkpoint of more than a gigabyte holds a small part of it in memory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

LAYERS, HIDDEN, FFN, EXPERTS, VOCAB = 6, 1024, 512, 64, 8192
LAYER_BYTES = 2 * (EXPERTS * 3 * HIDDEN * FFN + 4 * HIDDEN * HIDDEN)

MEASURE = """
import sys
from pathlib import Path
from cfmoe.compile import compile_model, quantise
from cfmoe.runtime.memory import PeakGrowth
import numpy as np
model, out = map(Path, sys.argv[1:])
peaks = []
state = {}
def progress(what, done, total):
    # Kernels are compiled before the first weights: what they took is not the conversion's.
    if what == "dense weights" and "peak" not in state:
        for fmt in ("q4", "q8"):
            quantise.pack(np.zeros((32, 32), np.float32), fmt)
        state["peak"] = PeakGrowth().__enter__()
    if "peak" in state:
        peaks.append(state["peak"].bytes)
compile_model(model, out, progress=progress)
print(max(peaks))
"""


def write_checkpoint(directory: Path, tokenizer: Path) -> None:
    directory.mkdir()
    rng = np.random.default_rng(1)
    noise = (rng.standard_normal(1 << 21, dtype=np.float32) * 0.02).astype(np.float16)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return np.resize(noise, (rows, columns))

    weight_map: dict[str, str] = {}

    def shard(name: str, tensors: dict[str, np.ndarray]) -> None:
        save_file(tensors, directory / name)
        weight_map.update(dict.fromkeys(tensors, name))

    ones = np.ones(HIDDEN, np.float16)
    shard("first.safetensors", {"model.embed_tokens.weight": matrix(VOCAB, HIDDEN), "model.norm.weight": ones})
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        tensors = {f"{prefix}.{name}_layernorm.weight": ones for name in ("input", "post_attention")}
        tensors |= {f"{prefix}.self_attn.{p}_proj.weight": matrix(HIDDEN, HIDDEN) for p in "qkvo"}
        tensors |= {f"{prefix}.self_attn.{p}_norm.weight": np.ones(64, np.float16) for p in "qk"}
        tensors[f"{prefix}.mlp.gate.weight"] = matrix(EXPERTS, HIDDEN)
        for expert in range(EXPERTS):
            base = f"{prefix}.mlp.experts.{expert}"
            tensors |= {f"{base}.gate_proj.weight": matrix(FFN, HIDDEN), f"{base}.up_proj.weight": matrix(FFN, HIDDEN)}
            tensors[f"{base}.down_proj.weight"] = matrix(HIDDEN, FFN)
        shard(f"layer{layer}.safetensors", tensors)
    config = {
        "model_type": "qwen3_moe",
        "num_hidden_layers": LAYERS,
        "hidden_size": HIDDEN,
        "vocab_size": VOCAB,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 64,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": FFN,
        "norm_topk_prob": True,
        "tie_word_embeddings": True,
        "max_position_embeddings": 1024,
    }
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    shutil.copy(tokenizer, directory / "tokenizer.json")


@pytest.mark.slow
def test_conversion_holds_two_layers_at_most(tmp_path: Path, demo_model: Path) -> None:
    model = tmp_path / "model"
    write_checkpoint(model, demo_model / "tokenizer.json")
    assert sum(path.stat().st_size for path in model.iterdir()) > 1 << 30
    command = [sys.executable, "-c", MEASURE, str(model), str(tmp_path / "artifact")]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=900)
    assert int(result.stdout) < 2 * LAYER_BYTES + 2 * VOCAB * HIDDEN + (64 << 20)
    shutil.rmtree(tmp_path)

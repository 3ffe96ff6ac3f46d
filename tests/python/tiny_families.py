"""A small random checkpoint of every model family, made by transformers, with the shapes that exercise what is the family's own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

VOCABULARY = 200

_COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts_per_tok": 3,
    "vocab_size": VOCABULARY,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 2,
    "q_lora_rank": 32,
    "kv_lora_rank": 64,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 64,
    "v_head_dim": 32,
}
_DEEPSEEK = {"moe_intermediate_size": 32, "n_routed_experts": 8, "n_shared_experts": 2, "first_k_dense_replace": 1}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 1.0,
}

# Case -> (model_type, fields). Cases of one family differ in what the family leaves open.
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": (
        "qwen3_moe",
        {
            "moe_intermediate_size": 32,
            "num_experts": 8,
            "head_dim": 32,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
            "use_sliding_window": True,
            "sliding_window": 60,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        },
    ),
    "qwen2_moe": (
        "qwen2_moe",
        {
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 64,
            "num_experts": 8,
            "use_sliding_window": True,
            "sliding_window": 50,
            "max_window_layers": 1,
        },
    ),
    "olmoe": ("olmoe", {"num_experts": 8, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 128}),
    "mixtral": ("mixtral", {"num_local_experts": 8, "sliding_window": 50}),
    "granitemoe": (
        "granitemoe",
        {
            "num_local_experts": 8,
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.15,
            "residual_multiplier": 0.22,
            "logits_scaling": 6.0,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "deepseek": ("deepseek", _DEEPSEEK),
    "deepseek_v2": (
        "deepseek_v2",
        _DEEPSEEK
        | _LATENT
        | {
            "rope_parameters": _YARN,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 2.5,
        },
    ),
    # As in V2-Lite.
    "deepseek_v2-lite": (
        "deepseek_v2",
        _DEEPSEEK | _LATENT | {"q_lora_rank": None, "topk_method": "greedy", "n_group": 1, "topk_group": 1},
    ),
    "gpt_oss": (
        "gpt_oss",
        {"num_local_experts": 8, "head_dim": 32, "sliding_window": 40, "swiglu_limit": 0.8, "rope_parameters": _YARN | {"truncate": False}},
    ),
}


def tiny_network(case: str) -> Any:
    """The random instance, fp32, in evaluation mode. DeepSeek's first version is built of Qwen2-MoE, see `_as_deepseek`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(7)
    family, fields = TINY[case]
    if family == "deepseek":
        shared = fields["moe_intermediate_size"] * fields["n_shared_experts"]
        fields = {
            "moe_intermediate_size": fields["moe_intermediate_size"],
            "num_experts": fields["n_routed_experts"],
            "shared_expert_intermediate_size": shared,
            "mlp_only_layers": [0],
            "qkv_bias": False,
        }
    config = AutoConfig.for_model("qwen2_moe" if family == "deepseek" else family, **(_COMMON | fields))
    network = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "norm" in name or name.endswith("bias") or "sinks" in name:
                torch.nn.init.normal_(parameter, mean=0.0 if name.endswith("bias") else 1.0, std=0.1)
            elif "shared_expert_gate" in name and family == "deepseek":
                parameter.zero_()
            elif "router" in name or name.endswith("gate.weight"):
                torch.nn.init.normal_(parameter, std=0.4)  # decisive: near ties would make the comparison a matter of rounding
            else:
                torch.nn.init.normal_(parameter, std=0.08)
    return network.eval()


def tiny_checkpoint(case: str, directory: Path, tokenizer: Path) -> Path:
    """Saves `tiny_network`, in the layout that checkpoints of the family are published in, with a tokenizer beside."""
    tiny_network(case).save_pretrained(directory)
    if TINY[case][0] == "deepseek":
        _as_deepseek(directory)
    shutil.copy(tokenizer, directory / "tokenizer.json")
    return directory


def _as_deepseek(directory: Path) -> None:
    """Rewrites a Qwen2-MoE checkpoint as what it computes in DeepSeek's terms.

    transformers has no class for DeepSeek's first version. Qwen2-MoE without biases differs from it in the gate of the shared experts
    alone; a gate of zeros halves them, so half their output weights is the same model.
    """
    file = directory / "model.safetensors"
    tensors: dict[str, np.ndarray] = {}
    for name, value in load_file(file).items():
        if "shared_expert_gate" in name:
            assert not value.any()
        elif "shared_expert.down_proj" in name:
            tensors[name.replace("shared_expert.", "shared_experts.")] = value / 2
        else:
            tensors[name.replace("shared_expert.", "shared_experts.")] = value
    save_file(tensors, file)
    fields = _COMMON | TINY["deepseek"][1] | {"model_type": "deepseek", "norm_topk_prob": False, "hidden_act": "silu"}
    (directory / "config.json").write_text(json.dumps(fields))


def network_logits(network: Any, tokens: list[int]) -> np.ndarray:
    """fp32 logits [tokens, vocab]."""
    import torch

    with torch.no_grad():
        return network(torch.tensor([tokens])).logits[0].numpy()


def random_tokens(count: int) -> list[int]:
    return np.random.default_rng(3).integers(0, VOCABULARY, count).tolist()

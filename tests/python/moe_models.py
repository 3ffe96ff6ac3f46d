"""Tiny random MoE models of many families, made by transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

EXPERTS = 8
TOP_K = 2
LAYERS = 3
VOCABULARY = 64

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 12,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": TOP_K,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MLA = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "n_shared_experts": 1}

# What each family names differently; `first_k_dense_replace` leaves the first layer without experts.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2_moe": {"num_experts": EXPERTS, "shared_expert_intermediate_size": EXPERTS},
    "qwen3_moe": {"num_experts": EXPERTS, "head_dim": 8, "norm_topk_prob": True, "mlp_only_layers": [1]},
    "olmoe": {"num_experts": EXPERTS},
    "mixtral": {"num_local_experts": EXPERTS},
    "deepseek_v2": _MLA
    | {"n_routed_experts": EXPERTS, "first_k_dense_replace": 1, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    "deepseek_v3": _MLA | {"n_routed_experts": EXPERTS, "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2},
    "granitemoe": {"num_local_experts": EXPERTS},
    "gpt_oss": {"num_local_experts": EXPERTS, "head_dim": 8},
    "glm4_moe": {"n_routed_experts": EXPERTS, "first_k_dense_replace": 1, "head_dim": 8, "n_group": 1, "topk_group": 1},
    "ernie4_5_moe": {"moe_num_experts": EXPERTS, "moe_k": TOP_K, "moe_layer_start_index": 0},
    "phimoe": {"num_local_experts": EXPERTS},
    "jamba": {
        "num_experts": EXPERTS,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 1,
        "expert_layer_offset": 0,
        "mamba_expand": 1,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "llama4_text": {"num_local_experts": EXPERTS, "head_dim": 8, "intermediate_size_mlp": 24, "interleave_moe_layer_step": 1},
}


def tiny_config(family: str, **changes: Any) -> Any:
    """The configuration of `tiny_model`."""
    from transformers import AutoConfig

    return AutoConfig.for_model(family, **(_COMMON | FAMILIES.get(family, {}) | changes))


def tiny_model(family: str, seed: int = 0, **changes: Any) -> Any:
    """A random model of `family` in evaluation mode; its routers disagree between tokens."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **changes))
    for parameter in model.parameters():
        if parameter.dim() > 1 and 1 not in parameter.shape:  # a row is a bias
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def random_tokens(batch: int = 2, length: int = 9, seed: int = 0) -> torch.Tensor:
    """(batch, length) token ids, none of them special."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))

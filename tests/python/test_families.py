"""Configurations of the model families: what is read from config.json, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from cfmoe.compile.families import resolve
from cfmoe.errors import CFMoEError

QWEN3: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "vocab_size": 100,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 96,
    "intermediate_size": 160,
    "mlp_only_layers": [2],
    "norm_topk_prob": True,
    "eos_token_id": [3, 5],
}
QWEN2 = QWEN3 | {"model_type": "qwen2_moe", "shared_expert_intermediate_size": 128}


def test_qwen3() -> None:
    config, _ = resolve(QWEN3, "config.json")
    assert (config.moe_layers, config.dense_ffn_size, config.expert_ffn_size) == ((0, 1, 3), 160, 96)
    assert (config.qk_norm, config.qkv_bias, config.shared_ffn_size, config.shared_gate) == ("head", False, 0, False)
    assert (config.router_renormalise, config.eos_token_ids) == (True, (3, 5))


def test_qwen2() -> None:
    config, _ = resolve(QWEN2, "config.json")
    assert (config.qk_norm, config.qkv_bias, config.shared_ffn_size, config.shared_gate) == ("none", True, 128, True)


def test_the_other_name_of_the_number_of_experts() -> None:
    renamed = {name.replace("num_experts", "num_local_experts") if name == "num_experts" else name: v for name, v in QWEN3.items()}
    assert resolve(renamed, "config.json")[0].num_experts == 8


@pytest.mark.parametrize(
    ("base", "change", "message"),
    [
        (QWEN3, {"model_type": "gpt2"}, "model_type 'gpt2' is not supported; supported are olmoe, qwen2_moe, qwen3_moe"),
        (QWEN3, {"hidden_size": 80}, "hidden_size is 80, but must be a multiple of 32"),
        (QWEN3, {"head_dim": 48}, "head_dim is 48, but must be a multiple of 32"),
        (QWEN3, {"moe_intermediate_size": 100}, "moe_intermediate_size is 100, but must be a multiple of 32"),
        (QWEN3, {"intermediate_size": 100}, "intermediate_size is 100, but must be a multiple of 32"),
        (QWEN2, {"shared_expert_intermediate_size": 100}, "shared_expert_intermediate_size is 100, but must be a multiple of 32"),
        (QWEN3, {"num_attention_heads": 3, "num_key_value_heads": 2}, "num_attention_heads is 3, but must be a multiple of"),
        (QWEN3, {"num_experts_per_tok": 9}, "num_experts_per_tok is 9, more than num_experts = 8"),
        (QWEN3, {"num_experts": "8"}, "num_experts is '8', but must be an integer from 1 to 4096"),
        (QWEN3, {"eos_token_id": 100}, "eos_token_id is 100, but must be null, a token id below vocab_size = 100"),
        (QWEN3, {"use_sliding_window": True}, "use_sliding_window is True; supported is False"),
        (QWEN3, {"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported is 'silu'"),
        (QWEN3, {"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling has type 'yarn'; supported is 'default'"),
        (QWEN3, {"mlp_only_layers": [0, 1, 2, 3]}, "mlp_only_layers leaves no layer with experts"),
    ],
)
def test_what_the_decoder_lacks_is_refused(base: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(CFMoEError) as refused:
        resolve(base | change, "dir/config.json")
    assert message in str(refused.value)
    assert str(refused.value).startswith("dir/config.json: ")
    assert "\n" not in str(refused.value)

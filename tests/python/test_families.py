"""Configurations of the model families: what is read from config.json, and what is refused. Rotary embeddings against transformers."""

from __future__ import annotations

from typing import Any

import numpy as np
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
MIXTRAL = QWEN3 | {"model_type": "mixtral"}
DEEPSEEK = QWEN3 | {"model_type": "deepseek", "n_routed_experts": 8, "n_shared_experts": 2, "first_k_dense_replace": 1}
DEEPSEEK2 = DEEPSEEK | {
    "model_type": "deepseek_v2",
    "norm_topk_prob": False,
    "num_key_value_heads": 2,
    "kv_lora_rank": 64,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 64,
    "v_head_dim": 96,
    "topk_method": "group_limited_greedy",
    "n_group": 4,
    "topk_group": 2,
}
GPT_OSS = QWEN3 | {"model_type": "gpt_oss", "sliding_window": 128}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0}


def test_qwen3() -> None:
    config, _ = resolve(QWEN3, "config.json")
    assert (config.moe_layers, config.dense_ffn_size, config.expert_ffn_size) == ((0, 1, 3), 160, 96)
    assert (config.qk_norm, config.qkv_bias, config.shared_ffn_size, config.shared_gate) == ("head", False, 0, False)
    assert (config.router_renormalise, config.eos_token_ids) == (True, (3, 5))


def test_qwen2() -> None:
    config, _ = resolve(QWEN2, "config.json")
    assert (config.qk_norm, config.qkv_bias, config.shared_ffn_size, config.shared_gate) == ("none", True, 128, True)


def test_deepseek() -> None:
    config, _ = resolve(DEEPSEEK, "config.json")
    assert (config.moe_layers, config.dense_ffn_size, config.shared_ffn_size, config.shared_gate) == ((1, 2, 3), 160, 192, False)


def test_deepseek_v2() -> None:
    config, _ = resolve(DEEPSEEK2, "config.json")
    assert (config.head_dim, config.value_dim, config.rotary_dim, config.num_kv_heads) == (96, 96, 32, 2)
    assert (config.router_groups, config.router_top_groups, config.router_renormalise) == (4, 2, False)
    assert config.attention_matrices() == [(64, 2 * 96), (64, 64), (64, 32), (64, 2 * 160), (192, 64)]
    assert resolve(DEEPSEEK2 | {"topk_method": "greedy"}, "config.json")[0].router_groups == 1


def test_sliding_windows() -> None:
    assert resolve(MIXTRAL, "config.json")[0].window(3) == 0
    assert resolve(MIXTRAL | {"sliding_window": 50}, "config.json")[0].windows == (50,) * 4
    assert resolve(GPT_OSS, "config.json")[0].windows == (128, 0, 128, 0)
    layers = ["full_attention"] * 3 + ["sliding_attention"]
    assert resolve(GPT_OSS | {"layer_types": layers}, "config.json")[0].windows == (0, 0, 0, 128)


@pytest.mark.parametrize(
    "fields",
    [
        {"max_window_layers": 3},
        {"max_window_layers": 3, "use_sliding_window": False},
        {"sliding_window": 50},
        {"layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"], "sliding_window": 50},
    ],
)
@pytest.mark.parametrize("base", [QWEN2, QWEN3], ids=["qwen2", "qwen3"])
def test_windows_of_qwen_are_those_of_transformers(base: dict[str, Any], fields: dict[str, Any]) -> None:
    from transformers import AutoConfig

    fields = {"use_sliding_window": True} | fields
    config, _ = resolve(base | fields, "config.json")
    reference = AutoConfig.for_model(**(base | fields))
    kinds = reference.layer_types if base is QWEN2 else ["sliding_attention"] * 4
    expected = tuple((reference.sliding_window or 0) if kind == "sliding_attention" else 0 for kind in kinds)
    assert tuple(config.window(layer) for layer in range(4)) == expected
    assert any(expected) == fields["use_sliding_window"]


def test_packed_weights_are_read_where_the_family_has_them() -> None:
    assert resolve(GPT_OSS | {"quantization_config": {"quant_method": "mxfp4"}}, "config.json")[0].expert_bias


def test_the_other_name_of_the_number_of_experts() -> None:
    renamed = {name.replace("num_experts", "num_local_experts") if name == "num_experts" else name: v for name, v in QWEN3.items()}
    assert resolve(renamed, "config.json")[0].num_experts == 8


@pytest.mark.parametrize(
    ("base", "change", "message"),
    [
        (
            QWEN3,
            {"model_type": "gpt2"},
            "model_type 'gpt2' is not supported; supported are deepseek, deepseek_v2, gpt_oss, granitemoe",
        ),
        (QWEN3, {"quantization_config": {"quant_method": "gptq"}}, "quantization_config has quant_method 'gptq'; give the checkpoint"),
        (GPT_OSS, {"quantization_config": {"quant_method": "fp8"}}, "quantization_config has quant_method 'fp8'; supported is 'mxfp4'"),
        (
            GPT_OSS,
            {"layer_types": ["full_attention"]},
            "layer_types must list 'sliding_attention' or 'full_attention' for each of 4",
        ),
        (MIXTRAL, {"sliding_window": -1}, "sliding_window is -1, but must be an integer from 0"),
        (DEEPSEEK, {"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid'; supported is 'softmax'"),
        (DEEPSEEK, {"first_k_dense_replace": 4}, "first_k_dense_replace leaves no layer with experts"),
        (DEEPSEEK2, {"topk_method": "noaux_tc"}, "topk_method is 'noaux_tc'; supported are 'greedy' and 'group_limited_greedy'"),
        (DEEPSEEK2, {"n_group": 3}, "n_group is 3, but must divide n_routed_experts = 8"),
        (DEEPSEEK2, {"n_group": 8, "topk_group": 1}, "topk_group is 1: groups of 1 experts hold fewer than num_experts_per_tok = 2"),
        (DEEPSEEK2, {"num_key_value_heads": 1}, "num_key_value_heads is 1, but must be num_attention_heads = 2"),
        (DEEPSEEK2, {"kv_lora_rank": 48}, "kv_lora_rank is 48, but must be a multiple of 32"),
        (QWEN3, {"hidden_size": 80}, "hidden_size is 80, but must be a multiple of 32"),
        (QWEN3, {"head_dim": 48}, "head_dim is 48, but must be a multiple of 32"),
        (QWEN3, {"moe_intermediate_size": 100}, "moe_intermediate_size is 100, but must be a multiple of 32"),
        (QWEN3, {"intermediate_size": 100}, "intermediate_size is 100, but must be a multiple of 32"),
        (QWEN2, {"shared_expert_intermediate_size": 100}, "shared_expert_intermediate_size is 100, but must be a multiple of 32"),
        (QWEN3, {"num_attention_heads": 3, "num_key_value_heads": 2}, "num_attention_heads is 3, but must be a multiple of"),
        (QWEN3, {"num_experts_per_tok": 9}, "num_experts_per_tok is 9, more than num_experts = 8"),
        (QWEN3, {"num_experts": "8"}, "num_experts is '8', but must be an integer from 1 to 4096"),
        (QWEN3, {"eos_token_id": 100}, "eos_token_id is 100, but must be null, a token id below vocab_size = 100"),
        (QWEN2, {"use_sliding_window": True, "sliding_window": -4}, "sliding_window is -4, but must be an integer from 0"),
        (QWEN3, {"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported is 'silu'"),
        (QWEN3, {"rope_scaling": {"rope_type": "longrope"}}, "rope_scaling has type 'longrope'; supported are 'default', 'linear', 'lla"),
        (QWEN3, {"rope_scaling": [4]}, "rope_scaling is [4], but must be an object or null"),
        (QWEN3, {"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is None, but must be a number from 1 to 1e+06"),
        (QWEN3, {"rope_scaling": LLAMA3}, "rope_scaling.low_freq_factor is 4, but must be below high_freq_factor = 1"),
        (QWEN3, {"rope_theta": "big"}, "rope_theta is 'big', but must be a number"),
        (QWEN3, {"mlp_only_layers": [0, 1, 2, 3]}, "mlp_only_layers leaves no layer with experts"),
    ],
)
def test_what_the_decoder_lacks_is_refused(base: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(CFMoEError) as refused:
        resolve(base | change, "dir/config.json")
    assert message in str(refused.value)
    assert str(refused.value).startswith("dir/config.json: ")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
        {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        {"rope_type": "yarn", "factor": 40.0, "mscale": 0.707, "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096},
        {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.3, "original_max_position_embeddings": 64},
    ],
    ids=lambda p: p["rope_type"],
)
@pytest.mark.parametrize("place", ["rope_parameters", "rope_scaling"])
def test_rotary_embeddings_are_those_of_transformers(parameters: dict[str, Any], place: str) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    context, theta, width = 163840, 150000.0, 64
    reference = LlamaConfig(
        hidden_size=128,
        num_attention_heads=2,
        head_dim=width,
        max_position_embeddings=context,
        rope_parameters=parameters | {"rope_theta": theta},
    )
    kind = parameters["rope_type"]
    make = LlamaRotaryEmbedding.compute_default_rope_parameters if kind == "default" else ROPE_INIT_FUNCTIONS[kind]
    expected, amplitude = make(reference)
    # Older checkpoints keep the base and the scaling apart.
    where = {place: parameters | {"rope_theta": theta}} if place == "rope_parameters" else {place: parameters, "rope_theta": theta}
    rope = resolve(QWEN3 | {"max_position_embeddings": context} | where, "config.json")[0].rope
    np.testing.assert_allclose(rope.inverse_frequencies(width), expected.numpy(), rtol=1e-6)
    assert rope.amplitude == pytest.approx(amplitude)

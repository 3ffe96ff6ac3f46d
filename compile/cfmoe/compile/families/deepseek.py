"""DeepSeek-MoE (plain attention) and DeepSeek-V2 (latent attention, grouped routing): dense first layers, shared experts without a gate."""

from __future__ import annotations

from typing import Any

from cfmoe.compile.decoder_config import DecoderConfig, LatentAttention
from cfmoe.compile.families.base import ConfigReader, Family, WeightNames
from cfmoe.compile.rope import yarn_mscale


def _experts(c: ConfigReader, layers: int, **own: Any) -> dict[str, Any]:
    """Routed and shared experts and the layers that have them, as DecoderConfig arguments."""
    routed = c.experts("moe_intermediate_size", count_field="n_routed_experts", **own)
    first = c.integer("first_k_dense_replace", 0, low=0, high=layers)
    every = c.integer("moe_layer_freq", 1, high=1024)
    moe_layers = tuple(i for i in range(first, layers) if i % every == 0)
    if not moe_layers:
        raise c.fail("first_k_dense_replace", "leaves no layer with experts: this is not a Mixture-of-Experts model")
    shared = 0 if c.config.get("n_shared_experts") is None else c.integer("n_shared_experts", low=0, high=1024)
    return {
        **routed,
        "moe_layers": moe_layers,
        "dense_ffn_size": c.width("intermediate_size") if len(moe_layers) < layers else 0,
        "shared_ffn_size": shared * routed["expert_ffn_size"],
    }


def _v1(c: ConfigReader) -> DecoderConfig:
    c.require("attention_bias", False, False)
    c.require("scoring_func", "softmax", "softmax")
    common = c.common()
    return DecoderConfig(family="deepseek", **common, **_experts(c, common["num_layers"]))


def _v2(c: ConfigReader) -> DecoderConfig:
    c.require("attention_bias", False, False)
    c.require("mlp_bias", False, False)
    c.require("scoring_func", "softmax", "softmax")
    c.require("norm_topk_prob", False, False)
    latent = LatentAttention(
        kv_rank=c.width("kv_lora_rank"),
        q_rank=0 if c.config.get("q_lora_rank") is None else c.width("q_lora_rank"),
        rope=c.width("qk_rope_head_dim", high=1024),
        nope=c.width("qk_nope_head_dim", high=1024),
        value=c.width("v_head_dim", high=1024),
    )
    common = c.common(head_dim=latent.rope + latent.nope)
    heads, layers, rope = common["num_heads"], common["num_layers"], common["rope"]
    if common["num_kv_heads"] != heads:
        raise c.fail("num_key_value_heads", f"is {common['num_kv_heads']}, but must be num_attention_heads = {heads}")
    scale = common["head_dim"] ** -0.5
    if rope.kind != "default" and rope.mscale_all_dim:
        scale *= yarn_mscale(rope.factor, rope.mscale_all_dim) ** 2
    experts = _experts(c, layers, renormalise=False)
    return DecoderConfig(
        family="deepseek_v2",
        **common,
        **experts,
        **_groups(c, experts["num_experts"], experts["top_k"]),
        latent=latent,
        softmax_scale=scale,
        router_scale=c.number("routed_scaling_factor", 1.0, low=1e-6, high=1e6),
    )


def _groups(c: ConfigReader, experts: int, top_k: int) -> dict[str, Any]:
    method = c.config.get("topk_method", "greedy")
    if method == "greedy":
        return {}
    if method != "group_limited_greedy":
        raise c.fail("topk_method", f"is {method!r}; supported are 'greedy' and 'group_limited_greedy'")
    groups = c.integer("n_group", high=experts)
    if experts % groups:
        raise c.fail("n_group", f"is {groups}, but must divide n_routed_experts = {experts}")
    top_groups = c.integer("topk_group", high=groups)
    if top_groups * (experts // groups) < top_k:
        raise c.fail("topk_group", f"is {top_groups}: groups of {experts // groups} experts hold fewer than num_experts_per_tok = {top_k}")
    return {"router_groups": groups, "router_top_groups": top_groups}


NAMES = WeightNames(shared="model.layers.{l}.mlp.shared_experts.{part}_proj.weight")
V1 = Family("deepseek", _v1, NAMES)
V2 = Family("deepseek_v2", _v2, NAMES)

"""Qwen3-MoE: norms over each head of q and k, no biases, renormalised softmax router."""

from cfmoe.compile.decoder_config import DecoderConfig
from cfmoe.compile.families.base import ConfigReader, Family


def _configure(c: ConfigReader) -> DecoderConfig:
    c.require("use_sliding_window", False, False)
    common = c.common()
    moe_layers = c.moe_layers(common["num_layers"])
    return DecoderConfig(
        family="qwen3_moe",
        **common,
        **c.experts("num_experts" if "num_experts" in c.config else "num_local_experts", "moe_intermediate_size"),
        moe_layers=moe_layers,
        router_renormalise=c.boolean("norm_topk_prob", False),
        qk_norm="head",
        qkv_bias=c.boolean("attention_bias", False),
        dense_ffn_size=c.integer("intermediate_size", low=32) if len(moe_layers) < common["num_layers"] else 0,
    )


FAMILY = Family("qwen3_moe", _configure)

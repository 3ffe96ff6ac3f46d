"""Qwen2-MoE: attention biases and a shared expert behind a sigmoid gate."""

from cfmoe.compile.decoder_config import DecoderConfig
from cfmoe.compile.families.base import ConfigReader, Family


def _configure(c: ConfigReader) -> DecoderConfig:
    c.require("use_sliding_window", False, False)
    common = c.common()
    moe_layers = c.moe_layers(common["num_layers"])
    return DecoderConfig(
        family="qwen2_moe",
        **common,
        **c.experts("num_experts" if "num_experts" in c.config else "num_local_experts", "moe_intermediate_size"),
        moe_layers=moe_layers,
        router_renormalise=c.boolean("norm_topk_prob", False),
        qkv_bias=c.boolean("qkv_bias", True),
        dense_ffn_size=c.integer("intermediate_size", low=32) if len(moe_layers) < common["num_layers"] else 0,
        shared_ffn_size=c.integer("shared_expert_intermediate_size", low=32),
        shared_gate=True,
    )


FAMILY = Family("qwen2_moe", _configure)

"""gpt-oss: attention sinks, sliding windows on every other layer, biases everywhere, clamped swiglu, experts in MXFP4 or bf16."""

from __future__ import annotations

from cfmoe.compile.decoder_config import ClampedSwiglu, DecoderConfig
from cfmoe.compile.families.base import ConfigReader, Family, WeightNames


def _configure(c: ConfigReader) -> DecoderConfig:
    common = c.common(rope_theta=150000.0, rms_norm_eps=1e-5)
    bias = c.boolean("attention_bias", True)
    layers = common["num_layers"]
    return DecoderConfig(
        family="gpt_oss",
        **common,
        **c.experts("intermediate_size", renormalise=True),
        moe_layers=tuple(range(layers)),
        qkv_bias=bias,
        o_bias=bias,
        sinks=True,
        windows=c.windows_by_layer(layers, c.window(128), lambda layer: layer % 2 == 0),
        router_bias=True,
        expert_bias=True,
        expert_swiglu=ClampedSwiglu(
            alpha=c.number("swiglu_alpha", 1.702, low=1e-3, high=1e3), limit=c.number("swiglu_limit", 7.0, low=1e-3, high=1e6)
        ),
    )


NAMES = WeightNames(router="model.layers.{l}.mlp.router", fused_transposed=True)
FAMILY = Family("gpt_oss", _configure, NAMES, packed_weights="mxfp4")

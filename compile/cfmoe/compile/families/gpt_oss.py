"""gpt-oss: attention sinks, sliding windows on every other layer, biases everywhere, clamped swiglu, experts in MXFP4 or bf16."""

from __future__ import annotations

from cfmoe.compile.decoder_config import ClampedSwiglu, DecoderConfig
from cfmoe.compile.families.base import ConfigReader, Family, WeightNames


def _windows(c: ConfigReader, layers: int) -> tuple[int, ...]:
    kinds = c.config.get("layer_types")
    if kinds is None:
        kinds = ["sliding_attention" if i % 2 == 0 else "full_attention" for i in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers or not set(kinds) <= {"sliding_attention", "full_attention"}:
        raise c.fail("layer_types", f"must list 'sliding_attention' or 'full_attention' for each of {layers} layers")
    window = c.window()
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


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
        windows=_windows(c, layers),
        router_bias=True,
        expert_bias=True,
        expert_swiglu=ClampedSwiglu(
            alpha=c.number("swiglu_alpha", 1.702, low=1e-3, high=1e3), limit=c.number("swiglu_limit", 7.0, low=1e-3, high=1e6)
        ),
    )


NAMES = WeightNames(router="model.layers.{l}.mlp.router", fused_transposed=True)
FAMILY = Family("gpt_oss", _configure, NAMES, packed_weights="mxfp4")

"""Qwen2-MoE (attention biases, a shared expert behind a sigmoid gate) and Qwen3-MoE (norms over each head of q and k, no shared expert)."""

from __future__ import annotations

from typing import Any

from cfmoe.compile.decoder_config import DecoderConfig
from cfmoe.compile.families.base import ConfigReader, Family


def _configure(family: str, c: ConfigReader, **own: Any) -> DecoderConfig:
    """What both share, with the fields `own` to one of them."""
    c.require("use_sliding_window", False, False)
    common = c.common()
    moe_layers = c.moe_layers(common["num_layers"])
    return DecoderConfig(
        family=family,
        **common,
        **c.experts("moe_intermediate_size"),
        moe_layers=moe_layers,
        dense_ffn_size=c.width("intermediate_size") if len(moe_layers) < common["num_layers"] else 0,
        **own,
    )


def _qwen2(c: ConfigReader) -> DecoderConfig:
    shared = c.width("shared_expert_intermediate_size")
    return _configure("qwen2_moe", c, qkv_bias=c.boolean("qkv_bias", True), shared_ffn_size=shared, shared_gate=True)


def _qwen3(c: ConfigReader) -> DecoderConfig:
    return _configure("qwen3_moe", c, qkv_bias=c.boolean("attention_bias", False), qk_norm="head")


QWEN2 = Family("qwen2_moe", _qwen2)
QWEN3 = Family("qwen3_moe", _qwen3)

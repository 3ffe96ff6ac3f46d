"""Qwen2-MoE (attention biases, a shared expert behind a sigmoid gate) and Qwen3-MoE (norms over each head of q and k, no shared expert)."""

from __future__ import annotations

from typing import Any

from cfmoe.compile.decoder_config import DecoderConfig
from cfmoe.compile.families.base import ConfigReader, Family

_WINDOW = 4096  # tokens, where a checkpoint that uses a sliding window does not say


def _configure(family: str, c: ConfigReader, **own: Any) -> DecoderConfig:
    """What both share, with the fields `own` to one of them."""
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
    layers = c.integer("num_hidden_layers", high=1024)
    windows: tuple[int, ...] = ()
    if c.boolean("use_sliding_window", False):
        # Every other layer of the first max_window_layers, as transformers has it.
        most = c.integer("max_window_layers", 28, low=0)
        windows = c.windows_by_layer(layers, c.window(_WINDOW), lambda layer: layer % 2 == 0 and layer < most)
    shared = c.width("shared_expert_intermediate_size")
    bias = c.boolean("qkv_bias", True)
    return _configure("qwen2_moe", c, qkv_bias=bias, shared_ffn_size=shared, shared_gate=True, windows=windows)


def _qwen3(c: ConfigReader) -> DecoderConfig:
    # All layers have the window or none: transformers reads no max_window_layers here.
    windows = (c.window(_WINDOW),) * c.integer("num_hidden_layers", high=1024) if c.boolean("use_sliding_window", False) else ()
    return _configure("qwen3_moe", c, qkv_bias=c.boolean("attention_bias", False), qk_norm="head", windows=windows)


QWEN2 = Family("qwen2_moe", _qwen2)
QWEN3 = Family("qwen3_moe", _qwen3)

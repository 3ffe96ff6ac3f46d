"""Granite MoE: Mixtral's shape with constant multipliers, which are folded into weights."""

from cfmoe.compile.decoder_config import DecoderConfig
from cfmoe.compile.families.base import ConfigReader, Family, WeightNames


def _configure(c: ConfigReader) -> DecoderConfig:
    c.require("attention_bias", False, False)
    common = c.common()

    def multiplier(field: str) -> float:
        return c.number(field, 1.0, low=1e-6, high=1e6)

    return DecoderConfig(
        family="granitemoe",
        **common,
        **c.experts("intermediate_size", renormalise=True),
        moe_layers=tuple(range(common["num_layers"])),
        softmax_scale=multiplier("attention_multiplier"),
        router_scale=multiplier("residual_multiplier"),
        embedding_multiplier=multiplier("embedding_multiplier"),
        residual_multiplier=multiplier("residual_multiplier"),
        logits_divisor=multiplier("logits_scaling"),
    )


NAMES = WeightNames(
    router="model.layers.{l}.block_sparse_moe.router.layer",
    fused_gate_up="model.layers.{l}.block_sparse_moe.input_linear.weight",
    fused_down="model.layers.{l}.block_sparse_moe.output_linear.weight",
)
FAMILY = Family("granitemoe", _configure, NAMES)

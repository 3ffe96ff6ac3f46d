"""Mixtral: few large experts, weights renormalised over the chosen ones."""

from cfmoe.compile.decoder_config import DecoderConfig
from cfmoe.compile.families.base import ConfigReader, Family, WeightNames


def _configure(c: ConfigReader) -> DecoderConfig:
    common = c.common(rope_theta=1e6, rms_norm_eps=1e-5)
    layers = common["num_layers"]
    window = c.window()
    return DecoderConfig(
        family="mixtral",
        **common,
        **c.experts("intermediate_size", renormalise=True),
        moe_layers=tuple(range(layers)),
        windows=(window,) * layers if window else (),
    )


NAMES = WeightNames(
    router="model.layers.{l}.block_sparse_moe.gate",
    expert="model.layers.{l}.block_sparse_moe.experts.{e}.{part}.weight",
    parts=("w1", "w3", "w2"),
)
FAMILY = Family("mixtral", _configure, NAMES)

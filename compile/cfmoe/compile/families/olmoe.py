"""OLMoE: norms over the whole q and k vectors."""

from cfmoe.compile.decoder_config import DecoderConfig
from cfmoe.compile.families.base import ConfigReader, Family


def _configure(c: ConfigReader) -> DecoderConfig:
    c.require("attention_bias", False, False)
    c.require("clip_qkv", None, None)
    common = c.common()
    return DecoderConfig(
        family="olmoe",
        **common,
        **c.experts("intermediate_size"),
        moe_layers=tuple(range(common["num_layers"])),
        qk_norm="vector",
    )


FAMILY = Family("olmoe", _configure)

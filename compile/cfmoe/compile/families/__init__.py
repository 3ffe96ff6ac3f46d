"""The table of model families: each reads a Hugging Face configuration and names its tensors."""

from __future__ import annotations

from typing import Any

from cfmoe.compile.decoder_config import DecoderConfig
from cfmoe.compile.families import deepseek, gpt_oss, granite_moe, mixtral, olmoe, qwen_moe
from cfmoe.compile.families.base import ConfigReader, Family, WeightNames
from cfmoe.errors import CFMoEError

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        deepseek.V1,
        deepseek.V2,
        gpt_oss.FAMILY,
        granite_moe.FAMILY,
        mixtral.FAMILY,
        olmoe.FAMILY,
        qwen_moe.QWEN2,
        qwen_moe.QWEN3,
    )
}


def resolve(config: dict[str, Any], path: str) -> tuple[DecoderConfig, WeightNames]:
    """The decoder's parameters and the tensor names for config.json at `path`. Raises CFMoEError where the family is not supported."""
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise CFMoEError(f"{path}: model_type {kind!r} is not supported; supported are {', '.join(sorted(FAMILIES))}")
    family = FAMILIES[kind]
    quantised = config.get("quantization_config")
    method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
    if method not in (None, family.packed_weights):
        remedy = f"supported is {family.packed_weights!r}" if family.packed_weights else "give the checkpoint with plain weights"
        raise CFMoEError(f"{path}: quantization_config has quant_method {method!r}; {remedy}")
    return family.configure(ConfigReader(config, path)), family.names

"""The table of model families: each reads a Hugging Face configuration and names its tensors."""

from __future__ import annotations

from typing import Any

from cfmoe.compile.decoder_config import DecoderConfig
from cfmoe.compile.families import olmoe, qwen_moe
from cfmoe.compile.families.base import ConfigReader, Family, WeightNames
from cfmoe.errors import CFMoEError

FAMILIES: dict[str, Family] = {family.model_type: family for family in (qwen_moe.QWEN3, qwen_moe.QWEN2, olmoe.FAMILY)}


def resolve(config: dict[str, Any], path: str) -> tuple[DecoderConfig, WeightNames]:
    """The decoder's parameters and the tensor names for config.json at `path`. Raises CFMoEError where the family is not supported."""
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise CFMoEError(f"{path}: model_type {kind!r} is not supported; supported are {', '.join(sorted(FAMILIES))}")
    family = FAMILIES[kind]
    return family.configure(ConfigReader(config, path)), family.names

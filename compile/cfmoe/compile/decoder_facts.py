"""The decoder's configuration as a JSON object of the manifest: what kernels for further targets can be compiled from."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import types
import typing
from importlib import metadata
from pathlib import Path
from typing import Any

from cfmoe.compile.decoder_config import DecoderConfig, Quantisation
from cfmoe.compile.rope import KINDS
from cfmoe.errors import CFMoEError

_LARGEST = 1 << 24  # above any size of a model


def record(config: DecoderConfig) -> dict[str, Any]:
    """Plain JSON values; `restore` gives the equal configuration."""
    return dataclasses.asdict(config)


def kernel_set(config: DecoderConfig, quantisation: Quantisation, chunk: int, target: str) -> str:
    """The name of the kernels for `target`, a CPU's: a digest of all that they are made from, the compiler's own code included.

    Not of what comes out, for how TVM and LLVM order and name things depends on what the process did before.
    """
    facts = record(config)
    for name in ("family", "bos_token_id", "eos_token_ids"):
        del facts[name]
    made_from = [facts, quantisation.classes, quantisation.kv_dtype, chunk, target, metadata.version("apache-tvm")]
    digest = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode())
    root = Path(__file__).parent
    for source in sorted(root.rglob("*.py")):
        if not source.is_relative_to(root / "codegen") and not source.is_relative_to(root / "kernels" / "gpu"):
            digest.update(source.read_bytes())
    return digest.hexdigest()


def restore(value: object, source: str) -> DecoderConfig:
    """The configuration that `record` wrote. `source` is the file that it comes from.

    Raises CFMoEError naming the field where a value is missing, of the wrong type or out of range.
    """
    config = _restore(DecoderConfig, value, source, "decoder")
    if config.rope.kind not in KINDS:
        raise _wrong(source, "decoder.rope.kind", config.rope.kind)
    return typing.cast(DecoderConfig, config)


def _wrong(source: str, name: str, value: object) -> CFMoEError:
    return CFMoEError(f"{source}: {name} is {value!r}, which no decoder has; compile the model again with this version")


def _restore(kind: Any, value: object, source: str, name: str) -> Any:
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        if not isinstance(value, dict) or set(value) != set(hints):
            raise _wrong(source, name, sorted(value) if isinstance(value, dict) else value)
        return typing.cast(Any, kind)(**{key: _restore(hints[key], value[key], source, f"{name}.{key}") for key in hints})
    if isinstance(kind, types.UnionType):
        (some,) = (option for option in typing.get_args(kind) if option is not types.NoneType)
        return None if value is None else _restore(some, value, source, name)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list) or len(value) > _LARGEST:
            raise _wrong(source, name, value)
        return tuple(_restore(typing.get_args(kind)[0], item, source, name) for item in value)
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    if kind is int and isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _LARGEST:
        return value
    if (kind is bool and isinstance(value, bool)) or (kind is str and isinstance(value, str)):
        return value
    raise _wrong(source, name, value)

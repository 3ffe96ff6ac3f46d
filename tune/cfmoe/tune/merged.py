"""Writes a checkpoint with adapters added to it: an ordinary Hugging Face directory, as the one that it came from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from cfmoe.errors import CFMoEError, os_error
from cfmoe.tune.checkpoint import DTYPES, load_model
from cfmoe.tune.elastic import load_adapter, merge
from cfmoe.tune.output import staged


def save_merged(model: Path, adapters: Path | Sequence[Path], out: Path, scale: float = 1.0) -> None:
    """Writes the checkpoint `model` with an adapter added: the same files, tensors, shapes and type, other weights.

    Of several adapters the mean of what they change is added, `scale` times: Wortsman et al., Model soups (arXiv:2203.05482).
    Raises CFMoEError where transformers would write other tensors than `model` has, which nothing could take for the same family.
    """
    paths = [adapters] if isinstance(adapters, Path) else list(adapters)
    kind, place = _stored_type(model), torch.device("cpu")
    if len(paths) == 1 and scale == 1:
        merged = merge(load_adapter(load_model(model, place, kind), paths[0]))
    else:
        merged = load_model(model, place, kind)
        start = {name: value.float() for name, value in merged.state_dict().items()}
        change = {name: torch.zeros_like(value) for name, value in start.items()}
        for path in paths:
            tuned = merge(load_adapter(load_model(model, place, "float32"), path)).state_dict()
            for name, value in tuned.items():
                change[name] += (value - start[name]) / len(paths)
        merged.load_state_dict({name: (value + scale * change[name]).to(DTYPES[kind]) for name, value in start.items()})
    with staged(out, True, "config.json") as beside:
        try:
            merged.save_pretrained(str(beside))
            for path in beside.iterdir():
                if not _is_weights(path):
                    path.unlink()
            for path in model.iterdir():
                if path.is_file() and not _is_weights(path) and path.suffix not in (".bin", ".pt", ".pth", ".gguf"):
                    shutil.copy2(path, beside / path.name)
        except OSError as error:
            raise os_error(error, out, "write") from error
        _check_same_tensors(model, beside)


def _is_weights(path: Path) -> bool:
    return path.name.endswith((".safetensors", ".safetensors.index.json"))


def _stored_type(model: Path) -> str:
    config = json.loads((model / "config.json").read_text())
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    return name if name in DTYPES else "float32"


def _check_same_tensors(one: Path, other: Path) -> None:
    first, second = _shapes(one), _shapes(other)
    if different := sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name)):
        raise CFMoEError(
            f"{one}: transformers writes {different[0]} as {second.get(different[0])} where the checkpoint has {first.get(different[0])} "
            f"({len(different)} such tensors); convert the checkpoint with save_pretrained first"
        )


def _shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import safe_open

    shapes = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            shapes.update({name: tuple(file.get_slice(name).get_shape()) for name in file.keys()})  # noqa: SIM118
    return shapes

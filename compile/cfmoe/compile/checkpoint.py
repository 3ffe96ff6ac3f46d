"""Reads a Hugging Face checkpoint directory, one tensor at a time. Only safetensors: nothing is ever unpickled."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy, which safetensors returns)
import numpy as np
from safetensors import SafetensorError, safe_open

from cfmoe.errors import CFMoEError, os_error

_MAX_JSON = 64 << 20


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`. Raises CFMoEError where it is absent, too large or not a JSON object."""
    try:
        if path.stat().st_size > _MAX_JSON:
            raise CFMoEError(f"{path}: is larger than {_MAX_JSON} bytes, which no such file is; check the checkpoint")
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise os_error(error, path, "read") from error
    except (ValueError, RecursionError) as error:
        raise CFMoEError(f"{path}: is not valid JSON ({error}); fetch the checkpoint again") from error
    if not isinstance(value, dict):
        raise CFMoEError(f"{path}: holds {type(value).__name__}, but must hold a JSON object")
    return value


_REMEDY = "give the directory of a Hugging Face checkpoint (config.json and *.safetensors)"


class Checkpoint:
    """`tensors` maps every tensor to its file. Shapes are checked when a tensor is read."""

    def __init__(self, directory: Path) -> None:
        if not directory.is_dir():
            raise CFMoEError(f"{directory}: is not a directory; {_REMEDY}")
        if not (directory / "config.json").exists():
            what = "is compiled already: an artifact" if (directory / "manifest.json").exists() else "has no config.json"
            raise CFMoEError(f"{directory}: {what}; {_REMEDY}")
        self.directory = directory
        self.config = read_json(directory / "config.json")
        self.tensors = self._locate()

    def _locate(self) -> dict[str, Path]:
        index = self.directory / "model.safetensors.index.json"
        if index.exists():
            mapping = read_json(index).get("weight_map")
            if not isinstance(mapping, dict) or not all(isinstance(v, str) and Path(v).name == v for v in mapping.values()):
                raise CFMoEError(f"{index}: weight_map must map tensor names to file names of the same directory")
            return {name: self.directory / file for name, file in mapping.items()}
        files = sorted(self.directory.glob("*.safetensors"))
        if not files:
            pickled = sorted(p.name for p in self.directory.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
            remedy = f"{pickled[0]} is a pickle, which is never read: convert it to safetensors" if pickled else _REMEDY
            raise CFMoEError(f"{self.directory}: holds no *.safetensors file; {remedy}")
        return {name: file for file in files for name in self._names(file)}

    def _names(self, file: Path) -> list[str]:
        with self._reading(file), safe_open(file, framework="numpy") as reader:
            return list(reader.keys())

    @contextmanager
    def _reading(self, file: Path) -> Iterator[None]:
        try:
            yield
        except SafetensorError as error:
            raise CFMoEError(f"{file}: is damaged or not a safetensors file ({error}); fetch it again") from error
        except OSError as error:
            raise os_error(error, file, "read") from error

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def read(
        self, name: str, shape: tuple[int, ...], index: int | None = None, types: tuple[str, ...] = ("F32", "F16", "BF16")
    ) -> np.ndarray:
        """Tensor `name` of `shape` in its stored type, one of `types`; with `index`, only that slice of the first dimension.

        Raises CFMoEError where it is missing or its shape contradicts config.json.
        """
        if name not in self.tensors:
            raise CFMoEError(
                f"{self.directory}: tensor {name} is missing; the checkpoint is incomplete or of another family than config.json says"
            )
        file = self.tensors[name]
        with ExitStack() as stack:
            stack.enter_context(self._reading(file))
            reader = stack.enter_context(safe_open(file, framework="numpy"))
            part = reader.get_slice(name)
            found = tuple(part.get_shape())
            if found != shape:
                raise CFMoEError(f"{file}: tensor {name} has shape {list(found)}, but config.json implies {list(shape)}")
            kind = part.get_dtype()
            if kind not in types:
                raise CFMoEError(f"{file}: tensor {name} has type {kind}; supported here: {', '.join(types)}")
            return np.asarray(part[index] if index is not None else part[:])

"""Import of routing that was saved as a list of one array (batch, seq, top_k) per layer, the layout usual in research code."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cfmoe.errors import CFMoEError, os_error
from cfmoe.trace.trace import MAX_LAYERS, Trace, id_type, window_segments

_MASK = "attention_mask"


def trace_from_layers(
    layers: Sequence[Any],  # per layer (batch, seq, top_k) integers: numpy arrays, torch tensors, nested lists
    experts: int,
    attention_mask: Any = None,  # (batch, seq): 0 for padding, on whichever side
    prompt_tokens: int = 0,
    where: Path | str = "the routing",
) -> Trace:
    """The trace of a batch, each row a sample: its first `prompt_tokens` tokens prefill, the others decode; padding is left out.

    Raises CFMoEError where the layers are not of one shape, ids are no integers, or a row is nothing but padding.
    """
    arrays = [_integers(layer, f"{where}: layer {number}") for number, layer in enumerate(layers)]
    if not 1 <= len(arrays) <= MAX_LAYERS:
        raise CFMoEError(f"{where} has {len(arrays)} layers, not between 1 and {MAX_LAYERS}")
    for number, array in enumerate(arrays):
        if array.ndim != 3 or array.shape != arrays[0].shape:
            raise CFMoEError(f"{where}: layer {number} has the shape {array.shape}; all layers must have one shape (batch, seq, top_k)")
    low, high = min(array.min(initial=0) for array in arrays), max(array.max(initial=0) for array in arrays)
    if low < 0 or high >= experts:
        raise CFMoEError(f"{where}: expert {low if low < 0 else high} is not one of {experts} experts; give the right number of experts")
    stacked = np.stack(arrays, axis=2).astype(id_type(experts))  # (batch, seq, layers, top_k)
    valid = np.ones(stacked.shape[:2], bool) if attention_mask is None else _mask(attention_mask, stacked.shape[:2], where)
    lengths = valid.sum(1).tolist()
    if 0 in lengths:
        raise CFMoEError(f"{where}: row {lengths.index(0)} has no token; leave it out")
    try:
        segments = tuple(segment for length in lengths for segment in window_segments(length, prompt_tokens))
        return Trace(stacked[valid], segments, experts)
    except CFMoEError as error:
        raise CFMoEError(f"{where}: {error}") from error


def load_layers(path: Path, experts: int, prompt_tokens: int = 0) -> Trace:
    """The trace in a file of `torch.save` (.pt, .pth) or `numpy.savez` (.npz). Nothing but arrays is ever unpickled.

    A .pt file holds the list of tensors, or {"layers": list, "attention_mask": tensor}; a .npz file holds the layers in their order
    (`numpy.savez(path, *layers)`), and may hold `attention_mask`. Raises CFMoEError where it holds anything else.
    """
    if path.suffix in (".pt", ".pth"):
        layers, mask = _load_torch(path)
    elif path.suffix == ".npz":
        layers, mask = _load_numpy(path)
    else:
        raise CFMoEError(f"{path} is neither .pt, .pth nor .npz; save it by torch.save or numpy.savez")
    return trace_from_layers(layers, experts, mask, prompt_tokens, where=path)


def _load_torch(path: Path) -> tuple[Sequence[Any], Any]:
    try:
        import torch
    except ImportError as error:
        raise CFMoEError(f"reading {path} needs the package torch; install cfmoe[tune], or save it by numpy.savez") from error
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise os_error(error, path, "read") from error
    except Exception as error:  # of many kinds: UnpicklingError, RuntimeError, EOFError, …
        reason = " ".join(str(error).split())[:200]
        raise CFMoEError(f"{path} cannot be read as tensors only: {reason}; save a list of tensors by torch.save") from error
    mask = None
    if isinstance(value, dict):
        mask = value.get(_MASK)
        value = value.get("layers")
    if not isinstance(value, list | tuple | torch.Tensor):
        raise CFMoEError(f'{path} holds neither a list of tensors nor {{"layers": list, "{_MASK}": tensor}}; save one of them')
    return list(value), mask


def _load_numpy(path: Path) -> tuple[Sequence[Any], Any]:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except OSError as error:
        raise os_error(error, path, "read") from error
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise CFMoEError(f"{path} cannot be read as arrays only: {error}; save the layers by numpy.savez") from error
    mask = arrays.pop(_MASK, None)
    return list(arrays.values()), mask


def _array(value: Any, where: str) -> np.ndarray:
    try:
        return np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
    except (TypeError, ValueError) as error:
        raise CFMoEError(f"{where} is not an array: {error}") from error


def _integers(value: Any, where: str) -> np.ndarray:
    array = _array(value, where)
    if array.dtype.kind not in "iu":
        raise CFMoEError(f"{where} is {array.dtype}, but expert ids are integers")
    return array


def _mask(value: Any, shape: tuple[int, ...], where: Path | str) -> np.ndarray:
    mask = _array(value, f"{where}: {_MASK}")
    if mask.shape != shape or not np.isin(mask, (0, 1)).all():
        raise CFMoEError(f"{where}: {_MASK} is not zeros and ones of the shape {shape} (batch, seq)")
    return mask.astype(bool)

"""Packs weight matrices into the block layouts of docs/artifact-format.md."""

from __future__ import annotations

import functools
from collections.abc import Callable

import ml_dtypes
import numpy as np
import tvm
import tvm_ffi

from cfmoe.compile.kernels.builder import GROUP, TILE
from cfmoe.compile.kernels.matmul import FORMATS, padded
from cfmoe.compile.kernels.quantiser import quantiser

_WEIGHTS_AT_ONCE = 1 << 21  # packed together: bounds the temporaries


@functools.cache
def _quantiser(format_name: str, source: str) -> Callable[[object, object], None]:
    """The compiled kernel that packs weights of type `source` into blocks of `format_name` on this machine."""
    from cfmoe.compile import targets

    name = f"quantise_{format_name}_{source}"
    mod = tvm.IRModule({name: quantiser(name, format_name, source)})
    return tvm.compile(mod, target=targets.resolve("llvm").tvm_target())[name]


def _aligned(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """An uninitialised array at a 64-byte boundary, as kernels want it."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def pack(weight: np.ndarray, format_name: str) -> np.ndarray:
    """Packs `weight` (outputs, inputs) into blocks: (tiles, groups, block words) of the format's dtype. May run in several threads.

    Raises ValueError where the inputs are not a multiple of 32.
    """
    fmt = FORMATS[format_name]
    outputs, inputs = weight.shape
    if inputs % GROUP:
        raise ValueError(f"a matrix of {inputs} inputs cannot be packed: the inputs must be a multiple of {GROUP}")
    groups = inputs // GROUP
    tiles = padded(outputs) // TILE
    out = _aligned((tiles, groups, fmt.words), fmt.dtype)
    if fmt.quantised and weight.dtype == ml_dtypes.bfloat16:
        weight = weight.view(np.uint16)
    source = "uint16" if weight.dtype == np.uint16 else "float32"
    step = max(1, _WEIGHTS_AT_ONCE // (TILE * inputs))
    for first in range(0, tiles, step):
        rows = weight[first * TILE : (first + step) * TILE]
        count = padded(len(rows)) // TILE
        if not fmt.quantised:
            if len(rows) < count * TILE:
                rows = np.concatenate([rows, np.zeros((count * TILE - len(rows), inputs), rows.dtype)])
            blocks = out[first : first + count].reshape(count, groups, GROUP, TILE)
            blocks[...] = rows.reshape(count, TILE, groups, GROUP).transpose(0, 2, 3, 1)
            continue
        values = _aligned((count * TILE, inputs), source)
        values[: len(rows)] = rows
        values[len(rows) :] = 0
        target = out[first : first + count]
        kernel = _quantiser(format_name, source)
        kernel(tvm_ffi.from_dlpack(values.reshape(count, TILE, groups, GROUP)), tvm_ffi.from_dlpack(target))
    return out


def pack_interleaved(gate: np.ndarray, up: np.ndarray, format_name: str) -> np.ndarray:
    """Packs two matrices (outputs, inputs) of one shape with their blocks alternating, gate first."""
    return np.stack([pack(gate, format_name), pack(up, format_name)], axis=2)


def unpack(packed: np.ndarray, format_name: str, outputs: int, inputs: int) -> np.ndarray:
    """The inverse of `pack`: fp32 (outputs, inputs). For tests and exports."""
    fmt = FORMATS[format_name]
    groups, tiles = inputs // GROUP, padded(outputs) // TILE
    blocks = packed.reshape(tiles, groups, fmt.words)
    if not fmt.quantised:
        values = blocks.reshape(tiles, groups, GROUP, TILE).astype(np.float32)
    else:
        words = blocks[:, :, : GROUP // fmt.codes_per_word * TILE].view(np.uint32)
        if fmt.codes_per_word == 8:
            w = words.reshape(tiles, groups, 4, TILE)
            codes = np.stack([(w >> np.uint32(8 * b + 4 * n)) & np.uint32(15) for n in range(2) for b in range(4)], axis=3)
        else:
            w = words.reshape(tiles, groups, 8, TILE)
            codes = np.stack([(w >> np.uint32(8 * b)) & np.uint32(255) for b in range(4)], axis=3)
        # stacked on axis 3 the order is (tile, group, word, code, output)
        codes = codes.reshape(tiles, groups, GROUP, TILE).astype(np.float32) - fmt.zero
        scales = np.ascontiguousarray(blocks[:, :, GROUP // fmt.codes_per_word * TILE :]).view(np.float16)
        values = codes * scales.astype(np.float32)[:, :, None, :]
    return values.transpose(0, 3, 1, 2).reshape(tiles * TILE, inputs)[:outputs]

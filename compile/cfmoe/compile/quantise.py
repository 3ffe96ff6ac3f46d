"""Packs weight matrices into the block layouts of docs/artifact-format.md."""

from __future__ import annotations

import numpy as np

from cfmoe.compile.kernels.builder import GROUP, TILE
from cfmoe.compile.kernels.matmul import FORMATS, padded

# Shrinking the largest weight's code beyond the range costs that weight and helps the other 31; the optimum lies in this range for
# bell-shaped groups.
_SHRINK = np.linspace(0.72, 1.06, 12, dtype=np.float32)
_ROWS_AT_ONCE = 1 << 20  # weights searched together: bounds the temporaries


def _search_q4(groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes 0…15 (zero 8) and fp16 scales of `groups` fp32 [g, 32], by least squared error.

    The largest weight may take the code -8 or ±7, so both signs of the scale are tried.
    """
    extreme = np.take_along_axis(groups, np.abs(groups).argmax(1)[:, None], 1)[:, 0]
    best_error = np.full(len(groups), np.inf, np.float32)
    best_scale = np.zeros(len(groups), np.float16)
    best_codes = np.zeros(groups.shape, np.int8)
    for divisor in (-8.0, 7.0):
        for shrink in _SHRINK:
            scale = (extreme * np.float32(shrink / divisor)).astype(np.float16)
            wide = scale.astype(np.float32)
            with np.errstate(divide="ignore", invalid="ignore"):
                inverse = np.where(wide == 0, np.float32(0), np.float32(1) / wide)
            codes = np.clip(np.rint(groups * inverse[:, None]), -8, 7)
            # With the codes fixed the best scale has a closed form; it is kept where fp16 holds it.
            norm = np.einsum("gk,gk->g", codes, codes)
            fitted = np.where(norm > 0, np.einsum("gk,gk->g", codes, groups) / np.maximum(norm, 1), wide).astype(np.float16)
            wide = fitted.astype(np.float32)
            error = np.square(groups - codes * wide[:, None]).sum(1)
            better = error < best_error
            best_error[better] = error[better]
            best_scale[better] = fitted[better]
            best_codes[better] = codes[better]
    return (best_codes + 8).astype(np.uint8), best_scale


def _search_q8(groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes 1…255 (zero 128) and fp16 scales of `groups` fp32 [g, 32]."""
    scale = (np.abs(groups).max(1) / np.float32(127)).astype(np.float16)
    wide = scale.astype(np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse = np.where(wide == 0, np.float32(0), np.float32(1) / wide)
    codes = np.clip(np.rint(groups * inverse[:, None]), -127, 127)
    return (codes + 128).astype(np.uint8), scale


def pack(weight: np.ndarray, format_name: str) -> np.ndarray:
    """Packs `weight` (outputs, inputs) into blocks: (tiles, groups, block words) of the format's dtype.

    Raises ValueError where the inputs are not a multiple of 32.
    """
    fmt = FORMATS[format_name]
    outputs, inputs = weight.shape
    if inputs % GROUP:
        raise ValueError(f"a matrix of {inputs} inputs cannot be packed: the inputs must be a multiple of {GROUP}")
    groups = inputs // GROUP
    tiles = padded(outputs) // TILE
    out = np.empty((tiles, groups, fmt.words), fmt.dtype)
    step = max(1, _ROWS_AT_ONCE // (TILE * inputs))
    for first in range(0, tiles, step):
        rows = weight[first * TILE : (first + step) * TILE].astype(np.float32)
        count = padded(len(rows)) // TILE
        if len(rows) < count * TILE:
            rows = np.concatenate([rows, np.zeros((count * TILE - len(rows), inputs), np.float32)])
        out[first : first + count] = _pack_tiles(rows, format_name, count, groups)
    return out


def _pack_tiles(rows: np.ndarray, format_name: str, tiles: int, groups: int) -> np.ndarray:
    fmt = FORMATS[format_name]
    if not fmt.quantised:
        blocks = rows.reshape(tiles, TILE, groups, GROUP).transpose(0, 2, 3, 1)
        return blocks.astype(fmt.dtype).reshape(tiles, groups, fmt.words)
    search = _search_q4 if format_name == "q4" else _search_q8
    codes, scales = search(rows.reshape(-1, GROUP))
    codes = codes.reshape(tiles, TILE, groups, GROUP).transpose(0, 2, 3, 1).astype(np.uint32)  # tile, group, input, output
    if fmt.codes_per_word == 8:
        c = codes.reshape(tiles, groups, 4, 2, 4, TILE)  # word, nibble, byte
        words = sum((c[:, :, :, n, b] << np.uint32(8 * b + 4 * n)) for n in range(2) for b in range(4))
    else:
        c = codes.reshape(tiles, groups, 8, 4, TILE)
        words = sum((c[:, :, :, b] << np.uint32(8 * b)) for b in range(4))
    packed = np.asarray(words, np.uint32).reshape(tiles, groups, -1)
    tail = np.ascontiguousarray(scales.reshape(tiles, TILE, groups).transpose(0, 2, 1)).view(np.uint32)
    return np.concatenate([packed, tail], axis=2).view(np.int32)


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

"""Rotary embeddings and their scaled variants: inverse frequencies, computed once while a checkpoint is converted."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Rope:
    """`kind` is one of KINDS; the other fields count only for the kinds that read them. Lengths are tokens."""

    theta: float
    kind: str = "default"
    factor: float = 1.0
    original_context: int = 0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float = 0.0
    mscale_all_dim: float = 0.0

    @property
    def amplitude(self) -> float:
        """What cosines and sines are multiplied by; 1 but for yarn."""
        if self.kind != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return yarn_mscale(self.factor, self.mscale) / yarn_mscale(self.factor, self.mscale_all_dim)
        return yarn_mscale(self.factor, 1.0)

    def inverse_frequencies(self, width: int) -> np.ndarray:
        """fp32 [width / 2] for `width` rotated elements of a head (Su et al. 2021, and the variants below)."""
        exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
        plain = (np.float32(1.0) / np.float32(self.theta) ** exponents).astype(np.float32)
        return KINDS[self.kind](self, plain).astype(np.float32)


def yarn_mscale(factor: float, mscale: float) -> float:
    """0.1 · mscale · ln(factor) + 1 (Peng et al. 2023, equation 22)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _linear(rope: Rope, plain: np.ndarray) -> np.ndarray:
    return plain / np.float32(rope.factor)


def _llama3(rope: Rope, plain: np.ndarray) -> np.ndarray:
    """Llama 3.1: long waves are slowed down by `factor`, short ones stay, those between are blended."""
    wavelength = 2 * math.pi / plain
    share = (rope.original_context / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    share = np.clip(share, 0, 1)
    return (1 - share) * plain / np.float32(rope.factor) + share * plain


def _yarn(rope: Rope, plain: np.ndarray) -> np.ndarray:
    """YaRN, "NTK by parts" (Peng et al. 2023, section 3.2): a ramp over the dimensions between the two numbers of rotations."""
    width = 2 * len(plain)

    def dimension(rotations: float) -> float:
        return width * math.log(rope.original_context / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(len(plain), dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
    return plain / np.float32(rope.factor) * ramp + plain * (1 - ramp)


KINDS = {"default": lambda _rope, plain: plain, "linear": _linear, "llama3": _llama3, "yarn": _yarn}

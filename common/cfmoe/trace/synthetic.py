"""Synthetic traces: experts of Zipf-distributed popularity, kept from token to token with a settable probability."""

from __future__ import annotations

import numpy as np

from cfmoe.errors import CFMoEError
from cfmoe.trace.trace import Trace, id_type, window_segments

_PIECE = 1 << 22  # random numbers that are drawn at a time, which bounds the memory for them


def synthetic_trace(
    tokens: int,
    layers: int,
    experts: int,
    top_k: int,
    *,
    zipf: float = 1.0,
    stickiness: float = 0.0,
    sample_tokens: int | None = None,
    prompt_tokens: int = 0,
    seed: int = 0,
) -> Trace:
    """A random trace, the same for the same arguments.

    In each layer the expert of rank r (1, 2, …; the ranks are permuted per layer) is drawn with a probability proportional to
    r**-`zipf`. A token keeps every expert of the token before it with probability `stickiness`, one independent of the other, and draws
    the rest without replacement; it may draw again what it has not kept. The first token of a sample keeps nothing. Samples have
    `sample_tokens` tokens, all in one without it, the last maybe fewer; the first `prompt_tokens` of each are prefill.
    Raises CFMoEError for arguments out of bounds.
    """
    sample_tokens = tokens if sample_tokens is None else sample_tokens
    if not 0 <= stickiness <= 1:
        raise CFMoEError(f"stickiness {stickiness} is not a probability; give a number between 0 and 1")
    if not 0 <= zipf <= 100:
        raise CFMoEError(f"zipf {zipf} is not an exponent between 0 and 100; 0 makes all experts equally popular")
    if tokens < 1 or layers < 1 or not 1 <= top_k <= experts or sample_tokens < 1:
        raise CFMoEError(f"{tokens} tokens, {layers} layers, top-{top_k} of {experts} experts in samples of {sample_tokens} make no trace")
    rng = np.random.default_rng(seed)
    ranks = rng.permuted(np.tile(np.arange(1, experts + 1), (layers, 1)), axis=1)
    weights = (-zipf * np.log(ranks)).astype(np.float32)
    ids = np.empty((tokens, layers, top_k), id_type(experts))
    kept = np.zeros((layers, experts), bool)
    step = max(1, _PIECE // (layers * experts))
    for start in range(0, tokens, step):
        stop = min(start + step, tokens)
        # Largest of log weight + Gumbel noise: sampling without replacement (Gumbel top-k). The noise is minus log of an exponential.
        noise = rng.standard_exponential((stop - start, layers, experts), np.float32)
        keys = weights - np.log(np.maximum(noise, np.finfo(np.float32).tiny))
        keep = rng.random((stop - start, layers, top_k), np.float32) < stickiness
        for token in range(start, stop):
            row = keys[token - start]
            kept[:] = False
            if token % sample_tokens:
                np.put_along_axis(kept, ids[token - 1].astype(np.intp), keep[token - start], axis=1)
            boosted = np.where(kept, np.float32(np.inf), row)
            chosen = np.argpartition(boosted, experts - top_k, axis=1)[:, experts - top_k :]
            order = np.argsort(-np.take_along_axis(row, chosen, axis=1), axis=1)
            ids[token] = np.take_along_axis(chosen, order, axis=1)
    lengths = [min(sample_tokens, tokens - start) for start in range(0, tokens, sample_tokens)]
    return Trace(ids, tuple(segment for length in lengths for segment in window_segments(length, prompt_tokens)), experts)

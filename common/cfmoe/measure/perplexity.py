"""Perplexity of a token sequence, window by window."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from cfmoe.errors import CFMoEError

_ROWS = 64  # logits are widened to float64 so many rows at a time


class LogitsSource(Protocol):
    """What perplexity needs of a session."""

    def reset(self) -> None: ...

    def feed(self, ids: Sequence[int], decode: bool = False, logits: bool = True) -> np.ndarray | None: ...


@dataclass(frozen=True)
class Perplexity:
    """`nll` is the mean over `tokens` predicted tokens, in nats; `windows` were fed, each from an empty context."""

    nll: float
    tokens: int
    windows: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll)


def perplexity(
    session: LogitsSource,
    ids: Sequence[int],
    window: int,
    chunk: int,
    progress: Callable[[str, int, int], None] | None = None,
) -> Perplexity:
    """Cuts `ids` into windows of `window` tokens (the last may be shorter) and scores all tokens of each but its first.

    Windows do not overlap and start from an empty context. `chunk` tokens are fed at a time, which bounds the memory for logits.
    """
    starts = [start for start in range(0, len(ids), window) if len(ids) - start > 1]
    if not starts:
        raise CFMoEError(f"the text has {len(ids)} tokens; at least 2 are needed to predict one from another")
    total, count = 0.0, 0
    for done, start in enumerate(starts):
        if progress is not None:
            progress("scoring", done, len(starts))
        tokens = ids[start : start + window]
        session.reset()
        for begin in range(0, len(tokens) - 1, chunk):
            # The last token is only predicted; feeding it would be work for nothing.
            piece = tokens[begin : min(begin + chunk, len(tokens) - 1)]
            logits = session.feed(piece)
            assert logits is not None
            total += negative_log_likelihood(logits, np.asarray(tokens[begin + 1 : begin + 1 + len(piece)]))
            count += len(piece)
    if progress is not None:
        progress("scoring", len(starts), len(starts))
    return Perplexity(total / count, count, len(starts))


def negative_log_likelihood(
    logits: np.ndarray,  # (n, vocabulary), float32
    targets: np.ndarray,  # (n,)
) -> float:
    """Sum over the rows of -log softmax(logits)[target], in nats, computed in float64."""
    total = 0.0
    for begin in range(0, len(targets), _ROWS):
        rows = logits[begin : begin + _ROWS].astype(np.float64)
        rows -= rows.max(axis=1, keepdims=True)
        chosen = rows[np.arange(len(rows)), targets[begin : begin + _ROWS]]
        total += float(np.sum(np.log(np.exp(rows).sum(axis=1)) - chosen))
    if not math.isfinite(total):
        raise CFMoEError("the model's logits are not finite: the artifact or the checkpoint is damaged; compile the model again")
    return total

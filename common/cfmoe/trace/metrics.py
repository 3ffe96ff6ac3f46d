"""Locality of routing in a trace: ECR, GDS and LAL, per layer and overall, for each phase and for both.

All three are means over pairs of consecutive tokens of one sample. A pair belongs to the phase of its second token.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from cfmoe.trace.trace import Phase, Trace

_PIECE = 1 << 22  # values that are compared at a time, which bounds the memory for it


@dataclass(frozen=True)
class Locality:
    """`pairs` consecutive tokens; the measures are None where there is no pair, those of the gate scores where the trace has none."""

    pairs: int
    ecr: float | None
    gds: float | None
    lal: float | None
    ecr_per_layer: tuple[float, ...] | None
    gds_per_layer: tuple[float, ...] | None
    lal_per_layer: tuple[float, ...] | None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def locality(trace: Trace, phase: Phase | None = None) -> Locality:
    """The locality of the pairs that belong to `phase`, of all pairs without it.

    With E_t the experts of token t, g_t its gate scores, and layers l = 1 … L, the means being over pairs (t, t + 1):
    ECR, expert consistency rate: ECR_l = mean |E_t ∩ E_{t+1}| / top_k; overall the mean over layers.
    GDS, gate distribution similarity: GDS_l = mean (1 + cos(g_t, g_{t+1})) / 2; overall the mean over layers. The cosine with a token
    whose scores are all zero counts as 0.
    LAL, layer-aware locality: LAL = Σ_l (l / L) · ECR_l; per layer its terms.
    """
    first = _pairs(trace, phase)
    if not len(first):
        return Locality(0, None, None, None, None, None, None)
    overlap = np.zeros(trace.layers)
    similarity = np.zeros(trace.layers)
    step = max(1, _PIECE // (trace.layers * (trace.experts if trace.scores is not None else 2 * trace.top_k)))
    for start in range(0, len(first), step):
        one = first[start : start + step]
        overlap += _shared(trace.ids[one], trace.ids[one + 1]).sum(0)
        if trace.scores is not None:
            similarity += ((1 + _cosine(trace.scores[one], trace.scores[one + 1])) / 2).sum(0)
    ecr = overlap / (len(first) * trace.top_k)
    gds = similarity / len(first)
    lal = ecr * np.arange(1, trace.layers + 1) / trace.layers
    return Locality(
        pairs=len(first),
        ecr=float(ecr.mean()),
        gds=None if trace.scores is None else float(gds.mean()),
        lal=float(lal.sum()),
        ecr_per_layer=tuple(ecr.tolist()),
        gds_per_layer=None if trace.scores is None else tuple(gds.tolist()),
        lal_per_layer=tuple(lal.tolist()),
    )


def locality_by_phase(trace: Trace) -> dict[str, Locality]:
    """The locality of prefill, of decode and of all."""
    return {"prefill": locality(trace, Phase.PREFILL), "decode": locality(trace, Phase.DECODE), "all": locality(trace)}


def _pairs(trace: Trace, phase: Phase | None) -> np.ndarray:
    """The first token of every pair."""
    lengths = [segment.tokens for segment in trace.segments]
    starts = np.cumsum([0, *lengths[:-1]])
    second = np.ones(trace.tokens, bool) if phase is None else np.repeat([segment.phase == phase for segment in trace.segments], lengths)
    second[starts[[segment.begins_sample for segment in trace.segments]]] = False
    return np.flatnonzero(second) - 1


def _shared(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """How many ids each pair of rows has in common, no row having an id twice: (pairs, layers)."""
    both = np.sort(np.concatenate((one, other), axis=-1), axis=-1)
    return (both[..., 1:] == both[..., :-1]).sum(-1)


def _cosine(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(pairs, layers), in float64."""
    one, other = one.astype(np.float64), other.astype(np.float64)
    norms = np.sqrt((one**2).sum(-1) * (other**2).sum(-1))
    return (one * other).sum(-1) / np.where(norms > 0, norms, 1)


def popular_experts(trace: Trace) -> list[int]:
    """All experts of the model as ``layer * experts + expert``, the most used of the trace first: what Engine.keep_warm takes."""
    uses = np.stack([np.bincount(trace.ids[:, layer].ravel(), minlength=trace.experts) for layer in range(trace.layers)])
    return [int(one) for one in np.argsort(-uses.ravel(), kind="stable")]

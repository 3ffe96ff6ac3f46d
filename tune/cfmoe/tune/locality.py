"""Losses that make consecutive tokens choose the same experts.

Every loss maps router logits (layers, batch, seq, experts) to one value per layer and token, (layers, batch, seq): what the token's
routing costs given the tokens before it in the same sequence. A token without a predecessor costs 0, and so does padding; two
tokens with identical logits cost 0. `locality_loss` takes the mean.

`js`, `kl` and `l2` compare whole router distributions. They can be lowered by flattening the distributions, which keeps no expert in
memory. What a cache sees is the chosen set alone, so the others act where that set is decided, at the boundary between the k-th and
the (k+1)-th logit: `overlap` and `hinge` look one token back, `window` as far as a decaying memory reaches, and `cache` follows the
very cache that the engine will keep.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from cfmoe.errors import CFMoEError

PADDING = -1


def segment_ids(
    attention_mask: Tensor | None,  # (batch, seq), 0 for padding
    position_ids: Tensor | None,  # (batch, seq), starts again where a packed sequence does
    shape: torch.Size | None = None,  # (batch, seq), needed where both are None
    device: torch.device | None = None,
) -> Tensor:  # (batch, seq) int64
    """A number per token: equal for tokens of one sequence, PADDING for padding.

    A sequence starts where the position is not one more than that of the token before it.
    """
    source = attention_mask if position_ids is None else position_ids
    if source is None:
        if shape is None:
            raise ValueError("segment_ids needs attention_mask, position_ids or shape")
        return torch.zeros(shape, dtype=torch.int64, device=device)
    if position_ids is None:
        segments = torch.zeros(source.shape, dtype=torch.int64, device=source.device)
    else:
        starts = torch.ones_like(position_ids, dtype=torch.int64)
        starts[:, 1:] = (position_ids[:, 1:] != position_ids[:, :-1] + 1).long()
        segments = starts.cumsum(1) - 1
    return segments if attention_mask is None else segments.masked_fill(attention_mask == 0, PADDING)


def has_predecessor(
    segments: Tensor,  # (batch, seq)
    distance: int = 1,
) -> Tensor:  # (batch, seq) bool
    """Whether the token `distance` places before is of the same sequence. A sequence's tokens stand side by side."""
    result = torch.zeros_like(segments, dtype=torch.bool)
    if distance < segments.shape[1]:
        result[:, distance:] = (segments[:, distance:] == segments[:, :-distance]) & (segments[:, distance:] != PADDING)
    return result


def _shift(values: Tensor, distance: int, fill: float = 0.0) -> Tensor:
    """`values` (…, seq, experts) moved `distance` tokens later, `fill` where nothing moved in."""
    return functional.pad(values[..., : values.shape[-2] - distance, :], (0, 0, distance, 0), value=fill)


def _per_pair(
    cost: Tensor,  # (layers, batch, seq - 1): of token t + 1 given token t
    segments: Tensor,  # (batch, seq)
) -> Tensor:  # (layers, batch, seq)
    return functional.pad(cost, (1, 0)).masked_fill(~has_predecessor(segments), 0.0)


def _choose(logits: Tensor, top_k: int) -> Tensor:
    """The experts of the `top_k` largest logits, best first: (…, top_k)."""
    return logits.topk(top_k, dim=-1).indices


def _one_hot(ids: Tensor, experts: int) -> Tensor:
    """(…, top_k) expert numbers → (…, experts) bool."""
    result = torch.zeros(*ids.shape[:-1], experts, dtype=torch.bool, device=ids.device)
    return result.scatter_(-1, ids, True)


def gates(
    logits: Tensor,  # (..., experts)
    top_k: int,
    temperature: float,
) -> Tensor:  # (..., experts) in (0, 1)
    """σ((z − θ) / temperature): how surely an expert is chosen; θ, midway between the k-th and the (k+1)-th logit, has no gradient.

    The sigmoid is the usual relaxation of a threshold, as in Louizos et al., Learning sparse neural networks through L0
    regularization (arXiv:1712.01312), without its noise.
    """
    top = logits.detach().topk(min(top_k + 1, logits.shape[-1]), dim=-1).values
    threshold = (top[..., top_k - 1 : top_k] + top[..., -1:]) / 2
    return torch.sigmoid((logits - threshold) / temperature)


# --- losses on the whole distribution ---------------------------------------------------------------------------------------------


def js(logits: Tensor, segments: Tensor) -> Tensor:
    """Jensen–Shannon divergence in nats of the router distributions p of a token and q of the one before, in [0, ln 2].

    JS(p, q) = ½ KL(p ‖ m) + ½ KL(q ‖ m), m = (p + q) / 2. Lin, Divergence measures based on the Shannon entropy (IEEE Trans. Inf.
    Theory 37, 1991).
    """
    log_p = functional.log_softmax(logits, dim=-1)
    now, before = log_p[..., 1:, :], log_p[..., :-1, :]
    log_m = torch.logaddexp(now, before) - torch.log(torch.tensor(2.0, dtype=logits.dtype, device=logits.device))
    cost = 0.5 * (now.exp() * (now - log_m) + before.exp() * (before - log_m)).sum(-1)
    return _per_pair(cost, segments)


def kl(logits: Tensor, segments: Tensor) -> Tensor:
    """Symmetric Kullback–Leibler divergence in nats: ½ [KL(p ‖ q) + KL(q ‖ p)] = ½ Σ (p − q)(ln p − ln q). Jeffreys (1946)."""
    log_p = functional.log_softmax(logits, dim=-1)
    now, before = log_p[..., 1:, :], log_p[..., :-1, :]
    return _per_pair(0.5 * ((now.exp() - before.exp()) * (now - before)).sum(-1), segments)


def l2(logits: Tensor, segments: Tensor) -> Tensor:
    """Squared distance of the router distributions: Σ (p − q)²."""
    p = functional.softmax(logits, dim=-1)
    return _per_pair((p[..., 1:, :] - p[..., :-1, :]).square().sum(-1), segments)


# --- losses at the top-k boundary -------------------------------------------------------------------------------------------------


def overlap(
    logits: Tensor,
    segments: Tensor,
    top_k: int,
    temperature: float = 0.25,
    ids: Tensor | None = None,  # (layers, batch, seq, top_k)
) -> Tensor:
    """The share of the chosen set that changes, softly: Σ (1 − g_e) / 2k over the experts e that only one of two tokens chose.

    g is the `gates` of the token that did not choose e. For hard gates it is 1 − |E ∩ E'| / k, one minus the expert consistency of the
    pair. Only what would join the other token's choice is moved. The plain distance Σ |g − g'| is lowered as well by undecided gates
    everywhere, and that costs far more quality than it saves (docs/locality.md).
    """
    chosen = _one_hot(_choose(logits, top_k) if ids is None else ids, logits.shape[-1])
    lacking = 1 - gates(logits, top_k, temperature)
    now, before = chosen[..., 1:, :], chosen[..., :-1, :]
    cost = (lacking[..., 1:, :] * (before & ~now) + lacking[..., :-1, :] * (now & ~before)).sum(-1)
    return _per_pair(cost / (2 * top_k), segments)


def hinge(
    logits: Tensor,
    segments: Tensor,
    top_k: int,
    reach: float = 1.0,
    margin: float = 0.1,
    ids: Tensor | None = None,  # (layers, batch, seq, top_k)
) -> Tensor:
    """Lifts near misses among the experts of the token before: Σ (z_weak − z_e + margin) / k over its experts e not chosen now.

    z_weak is the weakest chosen logit that is not of the token before, the one that e would replace. Only gaps z_weak − z_e below
    `reach` count: a swap further from the boundary costs more quality than it saves.
    """
    chosen = _one_hot(_choose(logits, top_k) if ids is None else ids, logits.shape[-1])
    before = _shift(chosen, 1).bool()
    weak = logits.masked_fill(~(chosen & ~before), torch.inf).amin(-1, keepdim=True)  # inf where nothing is new
    gap = torch.where(before & ~chosen & weak.isfinite(), weak - logits, torch.inf)
    cost = torch.where(gap < reach, gap + margin, 0.0).clamp_min(0).sum(-1) / top_k
    return cost.masked_fill(~has_predecessor(segments), 0.0)


def recency(
    ids: Tensor,  # (layers, batch, seq, top_k)
    segments: Tensor,  # (batch, seq)
    experts: int,
    decay: float,
) -> Tensor:  # (layers, batch, seq, experts) float32
    """decay^(j − 1) for an expert last chosen j tokens ago in the sequence: 1 right after its use, 0 where it has not been chosen."""
    seq = ids.shape[2]
    position = torch.arange(seq, device=ids.device)
    used = torch.where(_one_hot(ids, experts), position[:, None], -1).cummax(2).values
    last = _shift(used, 1, -1)
    start = torch.where(has_predecessor(segments), 0, position).cummax(1).values
    age = position[:, None] - last
    return torch.where(last >= start[..., None], decay ** (age - 1.0), 0.0)


def window(
    logits: Tensor,
    segments: Tensor,
    top_k: int,
    temperature: float = 0.25,
    decay: float = 0.9,
    ids: Tensor | None = None,  # (layers, batch, seq, top_k)
) -> Tensor:
    """Prefers experts used lately to those used long ago: Σ_e (r_f − r_e) tanh((z_e − z_f) / 2τ) / k over the chosen experts e.

    r is the `recency` of an expert, and f the strongest expert that was not chosen and is more recent than e; where there is none, e
    costs nothing. As in `cache` the gradient is largest for near misses and fades for hopeless ones. decay → 0 looks one token back.
    """
    ids = _choose(logits, top_k) if ids is None else ids
    experts = logits.shape[-1]
    fresh = recency(ids, segments, experts, decay).to(logits.dtype)
    own = fresh.gather(-1, ids)[..., None]  # (layers, batch, seq, top_k, 1)
    rival = (fresh[..., None, :] > own) & ~_one_hot(ids, experts)[..., None, :]
    strongest, f = logits[..., None, :].masked_fill(~rival, -torch.inf).max(-1)
    found = strongest.isfinite()
    gap = torch.where(found, logits.gather(-1, ids) - torch.where(found, strongest, 0.0), 0.0)
    gain = torch.where(found, fresh.gather(-1, f) - own[..., 0], 0.0)
    cost = (gain * torch.tanh(gap.clamp_min(0) / (2 * temperature))).sum(-1) / top_k
    return cost.masked_fill(~has_predecessor(segments), 0.0)


# --- the cache itself -------------------------------------------------------------------------------------------------------------


def residents(
    ids: Tensor,  # (layers, batch, seq, top_k) chosen experts, best first
    segments: Tensor,  # (batch, seq)
    experts: int,
    capacity: int,  # of one cache for all layers, in experts
    frequency_decay: float = 0.0,
) -> Tensor:  # (layers, batch, seq, experts) bool
    """Which experts one cache of all layers holds when token t arrives, cold at the start of a sequence.

    frequency_decay 0 is LRU: the `capacity` experts used last, in the order token, layer, top-k. Otherwise an expert's score is
    Σ_j frequency_decay^j over its uses j tokens ago (LRFU: Lee et al., IEEE Trans. Computers 50, 2001) and the best are held.
    LRU has the inclusion property (Mattson et al., IBM Systems Journal 9, 1970), so the order of last uses is its whole state and no
    step by step simulation is needed. The state is that at the start of the token, for all its layers.
    """
    layers, batch, seq, top_k = ids.shape
    if not 0 < capacity <= layers * experts:
        raise ValueError(f"capacity {capacity} is not between 1 and {layers * experts}")
    if frequency_decay:
        uses = _one_hot(ids, experts).float()
        distance, score = 1, uses
        while distance < seq:
            inside = has_predecessor(segments, distance)[..., None]
            score = score + torch.where(inside, frequency_decay**distance * _shift(score, distance), 0.0)
            distance *= 2
    else:
        order = torch.arange(layers * seq * top_k, device=ids.device).view(seq, layers, top_k).transpose(0, 1) + 1  # 1 is the first access
        last = torch.zeros(layers, batch, seq, experts, dtype=torch.int64, device=ids.device)
        last.scatter_(-1, ids, order[:, None].expand(-1, batch, -1, -1))
        starts = torch.where(has_predecessor(segments), 0, torch.arange(seq, device=ids.device)).cummax(1).values
        last = last.cummax(2).values
        score = torch.where(last > (starts * layers * top_k)[..., None], last, 0)
    score = _shift(score, 1).masked_fill(~has_predecessor(segments)[..., None], 0)
    flat = score.permute(1, 2, 0, 3).reshape(batch, seq, layers * experts)
    least = flat.topk(capacity, dim=-1).values[..., -1:]
    held = (flat >= least) & (flat > 0)
    return held.view(batch, seq, layers, experts).permute(2, 0, 1, 3)


def cache(
    logits: Tensor,
    segments: Tensor,
    top_k: int,
    temperature: float = 0.25,
    capacity: float = 0.35,  # share of all experts
    frequency_decay: float = 0.0,
    both_ways: bool = False,
    ids: Tensor | None = None,  # (layers, batch, seq, top_k)
) -> Tensor:
    """Misses of the cache that the engine keeps, each weighed by how easily a resident expert takes its place: Σ tanh(Δᵢ / 2τ) / k.

    The i-th weakest chosen expert that is not resident is paired with the i-th strongest resident that is not chosen; Δᵢ is the
    difference of their logits. The gradient is largest where the two are level and fades for pairs far apart, whose swap would cost
    quality; it lowers the one and lifts the other. No gradient flows through the state of the cache, see `residents`.
    both_ways: an expert that the cache of the reversed sequence holds, because it is used again soon, counts as resident too; what is
    left are the uses that no neighbour in time shares.
    """
    experts = logits.shape[-1]
    ids = _choose(logits, top_k) if ids is None else ids
    size = max(top_k, round(capacity * logits.shape[0] * experts))
    held = residents(ids, segments, experts, size, frequency_decay)
    if both_ways:
        held = held | residents(ids.flip(2), segments.flip(1), experts, size, frequency_decay).flip(2)
    chosen = _one_hot(ids, experts)
    missing, spare = chosen & ~held, held & ~chosen
    weakest = -(-logits).masked_fill(~missing, -torch.inf).topk(top_k, dim=-1).values
    strongest = logits.masked_fill(~spare, -torch.inf).topk(top_k, dim=-1).values
    paired = weakest.isfinite() & strongest.isfinite()
    delta = torch.where(paired, weakest, 0.0) - torch.where(paired, strongest, 0.0)
    cost = torch.tanh(delta.clamp_min(0) / (2 * temperature)).sum(-1) / top_k
    return cost.masked_fill(~has_predecessor(segments), 0.0)


# --- one number -------------------------------------------------------------------------------------------------------------------

_DISTRIBUTION: dict[str, Callable[..., Tensor]] = {"js": js, "kl": kl, "l2": l2}
_BOUNDARY: dict[str, Callable[..., Tensor]] = {"overlap": overlap, "hinge": hinge, "window": window, "cache": cache}
KINDS = (*_DISTRIBUTION, *_BOUNDARY)


@dataclass(frozen=True)
class Locality:
    """A loss and its settings; those that the loss does not have are ignored."""

    kind: str
    top_k: int
    temperature: float = 0.25
    decay: float = 0.9
    capacity: float = 0.35
    frequency_decay: float = 0.0
    both_ways: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise CFMoEError(f"locality loss {self.kind} is unknown; choose one of {', '.join(KINDS)}")

    def __call__(self, logits: Tensor, segments: Tensor, ids: Tensor | None = None) -> Tensor:
        """(layers, batch, seq, experts) → (layers, batch, seq)."""
        if self.kind in _DISTRIBUTION:
            return _DISTRIBUTION[self.kind](logits, segments)
        if self.kind == "overlap":
            return overlap(logits, segments, self.top_k, self.temperature, ids)
        if self.kind == "hinge":
            return hinge(logits, segments, self.top_k, ids=ids)
        if self.kind == "window":
            return window(logits, segments, self.top_k, self.temperature, self.decay, ids)
        return cache(logits, segments, self.top_k, self.temperature, self.capacity, self.frequency_decay, self.both_ways, ids)


def locality_loss(
    loss: Locality,
    logits: Sequence[Tensor],  # per MoE layer (batch, seq, experts) or (batch * seq, experts)
    segments: Tensor,  # (batch, seq)
    ids: Sequence[Tensor] | None = None,  # per MoE layer (batch, seq, top_k) or (batch * seq, top_k): what was really chosen
    layer_weights: Tensor | None = None,  # (layers,)
    pairs: Tensor | float | None = None,  # what to divide by; the pairs in `segments` if None
) -> Tensor:  # scalar
    """The mean of `loss` over layers and consecutive pairs of tokens, computed in float32.

    Processes that share a batch give the number of pairs in all of it as `pairs`, so that their sums add up to the mean.
    layer_weights are scaled to a mean of 1.
    """
    batch, seq = segments.shape
    stacked = torch.stack([layer.float() for layer in logits]).view(len(logits), batch, seq, -1)
    chosen = None if ids is None else torch.stack(list(ids)).view(len(logits), batch, seq, -1)
    cost = loss(stacked, segments, chosen)
    if layer_weights is not None:
        cost = cost * (layer_weights / layer_weights.mean())[:, None, None]
    total = cost.sum() / len(logits)
    return total / (has_predecessor(segments).sum().clamp_min(1) if pairs is None else pairs)

"""The locality losses against values worked out by hand, and what masks and packing may not change."""

from __future__ import annotations

import math

import pytest
import torch

from cfmoe.errors import CFMoEError
from cfmoe.tune import locality
from cfmoe.tune.locality import KINDS, PADDING, Locality, locality_loss, residents, segment_ids

LAYERS, EXPERTS, TOP_K = 3, 8, 2


def logits_of(*rows: list[float]) -> torch.Tensor:
    """One layer, one sequence: (1, 1, tokens, experts)."""
    return torch.tensor([[list(row) for row in rows]], dtype=torch.float64)[None]


def one_sequence(tokens: int) -> torch.Tensor:
    return torch.zeros(1, tokens, dtype=torch.int64)


def random_logits(batch: int, seq: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(LAYERS, batch, seq, EXPERTS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def every_loss() -> list[Locality]:
    return [*(Locality(kind, TOP_K) for kind in KINDS), Locality("cache", TOP_K, frequency_decay=0.9)]


each_loss = pytest.mark.parametrize("loss", every_loss(), ids=lambda loss: f"{loss.kind}{'-lrfu' if loss.frequency_decay else ''}")


# --- by hand ----------------------------------------------------------------------------------------------------------------------


def test_distribution_losses_by_hand() -> None:
    # p = (¾, ¼) then q = (¼, ¾); m = (½, ½)
    logits = logits_of([math.log(3), 0], [0, math.log(3)])
    by_hand = {
        "js": 0.75 * math.log(1.5) + 0.25 * math.log(0.5),  # both halves are alike
        "kl": 0.5 * math.log(3),  # ½ (½ ln 3 + ½ ln 3)
        "l2": 0.5,  # 2 · ½²
    }
    for kind, value in by_hand.items():
        cost = Locality(kind, 1)(logits, one_sequence(2))
        torch.testing.assert_close(cost, torch.tensor([[[0.0, value]]], dtype=torch.float64))


def test_overlap_by_hand() -> None:
    # θ is 1.5 and then 1, τ is 1: token 1 lacks expert 0 by σ(0 − 1), token 0 lacks expert 1 by σ(1 − 1.5).
    logits = logits_of([2, 1, 0], [0, 2, 0])
    cost = locality.overlap(logits, one_sequence(2), top_k=1, temperature=1.0)
    by_hand = (1 - 1 / (1 + math.exp(1.0)) + 1 - 1 / (1 + math.exp(0.5))) / 2
    assert cost[0, 0].tolist() == pytest.approx([0.0, by_hand])


def test_overlap_of_sure_gates_is_one_minus_consistency() -> None:
    logits = logits_of([9, 9, 0, 0], [9, 0, 9, 0], [0, 0, 9, 9])  # {0, 1}, {0, 2}, {2, 3}: one of two stays each time
    assert locality.overlap(logits, one_sequence(3), top_k=2)[0, 0].tolist() == pytest.approx([0.0, 0.5, 0.5], abs=1e-6)


def test_hinge_by_hand() -> None:
    # {0, 1} then {0, 2}: expert 1 lost to expert 2 by 0.5, within reach; then {2, 3}: expert 0 is lost by 3 to expert 3, out of reach.
    logits = logits_of([5, 4, 0, 0], [5, 3.5, 4, 0], [1, 0, 6, 4])
    cost = locality.hinge(logits, one_sequence(3), top_k=2, reach=1.0, margin=0.1)
    assert cost[0, 0].tolist() == pytest.approx([0.0, (0.5 + 0.1) / 2, 0.0])


def test_window_by_hand() -> None:
    # {0}, {1}, {2}, {0}, decay 0.8 and τ 0.5. Token 1: expert 1 is unused, 0 is fresh and 3 behind. Token 2: 0 has recency 0.8, 1 has 1;
    # the stronger of both is 0, by 1. Token 3: 0 has 0.64; 2 is fresher, by 2, and stronger than 1.
    logits = logits_of([9, 0, 0], [1, 4, 0], [4, 3, 5], [5, 2, 3])
    cost = locality.window(logits, one_sequence(4), top_k=1, temperature=0.5, decay=0.8)
    by_hand = [0.0, math.tanh(3.0), 0.8 * math.tanh(1.0), (1 - 0.64) * math.tanh(2.0)]
    assert cost[0, 0].tolist() == pytest.approx(by_hand)


def test_recency_reaches_over_the_whole_sequence_and_not_beyond() -> None:
    ids = torch.tensor([0, *[1] * 11, 2, 2]).view(1, 1, 14, 1)
    segments = torch.tensor([[0] * 13 + [1]])
    found = locality.recency(ids, segments, 3, 0.9)[0, 0]
    assert found[12].tolist() == pytest.approx([0.9**11, 1.0, 0.0])
    assert found[0].tolist() == found[13].tolist() == [0.0, 0.0, 0.0]


def test_cache_by_hand() -> None:
    # One layer, 4 experts, top-1, room for 2 of them: choices 0, 1, 2, 2, 3.
    # Token 1: holds {0}; 1 misses by 1 against 0. Token 2: holds {0, 1}; 2 misses by 2 against the better of them, 1. Token 3: a hit.
    # Token 4: holds {2, 1}; 3 misses by 0.5 against 2.
    logits = logits_of([9, 0, 0, 0], [3, 4, 0, 0], [0, 3, 5, 0], [0, 0, 5, 0], [4.9, 1, 4.5, 5])
    cost = locality.cache(logits, one_sequence(5), top_k=1, temperature=0.5, capacity=0.5, both_ways=False)
    by_hand = [0.0, math.tanh(1.0), math.tanh(2.0), 0.0, math.tanh(0.5)]
    assert cost[0, 0].tolist() == pytest.approx(by_hand)
    # Expert 2 is used again at once, so no neighbour in time would save its miss; 1 and 3 are used once only. At token 1 the cache of the
    # reversed sequence holds {2, 3} besides: 1 is still beaten best by 0. At token 4 it is empty.
    both = locality.cache(logits, one_sequence(5), top_k=1, temperature=0.5, capacity=0.5, both_ways=True)
    assert both[0, 0].tolist() == pytest.approx([0.0, math.tanh(1.0), 0.0, 0.0, math.tanh(0.5)])


def test_cache_gradient_lowers_the_miss_and_lifts_the_resident() -> None:
    logits = logits_of([9, 0, 0, 0], [3, 4, 0, 0]).requires_grad_()
    locality.cache(logits, one_sequence(2), top_k=1, capacity=0.5, both_ways=False).sum().backward()
    gradient = logits.grad[0, 0, 1]  # type: ignore[index]
    assert gradient[1] > 0 > gradient[0]
    assert gradient[2:].abs().max() == 0
    assert logits.grad[0, 0, 0].abs().max() == 0  # type: ignore[index]


def test_residents_are_those_of_an_lru_cache_kept_step_by_step() -> None:
    generator = torch.Generator().manual_seed(3)
    ids = torch.rand(LAYERS, 2, 40, EXPERTS, generator=generator).topk(TOP_K, dim=-1).indices
    segments = torch.zeros(2, 40, dtype=torch.int64)
    segments[0, 25:] = 1
    capacity = 9
    held = residents(ids, segments, EXPERTS, capacity)
    for row in range(2):
        recent: list[tuple[int, int]] = []
        for token in range(40):
            if token and segments[row, token] != segments[row, token - 1]:
                recent = []
            expected = torch.zeros(LAYERS, EXPERTS, dtype=torch.bool)
            for layer, expert in recent[-capacity:]:
                expected[layer, expert] = True
            assert torch.equal(held[:, row, token], expected), (row, token)
            for layer in range(LAYERS):
                for expert in ids[layer, row, token].tolist():
                    if (layer, expert) in recent:
                        recent.remove((layer, expert))
                    recent.append((layer, expert))


def test_residents_by_decayed_frequency() -> None:
    # Choices 0, 0, 1, 2, room for one: 0 scores 1 + ½ against 1 at token 3 … ½ + ¼ = 0.75 against 1 (decay ½), so 1 is held.
    ids = torch.tensor([0, 0, 1, 2]).view(1, 1, 4, 1)
    assert residents(ids, one_sequence(4), 3, 1, frequency_decay=0.5)[0, 0, 3].tolist() == [False, True, False]
    assert residents(ids, one_sequence(4), 3, 1, frequency_decay=0.9)[0, 0, 3].tolist() == [True, False, False]


# --- what holds for all -----------------------------------------------------------------------------------------------------------


@each_loss
def test_identical_tokens_cost_nothing(loss: Locality) -> None:
    row = random_logits(2, 1)
    cost = loss(row.expand(-1, -1, 16, -1), torch.zeros(2, 16, dtype=torch.int64))
    assert cost.abs().max().item() < 1e-12


@each_loss
def test_different_tokens_cost_something(loss: Locality) -> None:
    cost = loss(random_logits(2, 16), torch.zeros(2, 16, dtype=torch.int64))
    assert (cost >= 0).all()
    assert cost.mean() > 0.01
    assert cost[..., 0].abs().max() == 0


@each_loss
def test_gradients_are_right(loss: Locality) -> None:
    logits = random_logits(1, 6, seed=5).requires_grad_()
    ids = logits.detach().topk(TOP_K, dim=-1).indices
    if loss.kind == "overlap":
        # The threshold is held fixed by definition, so finite differences must hold it too.
        top = logits.detach().topk(TOP_K + 1, dim=-1).values
        threshold = top[..., TOP_K - 1 : TOP_K].add(top[..., TOP_K:]).div(2)

        def fixed(values: torch.Tensor, top_k: int, temperature: float) -> torch.Tensor:
            return torch.sigmoid((values - threshold) / temperature)

        assert torch.equal(fixed(logits, TOP_K, 0.25), locality.gates(logits, TOP_K, 0.25))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(locality, "gates", fixed)
            assert torch.autograd.gradcheck(lambda z: loss(z, one_sequence(6), ids), logits)
    else:
        assert torch.autograd.gradcheck(lambda z: loss(z, one_sequence(6), ids), logits)


@each_loss
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count(loss: Locality, side: str) -> None:
    lengths, seq = (5, 9), 12
    alone = [random_logits(1, length, seed) for seed, length in enumerate(lengths)]
    padded = random_logits(2, seq, seed=9) * 50
    mask = torch.zeros(2, seq, dtype=torch.int64)
    for row, (logits, length) in enumerate(zip(alone, lengths, strict=True)):
        place = slice(seq - length, seq) if side == "left" else slice(0, length)
        padded[:, row, place] = logits[:, 0]
        mask[row, place] = 1
    together = locality_loss(loss, list(padded), segment_ids(mask, None))
    separate = sum(loss(logits.float(), one_sequence(length)).sum() for logits, length in zip(alone, lengths, strict=True))
    torch.testing.assert_close(together.double(), separate.double() / LAYERS / (4 + 8), rtol=1e-6, atol=0)


@each_loss
def test_packed_sequences_do_not_see_each_other(loss: Locality) -> None:
    alone = [random_logits(1, length, seed) for seed, length in enumerate((5, 1, 7))]
    packed = torch.cat([*alone, random_logits(1, 3, seed=9)], dim=2)
    positions = torch.tensor([[*range(5), 0, *range(7), *range(3)]])
    mask = torch.tensor([[1] * 13 + [0] * 3])
    segments = segment_ids(mask, positions)
    assert segments.tolist() == [[0] * 5 + [1] + [2] * 7 + [PADDING] * 3]
    together = loss(packed, segments)
    separate = torch.cat([loss(logits, one_sequence(logits.shape[2])) for logits in alone], dim=2)
    torch.testing.assert_close(together[..., :13], separate)
    assert together[..., 13:].abs().max() == 0


def test_layer_weights_scale_their_layer() -> None:
    logits = list(random_logits(1, 8))
    loss, segments = Locality("js", TOP_K), one_sequence(8)
    per_layer = torch.stack([locality_loss(loss, [layer], segments) for layer in logits])
    weights = torch.tensor([1.0, 2.0, 0.0])
    torch.testing.assert_close(locality_loss(loss, logits, segments), per_layer.mean())
    torch.testing.assert_close(locality_loss(loss, logits, segments, layer_weights=weights), (per_layer * weights).mean())


def test_parts_of_a_batch_add_up() -> None:
    logits, segments = random_logits(4, 8), torch.zeros(4, 8, dtype=torch.int64)
    segments[1, 3:] = PADDING
    loss = Locality("window", TOP_K)
    whole = locality_loss(loss, list(logits), segments)
    pairs = locality.has_predecessor(segments).sum()
    parts = [locality_loss(loss, list(logits[:, part]), segments[part], pairs=pairs) for part in (slice(0, 1), slice(1, 4))]
    torch.testing.assert_close(sum(parts), whole)


def test_flat_router_logits_are_taken_too() -> None:
    logits, segments = random_logits(2, 8), torch.zeros(2, 8, dtype=torch.int64)
    flat = [layer.flatten(0, 1) for layer in logits]
    loss = Locality("window", TOP_K)
    torch.testing.assert_close(locality_loss(loss, flat, segments), locality_loss(loss, list(logits), segments))


def test_an_unknown_loss_is_refused() -> None:
    with pytest.raises(CFMoEError, match="jsd is unknown; choose one of js, kl"):
        Locality("jsd", TOP_K)

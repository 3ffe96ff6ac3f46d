"""Metrics of traces worked out by hand, synthetic traces against their parameters, and the import of other layouts."""

from __future__ import annotations

import math
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cfmoe.errors import CFMoEError
from cfmoe.trace import Phase, Segment, Trace, window_segments
from cfmoe.trace.metrics import Locality, locality, locality_by_phase
from cfmoe.trace.researchers import load_layers, trace_from_layers
from cfmoe.trace.synthetic import synthetic_trace


def by_hand() -> Trace:
    """Two samples of two layers, top-2 of 4 experts; tokens a b c | d e, of them a b prefill, c decode, d prefill, e decode.

    layer 0: a {0,1} b {1,0} c {1,2} | d {1,2} e {3,0}      shared: ab 2, bc 1, de 0
    layer 1: a {0,1} b {2,3} c {3,0} | d {3,0} e {0,3}      shared: ab 0, bc 1, de 2
    The pair cd crosses the samples and does not count, though it shares everything.
    """
    ids = [[[0, 1], [0, 1]], [[1, 0], [2, 3]], [[1, 2], [3, 0]], [[1, 2], [3, 0]], [[3, 0], [0, 3]]]
    return Trace(np.array(ids, np.uint8), window_segments(3, 2) + window_segments(2, 1), 4)


def test_ecr_and_lal_by_hand() -> None:
    trace = by_hand()
    # Prefill has the pair ab: ECR 2/2 and 0/2; LAL 1/2 · 1 + 2/2 · 0.
    assert locality(trace, Phase.PREFILL) == Locality(1, 0.5, None, 0.5, (1.0, 0.0), None, (0.5, 0.0))
    # Decode has bc and de: ECR (1 + 0)/4 and (1 + 2)/4; LAL 1/2 · 1/4 + 2/2 · 3/4.
    assert locality(trace, Phase.DECODE) == Locality(2, 0.5, None, 0.875, (0.25, 0.75), None, (0.125, 0.75))
    # All: ECR (2 + 1 + 0)/6 and (0 + 1 + 2)/6; LAL 1/2 · 1/2 + 2/2 · 1/2.
    assert locality(trace) == Locality(3, 0.5, None, 0.75, (0.5, 0.5), None, (0.25, 0.5))
    assert locality_by_phase(trace)["all"] == locality(trace)


def test_gds_by_hand() -> None:
    """One layer, three experts. Scores (3,4,0), (4,3,0), (0,0,5), (0,0,0): cosines 24/25, 0, and 0 with the token without scores."""
    scores = np.array([[[3, 4, 0]], [[4, 3, 0]], [[0, 0, 5]], [[0, 0, 0]]], np.uint16)
    trace = Trace(np.array([[[0]], [[0]], [[2]], [[2]]], np.uint8), window_segments(4, 2), 3, scores)
    result = locality(trace)
    assert result.gds == pytest.approx((0.98 + 0.5 + 0.5) / 3)
    assert locality(trace, Phase.PREFILL).gds_per_layer == pytest.approx((0.98,))
    assert locality(trace, Phase.DECODE).gds == pytest.approx(0.5)
    large = Trace(trace.ids, trace.segments, 3, np.full((4, 1, 3), 65535, np.uint16))
    assert locality(large).gds == pytest.approx(1.0)  # squares that no 32-bit integer holds


def test_a_turn_goes_on_where_the_last_one_ended() -> None:
    """A prefill segment without the sample flag follows decode: its first token has the last decoded one before it."""
    segments = (
        Segment(1, Phase.PREFILL, begins_sample=True, hand_over=True, position=0),
        Segment(1, Phase.DECODE, begins_sample=False, hand_over=False, position=1),
        Segment(1, Phase.PREFILL, begins_sample=False, hand_over=False, position=2),
    )
    trace = Trace(np.array([[[0]], [[1]], [[1]]], np.uint8), segments, 2)
    assert locality(trace, Phase.PREFILL).ecr == 1.0
    assert locality(trace, Phase.DECODE).ecr == 0.0


def test_no_pair_no_number() -> None:
    trace = Trace(np.zeros((2, 1, 1), np.uint8), window_segments(1, 0) * 2, 2)
    assert locality(trace) == Locality(0, None, None, None, None, None, None)
    assert locality(by_hand(), Phase.PREFILL).pairs == 1


def test_metrics_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = synthetic_trace(300, 3, 16, 4, stickiness=0.5, sample_tokens=70, prompt_tokens=20)
    whole = locality_by_phase(trace)
    monkeypatch.setattr("cfmoe.trace.metrics._PIECE", 100)
    for phase, value in locality_by_phase(trace).items():
        assert value.ecr_per_layer == pytest.approx(whole[phase].ecr_per_layer)
        assert value.pairs == whole[phase].pairs


def test_synthetic_trace_is_the_same_for_the_same_seed() -> None:
    arguments: dict[str, Any] = {"tokens": 50, "layers": 2, "experts": 300, "top_k": 5, "stickiness": 0.5, "sample_tokens": 20}
    one, same, other = (synthetic_trace(**arguments, seed=seed).to_bytes() for seed in (1, 1, 2))
    assert one == same != other


def test_synthetic_segments() -> None:
    trace = synthetic_trace(25, 1, 4, 2, sample_tokens=10, prompt_tokens=4)
    assert trace.segments == window_segments(10, 4) * 2 + window_segments(5, 4)


def test_synthetic_popularity() -> None:
    """Top-1 without stickiness: the counts are those of the Zipf distribution, and each layer has another favourite order."""
    trace = synthetic_trace(1_000, 80, 8, 1, zipf=1.2)
    weights = np.arange(1, 9) ** -1.2
    counts = np.stack([np.bincount(trace.ids[:, layer, 0], minlength=8) for layer in range(80)])
    shares = np.sort(counts, axis=1)[:, ::-1].mean(0) / 1_000
    assert shares == pytest.approx(weights / weights.sum(), abs=0.008)
    assert len(set(counts.argmax(1).tolist())) == 8


def test_synthetic_draws_without_replacement_by_weight() -> None:
    """Two of three experts with weights 1, 1/2, 1/3: the expert with weight 1 is left out with probability
    p(2)·p(3|2) + p(3)·p(2|3) = 3/11 · 2/8 + 2/11 · 3/9 = 17/132."""
    trace = synthetic_trace(1_000, 80, 3, 2, zipf=1.0)
    most = [np.bincount(trace.ids[:, layer].ravel(), minlength=3).max() for layer in range(80)]
    assert 1 - np.mean(most) / 1_000 == pytest.approx(17 / 132, abs=0.005)


def test_synthetic_stickiness() -> None:
    """Equal popularity, top-2 of 16. Of a token's two experts none, one or both are kept with probability 1/4, 1/2 and 1/4:

    none: two of 16 are drawn, of which 2 · 2/16 were there before; one: one of the 15 others, 1 of them there before; so
    ECR = (1/4 · 1/4 + 1/2 · (1 + 1/15) + 1/4 · 2) / 2 = 0.5479. Without stickiness it is chance, 2/16; with all of it 1.
    """
    expected = {0.0: 2 / 16, 0.5: (1 / 16 + 16 / 30 + 1 / 2) / 2, 1.0: 1.0}
    for stickiness, ecr in expected.items():
        trace = synthetic_trace(1_000, 80, 16, 2, zipf=0.0, stickiness=stickiness, sample_tokens=250)
        assert locality(trace).ecr == pytest.approx(ecr, abs=0.004)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"stickiness": 1.5}, "stickiness 1.5 is not a probability"),
        ({"zipf": math.nan}, "zipf nan is not an exponent"),
        ({"top_k": 9}, "top-9 of 8 experts"),
        ({"tokens": 0}, "0 tokens"),
    ],
)
def test_synthetic_arguments(change: dict[str, Any], expected: str) -> None:
    with pytest.raises(CFMoEError, match=expected):
        synthetic_trace(**({"tokens": 5, "layers": 1, "experts": 8, "top_k": 2} | change))


LAYERS = [
    np.array([[[0, 1], [2, 3], [4, 5]], [[6, 7], [0, 1], [2, 3]]]),  # (batch 2, seq 3, top_k 2)
    np.array([[[7, 6], [5, 4], [3, 2]], [[1, 0], [7, 6], [5, 4]]]),
]


def check_import(trace: Trace, masked: bool) -> None:
    """With the mask, the first row has padding on its left, the second on its right."""
    tokens = [[[0, 1], [7, 6]], [[2, 3], [5, 4]], [[4, 5], [3, 2]], [[6, 7], [1, 0]], [[0, 1], [7, 6]], [[2, 3], [5, 4]]]
    expected = [tokens[i] for i in ((1, 2, 3, 4) if masked else range(6))]
    assert trace.ids.tolist() == expected
    assert trace.segments == window_segments(2 if masked else 3, 1) * 2
    assert trace.experts == 8
    assert trace.ids.dtype == np.uint8


MASK = np.array([[0, 1, 1], [1, 1, 0]])


def test_import_from_memory() -> None:
    import torch

    check_import(trace_from_layers(LAYERS, 8, prompt_tokens=1), masked=False)
    check_import(trace_from_layers(LAYERS, 8, MASK, prompt_tokens=1), masked=True)
    tensors = [torch.tensor(layer) for layer in LAYERS]
    check_import(trace_from_layers(tensors, 8, torch.tensor(MASK).bool(), prompt_tokens=1), masked=True)
    assert trace_from_layers(LAYERS, 300).ids.dtype == np.uint16


def test_import_from_files(tmp_path: Path) -> None:
    import torch

    tensors = [torch.tensor(layer) for layer in LAYERS]
    torch.save(tensors, tmp_path / "list.pt")
    torch.save(torch.stack(tensors), tmp_path / "stacked.pth")
    torch.save({"layers": tensors, "attention_mask": torch.tensor(MASK)}, tmp_path / "masked.pt")
    np.savez(tmp_path / "plain.npz", *LAYERS)
    np.savez(tmp_path / "masked.npz", *LAYERS, attention_mask=MASK)
    for name in ("list.pt", "stacked.pth", "plain.npz", "masked.pt", "masked.npz"):
        check_import(load_layers(tmp_path / name, 8, prompt_tokens=1), masked=name.startswith("masked"))


@pytest.mark.parametrize(
    ("layers", "mask", "expected"),
    [
        ([], None, "has 0 layers"),
        ([LAYERS[0], LAYERS[1][:, :2]], None, "layer 1 has the shape (2, 2, 2)"),
        ([LAYERS[0][0]], None, "layer 0 has the shape (3, 2)"),
        ([LAYERS[0].astype(float)], None, "layer 0 is float64, but expert ids are integers"),
        ([LAYERS[0] + 1], None, "expert 8 is not one of 8 experts; give the right number"),
        ([LAYERS[0] - 1], None, "expert -1 is not one of 8 experts"),
        ([LAYERS[0] * 0], None, "expert 0 is chosen twice"),
        ([LAYERS[0][:0]], None, "tokens is 0"),
        (LAYERS, MASK[:1], "attention_mask is not zeros and ones of the shape (2, 3)"),
        (LAYERS, MASK * 2, "attention_mask is not zeros and ones"),
        (LAYERS, MASK * [[1], [0]], "row 1 has no token"),
        ([[[[1, 2], [3]]]], None, "layer 0 is not an array"),
    ],
)
def test_what_cannot_be_imported(layers: list[Any], mask: Any, expected: str) -> None:
    with pytest.raises(CFMoEError) as caught:
        trace_from_layers(layers, 8, mask, where="x.npz")
    assert expected in str(caught.value)
    assert str(caught.value).startswith("x.npz")


class Evil:
    """What must never run."""

    def __reduce__(self) -> Any:
        return (subprocess.check_call, ([sys.executable, "-c", "open('evil', 'w').close()"],))


@pytest.mark.parametrize("name", ["a.pt", "b.pt", "c.npz", "d.npz", "e.pt", "f.csv", "g.pt"])
def test_files_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    import torch

    monkeypatch.chdir(tmp_path)
    torch.save([Evil()], "a.pt")
    Path("b.pt").write_bytes(b"no tensors")
    np.savez("c.npz", np.array([Evil()], dtype=object))
    Path("d.npz").write_bytes(pickle.dumps([1]))
    torch.save({"other": 1}, "e.pt")
    Path("f.csv").write_text("1,2")
    with pytest.raises(CFMoEError, match=name.replace(".", r"\.")):
        load_layers(Path(name), 8)
    assert not Path("evil").exists()

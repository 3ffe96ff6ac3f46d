"""Evaluation against transformers' own loss, against counts by hand, and over batches and processes that may change nothing."""

from __future__ import annotations

import csv
import itertools
import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from cfmoe.errors import CFMoEError
from cfmoe.runtime import Simulator
from cfmoe.trace import Trace, window_segments
from cfmoe.tune.checkpoint import load_model, load_tokenizer
from cfmoe.tune.data import Tokens, encode_examples
from cfmoe.tune.elastic import adapt, save_adapter
from cfmoe.tune.evaluate import Evaluation, Scored, evaluate, rouge, summarise
from cfmoe.tune.evaluation import run
from cfmoe.tune.evaluation_report import RELEASED, compare
from cfmoe.tune.hits import size_for_hit_rate
from cfmoe.tune.routers import RouterRecorder, find_moe_layers
from cfmoe.tune.tasks import Example
from conftest import _shared
from support import ROOT, load_script

QUESTIONS = [
    Example("Question: is water wet?\nAnswer:", "yes", "is water wet?", True),
    Example("Question: is a cat a plant that grows in the garden?\nAnswer:", "no", "is a cat a plant?", False),
    Example("Question: can birds fly?\nAnswer:", "yes", "can birds fly?", True),
]


@pytest.fixture(scope="session")
def model(demo_model: Path) -> Any:
    return load_model(demo_model, torch.device("cpu"))


@pytest.fixture(scope="session")
def sequences(demo_model: Path) -> list[Tokens]:
    return encode_examples(QUESTIONS, load_tokenizer(demo_model), 0, 64)


def evaluated(model: Any, demo_model: Path, sequences: list[Tokens], **options: Any) -> Evaluation:
    settings: dict[str, Any] = {"end": 0, "pad": 1, "new_tokens": 6, "batch_size": 2} | options
    found = evaluate(model, sequences, QUESTIONS, load_tokenizer(demo_model), **settings)
    assert found is not None
    return found


def test_perplexity_is_that_of_the_reference_answer(model: Any, demo_model: Path, sequences: list[Tokens]) -> None:
    found = evaluated(model, demo_model, sequences)
    nats, count = 0.0, 0
    for one in sequences:
        labels = torch.tensor([[-100] * one.answer + one.ids[one.answer :]])
        predicted = len(one.ids) - one.answer
        with torch.no_grad():
            nats += model(input_ids=torch.tensor([one.ids]), labels=labels).loss.item() * predicted
        count += predicted
    assert found.metrics["predicted_tokens"] == count
    assert found.metrics["nats_per_token"] == pytest.approx(nats / count, rel=1e-5)
    assert found.metrics["perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-5)


def test_consistency_is_counted_as_by_hand(model: Any, demo_model: Path, sequences: list[Tokens]) -> None:
    found = evaluated(model, demo_model, sequences)
    shared, pairs = 0, 0
    for one, scored in zip(sequences, found.scored, strict=True):
        with torch.no_grad(), RouterRecorder(model) as recorder:
            model(input_ids=torch.tensor([one.ids]))
            for layer, ids in enumerate(recorder.ids):
                chosen = [set(row) for row in ids.tolist()]
                assert chosen == [set(row) for row in scored.ids[:, layer].tolist()]
                shared += sum(len(a & b) for a, b in itertools.pairwise(chosen))
        pairs += len(one.ids) - 1
    assert found.metrics["ecr"] == pytest.approx(shared / (pairs * 6 * 4))
    assert 0 < found.metrics["gds"] < 1 and found.metrics["lal"] > 0
    assert len(found.ecr_per_layer) == 6


def test_answers_are_the_models_greedy_ones(model: Any, demo_model: Path, sequences: list[Tokens]) -> None:
    found = evaluated(model, demo_model, sequences)
    tokenizer = load_tokenizer(demo_model)
    for one, scored in zip(sequences, found.scored, strict=True):
        tokens = list(one.ids[: one.answer])
        for _ in range(6):
            with torch.no_grad():
                following = int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax())
            if following == 0:
                break
            tokens.append(following)
        assert scored.written == tokenizer.decode(tokens[one.answer :]).strip()
        with torch.no_grad(), RouterRecorder(model) as recorder:
            model(input_ids=torch.tensor([tokens]))
            layers = [[set(row) for row in ids.tolist()] for ids in recorder.ids]
        rate = np.mean([len(a & b) / 4 for chosen in layers for a, b in itertools.pairwise(chosen)])
        assert scored.written_ecr == pytest.approx(rate, rel=1e-6)
    assert found.right == [example.is_right(one.written or "") for example, one in zip(QUESTIONS, found.scored, strict=True)]
    assert found.metrics["accuracy"] == sum(map(bool, found.right)) / 3


def test_batches_change_nothing(model: Any, demo_model: Path, sequences: list[Tokens]) -> None:
    one = evaluated(model, demo_model, sequences, batch_size=1)
    all_together = evaluated(model, demo_model, sequences, batch_size=8)
    assert one.metrics == pytest.approx(all_together.metrics, rel=1e-5)
    assert one.chr == all_together.chr
    assert [s.written for s in one.scored] == [s.written for s in all_together.scored]


def test_hit_rates_are_the_simulators(model: Any, demo_model: Path, sequences: list[Tokens]) -> None:
    found = evaluated(model, demo_model, sequences, policies=["lru", "opt"], sizes=["25%", "96"])
    trace = Trace(
        np.concatenate([one.ids for one in found.scored]),
        tuple(segment for one in sequences for segment in window_segments(len(one.ids), one.answer)),
        32,
    )
    with Simulator(trace) as simulator:
        for row in found.chr:
            simulation = simulator.run(row["policy"], row["cache_experts"])
            assert row["chr"] == getattr(simulation, row["phase"]).chr
    assert {(row["policy"], row["cache_experts"], row["phase"]) for row in found.chr} == {
        (policy, size, phase) for policy in ("lru", "opt") for size in (48, 96) for phase in ("prefill", "decode", "all")
    }


def scored_by_hand(index: int, written: str) -> Scored:
    ids = np.array([[[0, 1]], [[0, 2]], [[0, 2]]], np.uint8)
    scores = np.full((3, 1, 4), 16384, np.uint16)
    return Scored(index, 2.0, 2, ids, scores, written, 0.25 * (1 + index))


def test_summary_by_hand() -> None:
    sequences = [Tokens([1, 2, 3], 1, "a"), Tokens([1, 2, 3], 1, "b")]
    examples = [Example("p", "B) two", "q", "B", ("one", "two")), Example("p", "A) one", "q", "A", ("one", "two"))]
    found = summarise([scored_by_hand(0, "B"), scored_by_hand(1, "(B)")], sequences, examples, 4, ["lru"], ["100%"])
    assert found.metrics["nats_per_token"] == 1.0
    assert found.metrics["accuracy"] == 0.5 and found.right == [True, False]
    assert found.metrics["ecr"] == 0.75  # one of two, then two of two
    assert found.metrics["gds"] == pytest.approx(1.0, abs=1e-3)
    assert found.metrics["ecr_written"] == pytest.approx(0.375)
    assert found.metrics["nats_per_token a"] == found.metrics["nats_per_token b"] == 1.0
    # A cache of everything, cold for each: of 6 choices 0, 1 and 2 miss once; the prompt is the first token.
    assert {row["phase"]: (row["accesses"], row["hits"]) for row in found.chr}["all"] == (12, 6)


def test_rouge_by_hand() -> None:
    # Of "the cat sat" and "the cat ran fast": two of three and two of four words, one of two and one of three pairs, the cat in order.
    found = rouge([("the cat sat", "the cat ran fast")])
    assert found["rouge1"] == pytest.approx(2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))
    assert found["rouge2"] == pytest.approx(2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3))
    assert found["rougeL"] == pytest.approx(found["rouge1"])
    assert rouge([("a b", "a b"), ("a b", "c d")])["rouge1"] == 0.5


def rates(*points: tuple[float, float]) -> list[dict[str, Any]]:
    return [{"policy": "lru", "phase": "all", "cache_fraction": size, "chr": rate} for size, rate in points]


def test_memory_for_equal_hit_rate_by_hand() -> None:
    curve = rates((0.25, 0.4), (0.5, 0.8), (0.75, 0.9))
    assert size_for_hit_rate(curve, "lru", 0.6) == pytest.approx(0.375)
    assert size_for_hit_rate(curve, "lru", 0.8) == 0.5
    assert size_for_hit_rate(curve, "lru", 0.3) == 0.25
    assert size_for_hit_rate(curve, "lru", 0.95) is None
    base = Evaluation({"perplexity": 8.0, "ecr": 0.3}, (), rates((0.25, 0.4), (0.5, 0.7), (0.75, 0.9)), [], [])
    tuned = Evaluation({"perplexity": 8.04, "ecr": 0.4}, (), rates((0.25, 0.6), (0.5, 0.8), (0.75, 0.9)), [], [])
    found = compare(base, tuned)
    assert found["perplexity_percent"] == pytest.approx(0.5)
    assert found["ecr_gain"] == pytest.approx(0.1)
    assert [one["saved"] for one in found["equal_hit_rate"]] == pytest.approx([0.0, 0.25, 0.0])


# --- files ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory, demo_model: Path) -> Path:
    """The embedded model's routers, shaken."""
    model = load_model(demo_model, torch.device("cpu"))
    routers = [layer.router_name for layer in find_moe_layers(model)]
    adapt(model, routers, "router")
    torch.manual_seed(0)
    with torch.no_grad():
        for name in routers:
            weight = model.get_submodule(name).weight
            weight += 0.3 * weight.std() * torch.randn_like(weight)
    path = tmp_path_factory.mktemp("adapter")
    save_adapter(model, path)
    return path


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_base_and_adapter_side_by_side(demo_model: Path, adapter: Path, tmp_path: Path) -> None:
    data = tmp_path / "boolq.json"
    data.write_text(json.dumps([{"question": example.label, "answer": str(example.gold).lower()} for example in QUESTIONS]))
    out = tmp_path / "out"
    found = run(demo_model, adapter, "boolq", data, out=out, sizes=["25%", "50%"], device="cpu")
    assert found is not None and list(found) == ["base", "tuned"]
    assert found["base"].metrics["perplexity"] != found["tuned"].metrics["perplexity"]
    results = json.loads((out / "results.json").read_text())
    assert results["base"]["metrics"] == found["base"].metrics and results["task"] == "boolq" and results["sequences"] == 3
    assert results["comparison"]["equal_hit_rate"][1]["cache_fraction"] == 0.5
    metrics = {row["metric"]: row for row in rows_of(out / "metrics.csv")}
    assert float(metrics["perplexity"]["tuned"]) == found["tuned"].metrics["perplexity"]
    hits = rows_of(out / "hit_rates.csv")
    assert {row["model"] for row in hits} == {"base", "tuned"} and len(hits) == len(found["base"].chr) * 2
    answers = rows_of(out / "examples.csv")
    assert [row["reference"] for row in answers] == ["yes", "no", "yes"]
    released = rows_of(out / "released.csv")
    assert tuple(released[0]) == RELEASED
    assert [row["Input"] for row in released] == [example.label for example in QUESTIONS]
    assert float(released[0]["ECR_CFMoE"]) == pytest.approx(found["tuned"].scored[0].written_ecr, abs=1e-6)
    assert (out / "hit_rates.png").stat().st_size > 1000 and (out / "ecr_by_layer.png").stat().st_size > 1000

    with pytest.raises(CFMoEError, match="exists already; choose another --out"):
        run(demo_model, None, "boolq", data, out=out, device="cpu")
    assert run(demo_model, None, "boolq", data, out=out, new_tokens=0, device="cpu", force=True)
    assert not (out / "released.csv").exists()


def test_released_columns_are_those_of_released_data() -> None:
    with open(_shared("data/wikitext_evaluation.csv"), encoding="utf-8-sig", newline="") as file:
        table = csv.DictReader(file)
        rows = list(table)
    assert tuple(table.fieldnames or ()) == RELEASED
    means = [sum(float(row[name]) for row in rows) / len(rows) for name in ("ECR_Baseline", "ECR_CFMoE")]
    assert means == pytest.approx([0.326, 0.442], abs=5e-4)


def test_a_text_is_measured_by_domain(demo_model: Path, tmp_path: Path) -> None:
    data = tmp_path / "text.jsonl"
    data.write_text("\n".join(json.dumps({"domain": d, "text": f"A text about {d}, of a few words."}) for d in ("cats", "dogs")))
    found = run(demo_model, None, None, data, out=tmp_path / "out", sizes=["50%"], device="cpu")
    assert found is not None
    metrics = found["base"].metrics
    assert {"nats_per_token cats", "nats_per_token dogs"} <= set(metrics) and "accuracy" not in metrics
    mean = (metrics["nats_per_token cats"] + metrics["nats_per_token dogs"]) / 2
    assert metrics["nats_per_token"] == pytest.approx(mean, rel=0.1)


def test_a_file_that_is_no_earlier_output_is_kept(demo_model: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    with pytest.raises(CFMoEError, match="is no earlier output"):
        run(demo_model, None, "boolq", None, out=tmp_path, device="cpu", force=True)
    assert (tmp_path / "mine").exists()


def test_data_that_is_not_there_is_told_before_a_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(CFMoEError, match=r"cannot read nowhere.txt: no such file or directory"):
        run(tmp_path, None, None, Path("nowhere.txt"), out=tmp_path / "out", device="cpu")


def test_two_processes_measure_the_same(demo_model: Path, tmp_path: Path) -> None:
    data = tmp_path / "boolq.json"
    data.write_text(json.dumps([{"question": example.label, "answer": str(example.gold).lower()} for example in QUESTIONS]))
    alone = run(demo_model, None, "boolq", data, out=tmp_path / "one", sizes=["25%"], device="cpu")
    assert alone is not None
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port, "-m", "cfmoe.cli", "evaluate", demo_model]
    options = ["--task", "boolq", "--data", data, "--out", tmp_path / "two", "--cache", "25%", "--device", "cpu", "--json"]
    done = subprocess.run(
        [sys.executable, *map(str, [*launch, *options])],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    together = json.loads(done.stdout)["base"]
    assert together["metrics"] == pytest.approx(alone["base"].metrics, rel=1e-6)
    assert together["hit_rates"] == alone["base"].chr


# --- the benchmark's own counts ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return load_script(ROOT / "benchmarks" / "locality_measure.py")


def test_the_benchmarks_lru_is_the_simulators(benchmark: ModuleType) -> None:
    layers, batch, seq, top_k, experts = 3, 2, 50, 2, 8
    generator = torch.Generator().manual_seed(0)
    skew = torch.rand(layers, batch, seq, experts, generator=generator) ** 3 + torch.linspace(0, 0.5, experts)
    ids = skew.topk(top_k, dim=-1).indices
    real = torch.ones(batch, seq, dtype=torch.bool)
    real[1, 30:] = False
    curve = benchmark.lru_hits(ids, real, experts)
    rows = [ids[:, row, : int(real[row].sum())].transpose(0, 1).numpy().astype(np.uint8) for row in range(batch)]
    trace = Trace(np.concatenate(rows), tuple(s for row in rows for s in window_segments(len(row), 0)), experts)
    with Simulator(trace) as simulator:
        for size in range(top_k, layers * experts + 1):
            assert simulator.run("lru", size).decode.hits == curve[size].item(), size
    assert benchmark.consistency(ids, real).sum().item() == pytest.approx(
        sum(
            len(set(a) & set(b)) / top_k
            for row in rows
            for layer in range(layers)
            for a, b in zip(row[:, layer].tolist(), row[1:, layer].tolist(), strict=False)
        )
    )


def test_the_benchmarks_memory_for_equal_hit_rate(benchmark: ModuleType) -> None:
    base, tuned = [0.0, 0.2, 0.4, 0.6, 0.8], [0.0, 0.3, 0.5, 0.7, 0.8]
    assert benchmark.equal_hit_size(base, tuned) == pytest.approx(1.5 / 4)
    assert benchmark.equal_hit_size(base, base) == 0.5


def test_progress_is_reported(model: Any, demo_model: Path, sequences: list[Tokens]) -> None:
    seen: list[str] = []
    evaluated(model, demo_model, sequences, progress=lambda stage, done, total: seen.append(stage))
    assert {"scoring", "answering"} <= set(seen)

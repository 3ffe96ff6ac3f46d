"""The recipe on a tiny random model: what a split batch, a resumed run or a second process may not change."""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from cfmoe.errors import CFMoEError
from cfmoe.tune import recipe as recipes
from cfmoe.tune.average import TailAverage
from cfmoe.tune.checkpoint import load_model
from cfmoe.tune.elastic import load_adapter
from cfmoe.tune.merged import save_merged
from cfmoe.tune.recipe import Recipe, tune
from cfmoe.tune.schedule import QualityBudget, weight_at
from cfmoe.tune.trainer import LocalityTrainer, balance_loss
from moe_models import random_tokens, tiny_model
from support import ROOT

WORDS = ["the", "a", "cat", "dog", "house", "tree", "sees", "finds", "likes", "small", "large", "red", "old", "and", "or", "of", "in", "on"]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, demo_model: Path) -> Path:
    """A tiny random Qwen3-MoE with the embedded model's tokenizer."""
    path = tmp_path_factory.mktemp("tiny") / "model"
    tiny_model("qwen3_moe", vocab_size=8192, mlp_only_layers=[], eos_token_id=0, pad_token_id=1, bos_token_id=0).save_pretrained(path)
    shutil.copy(demo_model / "tokenizer.json", path)
    return path


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty documents of two domains in a small language of their own."""
    import random

    draw = random.Random(0)
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    rows = [{"domain": "ab"[i % 2], "text": " ".join(draw.choices(WORDS, k=20 + i))} for i in range(40)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def base(checkpoint: Path, corpus: Path, tmp_path: Path) -> Recipe:
    return Recipe(
        checkpoint,
        tmp_path / "out",
        data=corpus,
        held_out=0.2,
        max_length=48,
        rank=4,
        locality="overlap",
        locality_weight=0.5,
        distill=0.0,
        aux_loss_alpha=0.01,
        steps=3,
        batch_size=4,
        learning_rate=1e-2,
        device="cpu",
    )


def losses(summary: dict[str, Any]) -> list[float]:
    return [entry["loss"] for entry in summary["log"]]


def follow(recipe: Recipe, **options: Any) -> dict[str, Any]:
    summary = tune(recipe, **options)
    assert summary is not None
    return summary


# --- what comes out ---------------------------------------------------------------------------------------------------------------


def test_adapter_and_merged_checkpoint_predict_the_same(base: Recipe) -> None:
    seen: list[tuple[str, int, int]] = []
    summary = tune(base, progress=lambda *state: seen.append(state))
    assert summary == json.loads((base.out / "tune.json").read_text())
    assert seen == [("training", step, 3) for step in (1, 2, 3)]
    assert {path.name for path in base.out.iterdir()} >= {"adapter", "merged", "tune.json", "log"}
    assert any((base.out / "log").iterdir())
    assert (base.out / "merged" / "config.json").read_bytes() == (base.model / "config.json").read_bytes()
    assert (base.out / "merged" / "tokenizer.json").read_bytes() == (base.model / "tokenizer.json").read_bytes()
    tokens, device = random_tokens(), torch.device("cpu")
    with torch.no_grad():
        untuned = load_model(base.model, device)(input_ids=tokens).logits
        merged = load_model(base.out / "merged", device)(input_ids=tokens).logits
        adapted = load_adapter(load_model(base.model, device), base.out / "adapter")(input_ids=tokens).logits
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-4)
    assert (merged - untuned).abs().max() > 0.01


def test_training_lowers_the_loss_and_locality_raises_consistency(base: Recipe) -> None:
    plain = follow(replace(base, locality="none", steps=25))
    local = follow(replace(base, out=base.out.with_name("local"), locality_weight=5.0, steps=25))
    for summary in (plain, local):
        assert summary["after"]["loss"] < summary["before"]["loss"] - 0.1
        assert {"loss_a", "loss_b"} <= set(summary["after"])
    assert local["after"]["ecr"] > max(local["before"]["ecr"], plain["after"]["ecr"]) + 0.05
    assert local["after"]["locality"] < local["before"]["locality"]


def test_elastic_ranks_follow_the_profile(base: Recipe) -> None:
    summary = follow(replace(base, elastic_threshold=1.0, elastic_rank_budget=9, steps=1))
    ecr, ranks = summary["ecr_profiled_per_layer"], summary["ranks"]
    assert sum(ranks) == 9
    assert sorted(range(3), key=lambda layer: ecr[layer]) == sorted(range(3), key=lambda layer: -ranks[layer])
    assert summary["trained_parameters"] < summary["model_parameters"]


@pytest.mark.parametrize("adapter", ["router", "full"])
def test_other_adapters_are_merged_too(base: Recipe, adapter: str) -> None:
    summary = follow(replace(base, adapter=adapter, steps=2))
    tokens, device = random_tokens(), torch.device("cpu")
    with torch.no_grad():
        merged = load_model(base.out / "merged", device)(input_ids=tokens).logits
        adapted = load_adapter(load_model(base.model, device), base.out / "adapter")(input_ids=tokens).logits
    torch.testing.assert_close(merged, adapted)
    assert (summary["trained_parameters"] == summary["model_parameters"]) == (adapter == "full")


def test_text_of_its_own_continues_the_datas_beginnings(base: Recipe) -> None:
    recipe = replace(base, own_text=10, distill=1.0)
    model = load_model(base.model, torch.device("cpu"))
    rows, _, pad = recipes.prepare_data(recipe, model)
    written = recipes.own_rows(recipe, model, rows, pad, 1)
    beginnings = {tuple(one.ids[:16]) for row in rows for one in row}
    assert len(written) == 10 and all(len(row) == 1 and len(row[0].ids) == 48 for row in written)
    assert all(tuple(row[0].ids[:16]) in beginnings for row in written)
    assert len({tuple(row[0].ids[16:]) for row in written}) == 10
    summary = follow(recipe)
    assert summary["rows"]["train"] == 10 and summary["steps"] == 3
    with pytest.raises(CFMoEError, match="it needs --distill 1"):
        tune(replace(base, own_text=10))


def test_adapters_are_averaged_and_scaled(base: Recipe, tmp_path: Path) -> None:
    outs = [base.out.with_name(name) for name in ("one", "two")]
    for seed, out in enumerate(outs):
        follow(replace(base, out=out, seed=seed, steps=2))
    adapters = [out / "adapter" for out in outs]
    device = torch.device("cpu")
    start, one, two = (load_model(path, device).state_dict() for path in (base.model, outs[0] / "merged", outs[1] / "merged"))
    save_merged(base.model, adapters, tmp_path / "mean", 0.5)
    save_merged(base.model, adapters[:1], tmp_path / "none", 0.0)
    mean, none = (load_model(tmp_path / name, device).state_dict() for name in ("mean", "none"))
    for name, value in start.items():
        torch.testing.assert_close(none[name], value, rtol=0, atol=0)
        torch.testing.assert_close(mean[name], value + 0.25 * (one[name] - value) + 0.25 * (two[name] - value), rtol=1e-4, atol=1e-5)
    assert not torch.equal(one["model.layers.0.mlp.gate.weight"], two["model.layers.0.mlp.gate.weight"])


def test_the_mean_of_the_last_steps_is_kept(base: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[int, torch.Tensor] = {}
    update = TailAverage.update

    def watch(self: TailAverage, step: int) -> None:
        update(self, step)
        seen[step] = dict(self._parameters())["model.layers.0.mlp.gate.weight"].detach().clone()

    monkeypatch.setattr(TailAverage, "update", watch)
    recipe = replace(base, adapter="router", steps=4, average=0.75, learning_rate_floor=0.5)
    follow(recipe)
    merged = load_model(recipe.out / "merged", torch.device("cpu")).get_parameter("model.layers.0.mlp.gate.weight")
    assert sorted(seen) == [1, 2, 3, 4]
    torch.testing.assert_close(merged, (seen[2] + seen[3] + seen[4]) / 3)
    assert not torch.allclose(merged, seen[4])


def test_the_learning_rate_falls_to_its_floor(base: Recipe) -> None:
    arguments = recipes.training_arguments(replace(base, learning_rate_floor=0.4, steps=20), torch.device("cpu"))
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = transformers.get_scheduler(
        arguments.lr_scheduler_type, optimiser, 1, 20, scheduler_specific_kwargs=arguments.lr_scheduler_kwargs
    )
    rates = []
    for _ in range(20):
        rates.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        schedule.step()
    assert max(rates) == pytest.approx(1.0) and rates[10] == pytest.approx(0.7, abs=0.06)
    assert optimiser.param_groups[0]["lr"] == pytest.approx(0.4)


# --- what may not matter ----------------------------------------------------------------------------------------------------------


def test_accumulated_micro_batches_are_one_batch(base: Recipe) -> None:
    plain = replace(base, aux_loss_alpha=0.0)  # the load of a batch is not the sum of its parts'
    whole = follow(plain)
    parts = follow(replace(plain, out=base.out.with_name("parts"), batch_size=1, accumulate=4))
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)
    assert parts["after"]["loss"] == pytest.approx(whole["after"]["loss"], rel=1e-5)


def test_activations_computed_twice_change_nothing(base: Recipe) -> None:
    kept = follow(base)
    again = follow(replace(base, out=base.out.with_name("again"), gradient_checkpointing=True))
    assert losses(again) == pytest.approx(losses(kept), rel=1e-6)


@pytest.mark.parametrize(("adapter", "average"), [("lora", 0.75), pytest.param("full", 0.0, marks=pytest.mark.slow)])
def test_a_resumed_run_ends_like_one_that_was_never_stopped(
    base: Recipe, monkeypatch: pytest.MonkeyPatch, adapter: str, average: float
) -> None:
    recipe = replace(base, adapter=adapter, steps=4, evaluate_every=2, quality_budget=0.01, aux_loss_alpha=0.0, average=average)
    whole = follow(recipe)
    stopped = replace(recipe, out=base.out.with_name("stopped"))

    def stop(self: LocalityTrainer, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        log(self, logs, start_time)

    log = LocalityTrainer.log
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LocalityTrainer, "log", stop)
        tune(stopped)
    assert not (stopped.out / "merged").exists()
    resumed = follow(stopped, resume=True)
    assert losses(resumed)[-1] == pytest.approx(losses(whole)[-1], rel=1e-5)
    assert resumed["after"]["loss"] == pytest.approx(whole["after"]["loss"], rel=1e-5)
    assert resumed["log"][-1]["locality_weight"] == pytest.approx(whole["log"][-1]["locality_weight"], rel=1e-5)


def test_two_processes_are_one(base: Recipe, tmp_path: Path) -> None:
    """torchrun with gloo: the same rows, counts over both processes, the same losses."""
    one = follow(base)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    out = tmp_path / "two"
    arguments = {
        "--out": out,
        "--data": base.data,
        "--held-out": base.held_out,
        "--max-length": base.max_length,
        "--rank": base.rank,
        "--locality": base.locality,
        "--locality-weight": base.locality_weight,
        "--aux-loss-alpha": base.aux_loss_alpha,
        "--distill": 0,
        "--steps": base.steps,
        "--batch-size": base.batch_size // 2,
        "--learning-rate": base.learning_rate,
        "--device": "cpu",
    }
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port, "-m", "cfmoe.cli", "tune", base.model]
    command = [sys.executable, *map(str, launch), *(str(part) for pair in arguments.items() for part in pair), "--json"]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    two = json.loads(done.stdout)
    assert two["processes"] == 2
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    for name in ("loss", "ecr", "locality", "loss_a"):
        assert two["before"][name] == pytest.approx(one["before"][name], rel=1e-6), name
        assert two["after"][name] == pytest.approx(one["after"][name], rel=1e-3 if name == "ecr" else 1e-4), name


# --- terms of the loss ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", ["lora", "router"])
def test_distillation_starts_at_nothing_to_mend(base: Recipe, adapter: str) -> None:
    recipe = replace(base, adapter=adapter, distill=1.0, locality_weight=0.0, aux_loss_alpha=0.0, learning_rate=1e-6)
    summary = follow(recipe)
    assert losses(summary) == pytest.approx([0.0] * 3, abs=1e-6)
    assert summary["after"]["loss"] == pytest.approx(summary["before"]["loss"], rel=1e-5)


def test_weight_rises_stays_and_falls() -> None:
    weights = [weight_at(step, 10, 2.0, ramp=0.2, release=0.3) for step in range(10)]
    assert weights == pytest.approx([1, 2, 2, 2, 2, 2, 2, 2, 4 / 3, 2 / 3])
    assert [weight_at(step, 4, 3.0, ramp=0.0) for step in range(4)] == [3.0] * 4


def test_quality_budget_settles_where_the_excess_is_what_it_may_be() -> None:
    control = QualityBudget(0.005, start=0.01)
    for _ in range(600):
        control.update(0.02 * control.weight)  # so the budget allows ln(1.005) / 0.02
    assert control.weight == pytest.approx(math.log(1.005) / 0.02, rel=0.05)
    other = QualityBudget(0.005)
    other.load_state_dict(control.state_dict())
    assert other.update(0.01) == control.update(0.01)


@pytest.mark.parametrize("adapter", ["lora", "router"])
def test_a_quality_budget_holds_on_held_out_data(base: Recipe, adapter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(QualityBudget, "update", lambda self, excess: self.weight)  # what training goes by fails
    monkeypatch.setattr(QualityBudget, "__init__", lambda self, budget: setattr(self, "weight", 50.0))
    monkeypatch.setattr(QualityBudget, "state_dict", lambda self: {})
    recipe = replace(base, adapter=adapter, quality_budget=0.002, distill=1.0, steps=8, aux_loss_alpha=0.0)
    summary = follow(recipe)
    assert 0 <= summary["adapter_scale"] < 1
    decided = summary["validation_loss"]
    assert decided["after"] <= decided["before"] + math.log1p(0.002)
    device = torch.device("cpu")
    model = load_model(recipe.out / "merged", device)
    _, held, pad = recipes.prepare_data(recipe, model)
    rows = summary["rows"]
    assert rows["validation"] + rows["held_out"] == len(held)
    # What was written is what was scaled back, and what is reported was measured on the rows that nothing was decided by.
    for part, loss in ((held[1::2], decided["after"]), (held[::2], summary["after"]["loss"])):
        nats = count = 0.0
        for row in part:
            batch = recipes.collate([row], pad, recipe.max_length)
            with torch.no_grad():
                logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
            labels = batch["labels"][:, 1:].flatten()
            nats += torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels, reduction="sum").item()
            count += int((labels != -100).sum())
        assert nats / count == pytest.approx(loss, rel=1e-5)


def test_balance_is_one_where_experts_are_used_alike() -> None:
    logits = torch.zeros(8, 4)
    even = torch.arange(8).remainder(4)[:, None]
    real = torch.ones(8, dtype=torch.bool)
    assert balance_loss([logits], [even], real, lambda x: x, 8).item() == pytest.approx(1.0)
    # All choose expert 0 with probability ¾ of it: 4 · 1 · ¾.
    sure = torch.tensor([math.log(9.0), 0.0, 0.0, 0.0]).expand(8, 4)
    assert balance_loss([sure], [torch.zeros(8, 1, dtype=torch.int64)], real, lambda x: x, 8).item() == pytest.approx(3.0)
    real[4:] = False  # padding does not count
    half = torch.cat([torch.zeros(4, dtype=torch.int64), torch.ones(4, dtype=torch.int64)])[:, None]
    assert balance_loss([sure], [half], real, lambda x: x, 4).item() == pytest.approx(3.0)


def test_early_stopping_stops_and_keeps_the_best(base: Recipe) -> None:
    summary = follow(replace(base, steps=40, evaluate_every=1, early_stopping=2, learning_rate=3.0))
    assert summary["steps"] < 40
    assert summary["after"]["objective"] <= summary["before"]["objective"] * 1.5


# --- refused ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": None}, "neither --task nor --data says what to train on"),
        ({"adapter": "router", "elastic_threshold": 0.3}, "--elastic-threshold is for --adapter lora only"),
        ({"locality": "none", "quality_budget": 0.01}, "--quality-budget does nothing with --locality none"),
        ({"early_stopping": 2}, "--early-stopping needs --evaluate-every"),
        ({"early_stopping": 2, "evaluate_every": 1, "average": 0.5}, "--early-stopping keeps one checkpoint and --average the mean"),
        ({"adapter": "dora", "locality": "jsd"}, "--adapter dora is none of .*; --locality jsd is none of none, js"),
        ({"max_length": 512}, "--max-length 512 is longer than the model's context of 64 tokens"),
        ({"task": "gsm", "data": None}, "task gsm is unknown; choose one of alpaca"),
        ({"task": "mawps", "data": None}, "task mawps is not on the hub in a known form; give its file with --data"),
        ({"model": Path("nowhere")}, "nowhere has no config.json"),
        ({"held_out": 0.0}, "--held-out 0.0 of the data leaves nothing to measure on"),
        ({"batch_size": 4000}, "fewer than a batch of 4000"),
        ({"layer_weights": (1.0,)}, "--layer-weights has 1 values, but the model has 3 MoE layers"),
        ({"elastic_threshold": 0.0}, "--elastic-threshold 0.0 is at or below every layer's ECR"),
    ],
)
def test_what_cannot_be_followed_is_refused(base: Recipe, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CFMoEError, match=message):
        tune(replace(base, **changes))


def test_an_existing_output_is_kept(base: Recipe) -> None:
    base.out.mkdir()
    (base.out / "mine").write_text("x")
    with pytest.raises(CFMoEError, match="exists already; choose another --out"):
        tune(base)
    with pytest.raises(CFMoEError, match="has no checkpoints to resume from"):
        tune(base, resume=True)
    assert (base.out / "mine").exists()


def test_a_loss_that_is_no_number_ends_the_run(base: Recipe) -> None:
    with pytest.raises(CFMoEError, match="use a lower --learning-rate"):
        tune(replace(base, adapter="full", learning_rate=1e30))
    assert not (base.out / "merged").exists()


def test_shipped_configurations_are_what_accelerate_reads() -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    configs = ROOT / "tune" / "configs"
    kinds = {path.stem: str(load_config_from_file(str(path)).distributed_type) for path in configs.glob("*.yaml")}
    assert {name: kind.rpartition(".")[2] for name, kind in kinds.items()} == {
        "ddp": "MULTI_GPU",
        "fsdp": "FSDP",
        "zero2": "DEEPSPEED",
        "zero3": "DEEPSPEED",
    }
    assert recipes.training_arguments  # what they configure

"""cfmoe run --trace, simulate and plan from end to end."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from cfmoe.planner.devices import find_device
from cfmoe.trace import Trace
from cfmoe.trace.synthetic import synthetic_trace
from support import Cli, error_line

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trace") / "synthetic.trace"
    synthetic_trace(300, 6, 32, 4, zipf=0.8, stickiness=0.4, sample_tokens=100, prompt_tokens=30, seed=3).write(path)
    return path


def test_a_recorded_run_is_replayed_to_the_access(cli: Cli, demo_artifact: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.trace"
    run = ["run", demo_artifact, "--prompt", "The committee adopted", "--max-new-tokens", "24", "--memory-budget", "20%"]
    result = cli(*run, "--trace", path, "--json")
    assert result.returncode == 0, result.stderr
    ran = json.loads(result.stdout)
    recorded = Trace.read(path)
    assert recorded.policy == "learned" and recorded.scores is not None and recorded.slots == ran["memory"]["expert_slots"] == 38
    assert "exists" in error_line(cli(*run, "--trace", path))

    result = cli("simulate", path, "--policy", "learned", "--cache", "38", "--json")
    assert result.returncode == 0, result.stderr
    counts = {row["phase"]: row for row in json.loads(result.stdout)["results"]}
    for phase in ("prefill", "decode"):
        assert counts[phase]["hits"] == ran[phase]["hits"]
        assert counts[phase]["accesses"] == ran[phase]["hits"] + ran[phase]["misses"]


def test_simulate_writes_tables_and_pictures(cli: Cli, trace: Path, demo_artifact: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = cli("simulate", trace, "--policy", "lru,opt", "--cache", "10%,96", "--artifact", demo_artifact, "--out", out)
    assert result.returncode == 0, result.stderr
    assert "lru" in result.stdout and "tok/s predicted" in result.stdout
    rows = list(csv.DictReader((out / "results.csv").read_text().splitlines()))
    assert [(row["policy"], row["cache_experts"], row["phase"]) for row in rows] == [
        (policy, size, phase) for policy in ("lru", "opt") for size in ("19", "96") for phase in ("prefill", "decode", "all")
    ]
    document = json.loads((out / "results.json").read_text())
    assert document["semantics"] == "engine" and document["device_profile"] == "oneplus-15r"
    assert [row["hits"] for row in document["results"]] == [int(row["hits"]) for row in rows]
    assert all((out / name).read_bytes().startswith(PNG) for name in ("chr.png", "speed.png"))
    assert "exists" in error_line(cli("simulate", trace, "--out", out))


def test_simulate_imports_what_researchers_save(cli: Cli, tmp_path: Path) -> None:
    chosen = synthetic_trace(40, 2, 8, 2, seed=1).ids.astype(np.int64)
    np.savez(tmp_path / "ids.npz", *(chosen[None, :, layer] for layer in range(2)))
    arguments = ["simulate", tmp_path / "ids.npz", "--policy", "lru", "--cache", "8", "--semantics", "reference", "--json"]
    assert "give --experts" in error_line(cli(*arguments))
    result = cli(*arguments, "--experts", "8")
    assert result.returncode == 0, result.stderr
    everything = {row["phase"]: row for row in json.loads(result.stdout)["results"]}["all"]
    assert everything["accesses"] == 160 and 0 < everything["hits"] < 160


def test_plan_for_a_phone_and_for_a_checkpoint(cli: Cli, trace: Path, demo_artifact: Path, demo_model: Path, tmp_path: Path) -> None:
    picture = tmp_path / "curve.png"
    common = ["--trace", trace, "--policy", "lrfu", "--device-profile", "oneplus-15r", "--context-size", "512"]
    result = cli("plan", demo_artifact, *common, "--out", picture, "--memory-budget", "50%", "--json")
    assert result.returncode == 0, result.stderr
    plan = json.loads(result.stdout)
    budgets = [one["budget_bytes"] for one in plan["curve"]]
    assert budgets == sorted(budgets) and len(budgets) > 10
    assert plan["curve"][-1]["cache_experts"] == 192 and plan["asked"]["cache_experts"] == 96
    assert plan["device"] == find_device("oneplus-15r").as_json()
    assert plan["recommended"]["decode_tokens_per_s"] >= plan["curve"][-1]["decode_tokens_per_s"] / 2
    assert picture.read_bytes().startswith(PNG)
    result = cli("plan", demo_model, *common, "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["recommended"]["cache_experts"] == plan["recommended"]["cache_experts"]


def test_plan_measures_this_machine(cli: Cli, trace: Path, demo_artifact: Path) -> None:
    result = cli("plan", demo_artifact, "--trace", trace, "--policy", "lru", "--context-size", "512")
    assert result.returncode == 0, result.stderr
    assert "recommended: --memory-budget" in result.stdout and "measured" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["simulate", "nowhere"], "cannot read nowhere"),
        (["simulate", "TRACE", "--policy", "best"], "--policy best is unknown; use all, or some of: lru,"),
        (["simulate", "TRACE", "--policy", "learned"], "record it again with --scores"),
        (["simulate", "TRACE", "--policy", "lru", "--cache", "2"], "a cache of 2 experts is smaller than the 4"),
        (["simulate", "TRACE", "--cache", "4MiB"], "give --expert-size"),
        (["simulate", "TRACE", "--lookahead", "5"], "--lookahead 5 does nothing without --policy lopt"),
        (["simulate", "TRACE", "--device-profile", "oneplus-15r"], "does nothing without --artifact"),
        (["simulate", "TRACE", "--experts", "8"], "is for .pt, .pth and .npz"),
        (["plan", "nowhere", "--trace", "TRACE"], "nowhere does not exist"),
        (["plan", "MODEL", "--trace", "TRACE"], "give --device-profile, or compile it first"),
        (["plan", "ARTIFACT", "--trace", "TRACE", "--device-profile", "brick"], "neither a file nor one of"),
        (["plan", "ARTIFACT", "--trace", "TRACE", "--device-profile", "oneplus-15r", "--quant", "q4"], "--quant q4 is for checkpoints"),
        (
            ["plan", "ARTIFACT", "--trace", "TRACE", "--device-profile", "oneplus-15r", "--policy", "lru", "--memory-budget", "1MiB"],
            "smallest",
        ),
        (["run", "ARTIFACT", "--prompt", "x", "--trace-scores"], "--trace-scores does nothing without --trace"),
        (["doctor", "--out", "x.json"], "does nothing without --measure"),
    ],
)
def test_one_line(cli: Cli, arguments: list[str], expected: str, trace: Path, demo_artifact: Path, demo_model: Path) -> None:
    places = {"TRACE": trace, "ARTIFACT": demo_artifact, "MODEL": demo_model}
    assert expected in error_line(cli(*(places.get(argument, argument) for argument in arguments)))

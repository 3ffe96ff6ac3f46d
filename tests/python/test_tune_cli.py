"""cfmoe tune and evaluate from the command line, and the way from checkpoint to tuned, compiled and running artifact."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conftest import _shared
from support import Cli


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text(
        "\n".join(json.dumps({"text": f"Page {i}: the proposal adds a statement that does {i} things. " * 8}) for i in range(12))
    )
    return path


def test_from_checkpoint_to_a_running_tuned_artifact(cli: Cli, demo_model: Path, text: Path, tmp_path: Path) -> None:
    out, artifact = tmp_path / "tuned", tmp_path / "tuned.cfmoe"
    options = ["--max-length", "64", "--batch-size", "2", "--steps", "2", "--device", "cpu", "--quality-budget", "0.5%"]
    done = cli("tune", demo_model, "--data", text, "--out", out, *options, "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["steps"] == 2 and summary["trained_parameters"] > 0
    done = cli("evaluate", demo_model, "--adapter", out / "adapter", "--data", text, "--limit", "3", "--out", tmp_path / "eval", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert {"base", "tuned", "comparison"} <= set(result)
    assert result["tuned"]["metrics"]["perplexity"] != result["base"]["metrics"]["perplexity"]
    assert cli("compile", out / "merged", "--out", artifact, "--quant", "q8").returncode == 0
    done = cli("run", artifact, "--prompt", "The proposal adds", "--max-new-tokens", "8", "--memory-budget", "50%", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["new_tokens"] == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tune", "{model}", "--out", "x"], "neither --task nor --data says what to train on"),
        (["tune", "{model}", "--out", "x", "--task", "gsm8k", "--localty", "js"], "No such option: --localty"),
        (["tune", "{model}", "--out", "x", "--task", "gsm8k", "--locality", "jsd"], "'jsd' is not one of"),
        (["tune", "{model}", "--out", "x", "--task", "gsm8k", "--quality-budget", "-1%"], "--quality-budget -1% is no share"),
        (["tune", "{model}", "--out", "x", "--task", "gsm8k", "--layer-weights", "1,x"], "--layer-weights x is no number"),
        (["evaluate", "{model}", "--out", "x"], "neither --task nor --data says what to evaluate on"),
        (["evaluate", "{model}", "--out", "x", "--data", "y.txt", "--new-tokens", "3"], "--new-tokens 3 is for --task"),
    ],
)
def test_what_the_user_can_mend_is_one_line(cli: Cli, demo_model: Path, arguments: list[str], message: str) -> None:
    done = cli(*[argument.replace("{model}", str(demo_model)) for argument in arguments])
    assert done.returncode == 2, done.stderr
    assert message in done.stderr.splitlines()[-1]
    assert done.stdout == ""


def test_a_task_from_its_sample(cli: Cli, demo_model: Path, tmp_path: Path) -> None:
    data = _shared("data/tasks/samsum/sample.json")
    options = ["--limit", "2", "--max-length", "384", "--new-tokens", "8", "--cache", "50%", "--policy", "all", "--json"]
    done = cli("evaluate", demo_model, "--task", "samsum", "--data", data, "--out", tmp_path / "eval", *options)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)["base"]
    assert {"rouge1", "rouge2", "rougeL", "perplexity", "ecr", "gds", "lal"} <= set(result["metrics"])
    assert len({row["policy"] for row in result["hit_rates"]}) > 4

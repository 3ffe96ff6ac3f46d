"""cfmoe run, bench and inspect on the embedded model: JSON keys, streaming, and what does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from support import Cli, error_line

PROMPT = "The Python language"

PREFILL_KEYS = {"tokens_per_s", "hits", "misses", "prefetched", "bytes_read", "stall_ms"}
DECODE_KEYS = PREFILL_KEYS | {"chr", "first_32_chr"}
MEMORY_KEYS = {
    *(
        "budget_bytes",
        "smallest_budget_bytes",
        "largest_budget_bytes",
        "weights_bytes",
        "kv_bytes",
        "workspace_bytes",
        "pool_bytes",
        "arena_bytes",
        "mapped_bytes",
    ),
    *("expert_slots", "expert_total", "peak_rss_growth_bytes"),
}


def run_json(cli: Cli, artifact: Path, *options: str | Path) -> dict[str, Any]:
    result = cli("run", artifact, "--json", *options)
    assert result.returncode == 0, result.stderr
    value: dict[str, Any] = json.loads(result.stdout)
    return value


def test_json_has_the_keys_of_the_design(cli: Cli, demo_artifact: Path) -> None:
    result = run_json(cli, demo_artifact, "--prompt", PROMPT, "--max-new-tokens", "8")
    assert {"text", "token_ids", "prompt_tokens", "new_tokens", "io", "device", "prefill", "decode", "memory"} <= set(result)
    assert set(result["prefill"]) == PREFILL_KEYS
    assert set(result["decode"]) == DECODE_KEYS
    assert set(result["memory"]) == MEMORY_KEYS
    assert result["new_tokens"] == len(result["token_ids"]) == 8
    decode = result["decode"]
    assert decode["chr"] == pytest.approx(decode["hits"] / (decode["hits"] + decode["misses"]))
    # The last token is never fed: 7 tokens, 6 layers, top-4.
    assert decode["hits"] + decode["misses"] == 7 * 6 * 4


def test_text_streams_to_standard_output(cli: Cli, demo_artifact: Path, tmp_path: Path) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(PROMPT)
    streamed = cli("run", demo_artifact, "--prompt", f"@{prompt}", "--max-new-tokens", "12")
    assert streamed.returncode == 0
    assert "tok/s" in streamed.stderr
    whole = run_json(cli, demo_artifact, "--prompt", PROMPT, "--max-new-tokens", "12")
    assert streamed.stdout == whole["text"] + "\n"


def test_sampling_depends_on_the_seed_and_not_on_the_budget(cli: Cli, demo_artifact: Path) -> None:
    def tokens(seed: int, budget: str) -> list[int]:
        options = ("--temperature", "1.0", "--top-k", "50", "--top-p", "0.9", "--repetition-penalty", "1.1", "--seed", str(seed))
        result = run_json(cli, demo_artifact, "--prompt", PROMPT, "--max-new-tokens", "16", "--memory-budget", budget, *options)
        ids: list[int] = result["token_ids"]
        return ids

    assert tokens(1, "100%") == tokens(1, "25%")
    assert tokens(1, "100%") != tokens(2, "100%")


def test_memory_parts_stay_inside_the_budget(cli: Cli, demo_artifact: Path) -> None:
    memory = run_json(cli, demo_artifact, "--prompt", PROMPT, "--max-new-tokens", "4", "--memory-budget", "14MiB")["memory"]
    parts = ("weights_bytes", "kv_bytes", "workspace_bytes", "pool_bytes", "arena_bytes")
    assert sum(memory[part] for part in parts) <= memory["budget_bytes"] == 14 << 20
    assert memory["peak_rss_growth_bytes"] <= memory["budget_bytes"] + (8 << 20)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--prompt", ""), "--prompt is empty"),
        (("--prompt", "x", "--memory-budget", "1MiB"), "1"),
        (("--prompt", "x", "--memory-budget", "lots"), "'lots' is no size"),
        (("--prompt", "x", "--memory-budget", "0%"), "0%"),
        (("--prompt", "x", "--policy", "clairvoyant"), "clairvoyant"),
        (("--prompt", "word " * 3000), "context"),
        (("--prompt", "x", "--chat"), "has no chat template, the checkpoint brought none; run without --chat"),
    ],
)
def test_what_does_not_fit_is_one_line(cli: Cli, demo_artifact: Path, options: tuple[str, ...], expected: str) -> None:
    assert expected in error_line(cli("run", demo_artifact, *options))


def test_bench_json(cli: Cli, demo_artifact: Path) -> None:
    options = ("--memory-budget", "100%,25%", "--threads", "1,2", "--prompt-tokens", "16", "--new-tokens", "8", "--repeat", "2")
    result = cli("bench", demo_artifact, *options, "--json")
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)["results"]
    assert [(row["memory_budget"], row["threads"]) for row in rows] == [("100%", 1), ("100%", 2), ("25%", 1), ("25%", 2)]
    for row in rows:
        for phase in ("prefill_tokens_per_s", "decode_tokens_per_s"):
            assert 0 < row[phase]["min"] <= row[phase]["median"] <= row[phase]["max"]
    assert rows[0]["chr"] == rows[1]["chr"] >= rows[2]["chr"]


def test_bench_refuses_what_does_nothing(cli: Cli, demo_artifact: Path) -> None:
    assert "--threads zero is not an integer" in error_line(cli("bench", demo_artifact, "--threads", "zero"))
    assert "do not fit the artifact's context" in error_line(cli("bench", demo_artifact, "--prompt-tokens", "4000"))


def test_inspect_json(cli: Cli, demo_artifact: Path) -> None:
    result = cli("inspect", demo_artifact, "--verify", "--json")
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout)
    assert facts["model"]["num_experts"] == 32
    assert facts["experts"]["count"] == 6 * 32
    assert facts["verified_bytes"] == facts["bytes"]["total"]


def test_closed_standard_output_ends_quietly(demo_artifact: Path) -> None:
    import subprocess
    import sys

    process = subprocess.Popen(
        [sys.executable, "-m", "cfmoe.cli", "run", str(demo_artifact), "--prompt", PROMPT, "--max-new-tokens", "64"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert "Traceback" not in process.stderr.read()
    assert process.wait(timeout=120) == 1

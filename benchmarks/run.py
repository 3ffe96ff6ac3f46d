"""Every benchmark in turn: writes JSON into build/bench, then prints the tables of docs/performance.md.

Run as: python benchmarks/run.py, or with --tables to print them again from the JSON that is there

The embedded model is always measured, moe-63m and perplexity where ../shared is beside the checkout.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cfmoe.measure.machine import describe
from cfmoe.runtime import format_size

HERE = Path(__file__).parent
OUT = HERE.parent / "build" / "bench"
SHARED = HERE.parent.parent / "shared"
MODELS = {"demo-moe-13m": HERE.parent / "assets" / "demo-moe-13m", "moe-63m": SHARED / "models" / "moe-63m"}
TEXT = SHARED / "data" / "corpus_eval.jsonl.xz"
PRESETS = ("f32", "mixed", "q4")
SPEED = ("--memory-budget", "100%,50%,25%", "--threads", "1,2", "--prompt-tokens", "512", "--new-tokens", "256", "--repeat", "5")
SCORE = ("--data", TEXT, "--max-bytes", "65536", "--window", "512")

Row = Sequence[object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", action="store_true", help="measure nothing; print the tables of the last run")
    if not parser.parse_args().tables:
        measure()
    for title, header, rows in tables():
        print(f"\n{title}\n\n{line(header)}\n{line(['---'] * len(header))}")
        print("\n".join(line(row) for row in rows))


def measure() -> None:
    """Writes one JSON file per benchmark, then run.json, which says when and on what."""
    OUT.mkdir(parents=True, exist_ok=True)
    for stale in OUT.glob("*.json"):
        stale.unlink()
    started, load = datetime.datetime.now(datetime.UTC), os.getloadavg()
    for name in ("expert_gemv", "packing", "simulator"):
        say(name)
        subprocess.run([sys.executable, HERE / f"{name}.py", "--out", OUT / f"{name}.json"], check=True)
    for name, checkpoint in MODELS.items():
        if not checkpoint.exists():
            say(f"{name} is not beside this checkout and left out")
            continue
        for preset in PRESETS:
            say(f"{name} {preset}: compile")
            cfmoe("compile", checkpoint, "--out", artifact(name, preset), "--quant", preset, "--force")
            if TEXT.exists():
                say(f"{name} {preset}: score")
                (OUT / f"score-{name}-{preset}.json").write_bytes(cfmoe("score", artifact(name, preset), *SCORE, "--json"))
        say(f"{name}: bench")
        (OUT / f"speed-{name}.json").write_bytes(cfmoe("bench", artifact(name, "mixed"), *SPEED, "--json"))
        if not TEXT.exists():
            continue
        for script in ("policies", "planner"):
            say(f"{name}: {script}")
            command = [sys.executable, HERE / f"{script}.py", artifact(name, "mixed"), "--prompt", TEXT]
            subprocess.run([*command, "--out", OUT / f"{script}-{name}.json"], check=True, stdout=subprocess.DEVNULL)
    facts = {"started": started.isoformat(timespec="seconds"), "load_average": load, "machine": describe()}
    (OUT / "run.json").write_text(json.dumps(facts, indent=2) + "\n")


def artifact(model: str, preset: str) -> Path:
    return OUT / f"{model}-{preset}"


def cfmoe(*arguments: str | Path) -> bytes:
    return subprocess.run([sys.executable, "-m", "cfmoe.cli", *arguments], check=True, stdout=subprocess.PIPE).stdout


def say(what: str) -> None:
    print(f"· {what}", file=sys.stderr, flush=True)


def read(name: str) -> dict[str, Any]:
    return json.loads((OUT / f"{name}.json").read_text("utf-8"))


def tables() -> Iterator[tuple[str, Row, list[Row]]]:
    """(title, header, rows) of every table that the JSON files fill."""
    facts = read("run")
    yield (
        "Machine",
        ("fact", "value"),
        [
            ("measured", facts["started"]),
            ("CPU", f"{facts['machine']['cpu']['name']}, {facts['machine']['cpu']['usable_cpus']} usable"),
            ("system", facts["machine"]["os"]),
            ("load average before", ", ".join(f"{value:.2f}" for value in facts["load_average"])),
        ],
    )
    header: Row = ("expert", "threads", "kernel GB/s", "read GB/s", "ratio", "spread")
    yield "Expert kernels against plain reading", header, list(gemv_rows(read("expert_gemv")["results"]))
    header = ("model", "budget", "threads", "memory", "prefill tok/s", "decode tok/s", "CHR", "read per token")
    yield "The engine", header, [row for name in MODELS for row in speed_rows(name)]
    if rows := [row for name in MODELS for row in score_rows(name)]:
        yield "Perplexity", ("model", *PRESETS), rows
    header = ("model", "budget", "policy", "decode tok/s", "CHR", "read per token", "waiting")
    if rows := [row for name in MODELS for row in policy_rows(name)]:
        yield "Cache policies", header, rows
    header = ("model", "budget", "measured tok/s", "predicted tok/s", "error", "prefill ms", "first token predicted ms")
    if rows := [row for name in MODELS for row in planner_rows(name)]:
        yield "The planner's predictions", header, rows
    simulator = read("simulator")
    rows = [(policy, f"{seconds:.1f}") for policy, seconds in simulator["per_policy_seconds"].items()]
    yield "The simulator", ("policy", "seconds"), [*rows, ("all", f"{simulator['seconds']:.1f}")]
    plain = [
        (r["policy"], *(f"{r[key]:,.0f}" for key in ("plain_ns_per_access", "simulator_ns_per_access", "ratio")))
        for r in simulator["plain"]
    ]
    yield "Plain Python against the simulator", ("policy", "plain ns per access", "simulator ns per access", "ratio"), plain
    rates = read("packing")["bf16_mb_per_s"]
    yield "Packing", ("format", "MB/s of bf16"), [(name, interval(rate)) for name, rate in rates.items()]


def gemv_rows(results: dict[str, Any]) -> Iterator[Row]:
    for name, result in results.items():
        for threads in (1, 2):
            r = result[f"threads_{threads}"]
            yield name, threads, r["kernel_gb_per_s"], r["read_gb_per_s"], r["ratio"], f"{r['ratio_min']}–{r['ratio_max']}"


def speed_rows(name: str) -> Iterator[Row]:
    if not (OUT / f"speed-{name}.json").exists():
        return
    for r in read(f"speed-{name}")["results"]:
        rates = (interval(r["prefill_tokens_per_s"]), interval(r["decode_tokens_per_s"]))
        read_bytes = format_size(round(r["decode_bytes_per_token"]))
        yield name, r["memory_budget"], r["threads"], format_size(r["budget_bytes"]), *rates, f"{r['chr']:.3f}", read_bytes


def policy_rows(name: str) -> Iterator[Row]:
    if not (OUT / f"policies-{name}.json").exists():
        return
    for r in read(f"policies-{name}")["results"]:
        read_bytes, waiting = format_size(round(r["decode_bytes_per_token"])), f"{r['stall_share']['median']:.0%}"
        yield name, r["memory_budget"], r["policy"], interval(r["decode_tokens_per_s"]), f"{r['chr']:.3f}", read_bytes, waiting


def planner_rows(name: str) -> Iterator[Row]:
    """Medians over rounds, then the median error of all."""
    if not (OUT / f"planner-{name}.json").exists():
        return
    result = read(f"planner-{name}")
    for budget in dict.fromkeys(row["memory_budget"] for row in result["rows"]):
        own = [row for row in result["rows"] if row["memory_budget"] == budget]
        measured, predicted, error, prefill, first = (
            statistics.median(row[key] for row in own)
            for key in ("measured_tokens_per_s", "predicted_tokens_per_s", "error", "measured_prefill_s", "predicted_first_token_s")
        )
        yield name, budget, f"{measured:,.0f}", f"{predicted:,.0f}", f"{error:+.1%}", f"{prefill * 1e3:.0f}", f"{first * 1e3:.0f}"
    yield name, "all", "", "", f"median of absolute errors {result['median_absolute_error']:.1%}", "", ""


def score_rows(name: str) -> Iterator[Row]:
    if not (OUT / f"score-{name}-f32.json").exists():
        return
    found = {preset: read(f"score-{name}-{preset}")["perplexity"] for preset in PRESETS}
    others = [f"{value:.4f} ({value / found['f32'] - 1:+.2%})" for preset, value in found.items() if preset != "f32"]
    yield name, f"{found['f32']:.4f}", *others


def interval(rate: dict[str, float]) -> str:
    return f"{rate['median']:,.0f} ({rate['min']:,.0f}–{rate['max']:,.0f})"


def line(cells: Row) -> str:
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    main()

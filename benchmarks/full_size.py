"""A model of full size with random weights: written, converted, run at several budgets under direct I/O.

Run as: python benchmarks/full_size.py [MODEL] [--layers N] [--work DIR] [--minutes M] [--out FILE]

MODEL is a name that `cfmoe make-random` knows. Every step is a process of its own, so that peak memory is the step's; whatever is not done
after M minutes is left out and said to be. Budgets take turns, and before every run the storage is measured: two readers, as the engine
has, that are never idle, with reads of an expert's size. Limits are the best that memory and storage did. The checkpoint stays in DIR for
the next run unless --clean.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from cfmoe.artifact import Artifact
from cfmoe.measure.bandwidth import memory_bandwidth, streaming_speed
from cfmoe.measure.machine import describe
from cfmoe.measure.speed import spread
from cfmoe.runtime import format_size

HERE = Path(__file__).parent
PROMPT = "The committee adopted the proposal, and what follows from it is set out below in the order of the sections. "


class OutOfTime(Exception):
    """The minutes are over."""


class Steps:
    """Runs `cfmoe` commands until the time is over."""

    def __init__(self, minutes: float) -> None:
        self.end = time.monotonic() + 60 * minutes

    def run(self, *arguments: object) -> tuple[dict[str, Any], float, int]:
        """(the command's JSON, seconds, its peak resident bytes). Raises OutOfTime, after which the command has ended."""
        start = time.monotonic()
        command = [sys.executable, "-m", "cfmoe.cli", *map(str, arguments), "--json"]
        with tempfile.TemporaryFile() as output:
            process = subprocess.Popen(command, stdout=output)
            while True:
                # Popen's own wait would drop the resource usage of the one child.
                pid, status, usage = os.wait4(process.pid, os.WNOHANG)
                if pid:
                    break
                if time.monotonic() > self.end:
                    process.terminate()
                    process.wait()
                    raise OutOfTime(f"{arguments[0]} was not done in time")
                time.sleep(0.02)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                raise SystemExit(f"cfmoe {arguments[0]} failed with {process.returncode}")
            output.seek(0)
            return json.load(output), time.monotonic() - start, usage.ru_maxrss << 10


def measure(arguments: argparse.Namespace, report: dict[str, Any]) -> None:
    """Fills `report` step by step."""
    steps = Steps(arguments.minutes)
    model, artifact = arguments.work / arguments.model, arguments.work / f"{arguments.model}.cfmoe"
    if not model.exists():
        depth = ["--layers", arguments.layers] if arguments.layers else []
        facts, seconds, peak = steps.run("make-random", arguments.model, "--out", model, "--locality", arguments.locality, *depth)
        report["made"] = {"seconds": seconds, "bytes": facts["bytes"], "peak_bytes": peak}
    report["checkpoint"] = json.loads((model / "random.json").read_text())
    if not artifact.exists():
        facts, seconds, peak = steps.run("compile", model, "--out", artifact, "--quant", arguments.quant, "--resume")
        report["converted"] = {
            "seconds": seconds,
            "bytes": facts["bytes"],
            "source_bytes_per_s": report["checkpoint"]["bytes"] / seconds,
            "peak_bytes": peak,
        }
    if not arguments.rounds:
        return
    opened = Artifact.open(artifact)
    layout, shape = opened.index.experts, opened.manifest.model
    weights = opened.manifest.files["weights.bin"].size
    # The embedding is looked up, not read; this counts it, as one matrix of some thirty.
    active = weights + len(shape.moe_layers) * shape.top_k * layout.record_bytes
    memory = memory_bandwidth(2)
    report["limits"] = {
        "active_bytes_per_token": active,
        "memory_bytes_per_s": memory,
        "memory_bound_tokens_per_s": memory / active,
    }
    experts = artifact / "experts.bin"
    rounds: dict[str, list[dict[str, float]]] = {budget: [] for budget in arguments.budgets.split(",")}
    storage: list[float] = []
    try:
        for _ in range(arguments.rounds):
            for budget, measured in rounds.items():
                storage.append(streaming_speed(experts, layout.record_stride))
                measured.append(_run(steps, artifact, budget, arguments.new_tokens))
    finally:
        report["limits"]["storage_bytes_per_s"] = spread(storage)
        report["runs"] = [_summary(budget, measured, max(storage)) for budget, measured in rounds.items() if measured]


def _run(steps: Steps, artifact: Path, budget: str, new_tokens: int) -> dict[str, float]:
    options = ["--memory-budget", budget, "--io", "direct", "--max-new-tokens", new_tokens, "--context-size", 512]
    options += ["--temperature", 1]  # greedy, random weights repeat one token for ever
    result, _, _ = steps.run("run", artifact, "--prompt", PROMPT, *options)
    decode, kept = result["decode"], result["memory"]
    tokens = max(1, result["new_tokens"] - 1)
    return {
        "prompt_tokens": result["prompt_tokens"],
        "new_tokens": result["new_tokens"],
        "prefill_tokens_per_s": result["prefill"]["tokens_per_s"],
        "decode_tokens_per_s": decode["tokens_per_s"],
        "chr": decode["chr"],
        "bytes_read_per_token": decode["bytes_read"] / tokens,
        "stall_share": decode["stall_ms"] / 1000 / (tokens / decode["tokens_per_s"]),
        "budget_bytes": kept["budget_bytes"],
        "peak_growth_bytes": kept["peak_rss_growth_bytes"],
    }


def _summary(budget: str, measured: list[dict[str, float]], storage_bytes_per_s: float) -> dict[str, Any]:
    """What is the same in every round as it is, the rest as median, least and most."""
    summary: dict[str, Any] = {"memory_budget": budget}
    for name in measured[0]:
        values = [one[name] for one in measured]
        summary[name] = values[0] if len(set(values)) == 1 else spread(values)
    return summary | {
        "storage_bound_tokens_per_s": storage_bytes_per_s / max(1.0, _middle(summary["bytes_read_per_token"])),
        "within_budget": all(one["peak_growth_bytes"] <= one["budget_bytes"] for one in measured),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="olmoe-1b-7b")
    parser.add_argument("--layers", type=int, help="the first layers only")
    parser.add_argument("--locality", type=float, default=0.5)
    parser.add_argument("--quant", default="q4")
    parser.add_argument("--budgets", default="100%,50%,25%")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3, help="runs at every budget; 0: convert only")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--work", type=Path, default=HERE.parent / "build" / "bench" / "full-size")
    parser.add_argument("--out", type=Path, help="where to write the JSON [default: print it]")
    parser.add_argument("--clean", action="store_true", help="remove checkpoint and artifact in the end")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"model": arguments.model, "machine": describe(), "load_average": os.getloadavg(), "runs": []}
    try:
        measure(arguments, report)
    except OutOfTime as error:
        report["left_out"] = str(error)
    text = json.dumps(report, indent=2) + "\n"
    if arguments.out:
        arguments.out.write_text(text)
    else:
        print(text, end="")
    for run in report["runs"]:
        speed, stalled = _middle(run["decode_tokens_per_s"]), _middle(run["stall_share"])
        line = f"{run['memory_budget']}: {speed:.1f} tok/s, {format_size(round(_middle(run['bytes_read_per_token'])))} per token"
        print(f"{line}, stalled {stalled:.0%}, within budget: {run['within_budget']}", file=sys.stderr)
    if arguments.clean:
        for path in (arguments.work / arguments.model, arguments.work / f"{arguments.model}.cfmoe"):
            shutil.rmtree(path, ignore_errors=True)


def _middle(value: Any) -> float:
    return float(value["median"] if isinstance(value, dict) else value)


if __name__ == "__main__":
    main()

"""A model of full size with random weights: written, converted, run at several budgets under direct I/O.

Run as: python benchmarks/full_size.py [MODEL] [--layers N] [--work DIR] [--minutes M] [--out FILE]

MODEL is a name that `cfmoe make-random` knows. Every step is a process of its own, so that peak memory is the step's; whatever is not done
after M minutes is left out and said to be. The checkpoint stays in DIR for the next run unless --clean.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from cfmoe.artifact import Artifact
from cfmoe.measure.bandwidth import file_speed, memory_bandwidth
from cfmoe.measure.machine import describe
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
        """(the command's JSON, seconds, peak resident bytes). Raises OutOfTime, after which the command has ended."""
        start = time.monotonic()
        command = [sys.executable, "-m", "cfmoe.cli", *map(str, arguments), "--json"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        try:
            output, _ = process.communicate(timeout=max(1.0, self.end - start))
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait()
            raise OutOfTime(f"{arguments[0]} was not done in time") from None
        if process.returncode:
            raise SystemExit(f"cfmoe {arguments[0]} failed with {process.returncode}")
        return json.loads(output), time.monotonic() - start, _peak()


def _peak() -> int:
    """Peak resident bytes of the largest child so far. Steps are ordered by what they need, so that it is the last one's or says more."""
    import resource

    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10


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
    opened = Artifact.open(artifact)
    layout, facts = opened.index.experts, opened.manifest.model
    weights = opened.manifest.files["weights.bin"].size
    # The embedding is looked up, not read; this counts it, as one matrix of some thirty.
    active = weights + len(facts.moe_layers) * facts.top_k * layout.record_bytes
    storage = file_speed(artifact / "experts.bin", [layout.record_stride])
    memory = memory_bandwidth(2)
    report["limits"] = {
        "active_bytes_per_token": active,
        "memory_bytes_per_s": memory,
        "storage_bytes_per_s": storage.bytes_per_s_2,
        "memory_bound_tokens_per_s": memory / active,
    }
    for budget in arguments.budgets.split(","):
        options = ["--memory-budget", budget, "--io", "direct", "--max-new-tokens", arguments.new_tokens, "--context-size", 512]
        options += ["--temperature", 1]  # greedy, random weights repeat one token for ever
        result, seconds, _ = steps.run("run", artifact, "--prompt", PROMPT, *options)
        decode, kept = result["decode"], result["memory"]
        tokens = max(1, result["new_tokens"] - 1)
        spent = tokens / decode["tokens_per_s"]
        report["runs"].append(
            {
                "memory_budget": budget,
                "prompt_tokens": result["prompt_tokens"],
                "new_tokens": result["new_tokens"],
                "prefill_tokens_per_s": result["prefill"]["tokens_per_s"],
                "decode_tokens_per_s": decode["tokens_per_s"],
                "chr": decode["chr"],
                "bytes_read_per_token": decode["bytes_read"] / tokens,
                "stall_share": decode["stall_ms"] / 1000 / spent,
                "storage_bound_tokens_per_s": storage.bytes_per_s_2 / max(1, decode["bytes_read"] / tokens),
                "budget_bytes": kept["budget_bytes"],
                "peak_growth_bytes": kept["peak_rss_growth_bytes"],
                "within_budget": kept["peak_rss_growth_bytes"] <= kept["budget_bytes"],
            }
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="olmoe-1b-7b")
    parser.add_argument("--layers", type=int, help="the first layers only")
    parser.add_argument("--locality", type=float, default=0.5)
    parser.add_argument("--quant", default="q4")
    parser.add_argument("--budgets", default="100%,50%,25%")
    parser.add_argument("--new-tokens", type=int, default=48)
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
        line = (
            f"{run['memory_budget']}: {run['decode_tokens_per_s']:.1f} tok/s, {format_size(round(run['bytes_read_per_token']))} per token"
        )
        print(f"{line}, stalled {run['stall_share']:.0%}, within budget: {run['within_budget']}", file=sys.stderr)
    if arguments.clean:
        for path in (arguments.work / arguments.model, arguments.work / f"{arguments.model}.cfmoe"):
            shutil.rmtree(path, ignore_errors=True)


if __name__ == "__main__":
    main()

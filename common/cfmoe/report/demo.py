"""The demo: compiles the embedded model, runs one prompt at three budgets, each in a process of its own, and writes the report."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from cfmoe.errors import CFMoEError, RuntimeFault, os_error
from cfmoe.report.demo_page import DemoRun, demo_page

MODEL = "demo-moe-13m"
BUDGETS = ("100%", "50%", "25%")
NEW_TOKENS = 200
ROUNDS = 3
CONTEXT = 512  # tokens; the model's 2,048 would make the KV cache larger than all experts
# Greedy, so small a model soon repeats itself, and repetition would flatter the cache.
SAMPLING = ("--temperature", "0.8", "--top-p", "0.95", "--seed", "7")
PROMPT = (
    "The proposal adds a new statement to the language. It has been discussed at length on the mailing list, and most of the "
    "participants agreed that the present behaviour is surprising. The reasons for the change are"
)


@dataclass(frozen=True)
class Demo:
    """What came out: the runs in the order of BUDGETS, and where the page is."""

    runs: Sequence[DemoRun]
    page: Path
    all_equal: bool


def embedded_model() -> Path:
    """The checkpoint that comes with CFMoE: in the repository, or in the installed package."""
    here = Path(str(resources.files("cfmoe.report")))
    for path in (here.parents[2] / "assets" / MODEL, here.parent / "assets" / MODEL):
        if (path / "config.json").is_file():
            return path
    raise CFMoEError(f"the embedded model {MODEL} is missing beside {here}; install cfmoe anew, or run from a checkout")


def run_demo(out: Path, progress: Callable[[str, int, int], None]) -> Demo:
    """Writes `out`/artifact, `out`/report.html and `out`/results.json, replacing what an earlier demo wrote there."""
    from cfmoe.compile import compile_model
    from cfmoe.measure.machine import cpu

    artifact = compile_model(embedded_model(), out / "artifact", force=True, progress=progress)
    results: dict[str, list[dict[str, Any]]] = {budget: [] for budget in BUDGETS}
    # In rounds, so that a busy moment of the machine does not fall on one budget alone.
    for done in range(ROUNDS * len(BUDGETS)):
        progress("running", done, ROUNDS * len(BUDGETS))
        budget = BUDGETS[done % len(BUDGETS)]
        results[budget].append(_run(artifact, budget))
    progress("running", ROUNDS * len(BUDGETS), ROUNDS * len(BUDGETS))
    texts = {tuple(result["token_ids"]) for repeated in results.values() for result in repeated}
    all_equal = len(texts) == 1
    runs = [DemoRun(budget, _median(repeated)) for budget, repeated in results.items()]
    facts = cpu()
    machine = (
        f"{facts['name']}, {facts['usable_cpus']} CPUs; {runs[0].result['io']} I/O; {NEW_TOKENS} tokens sampled with one seed; "
        f"the median of {ROUNDS} runs; the cache is cold at the start"
    )
    page = out / "report.html"
    _write(page, demo_page(runs, MODEL, machine, PROMPT, all_equal))
    _write(out / "results.json", json.dumps({run.budget: run.result for run in runs}, indent=2) + "\n")
    return Demo(runs, page, all_equal)


def _median(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The run of median decode speed."""
    return sorted(results, key=lambda result: float(result["decode"]["tokens_per_s"]))[len(results) // 2]


def _run(artifact: Path, budget: str) -> dict[str, Any]:
    """`cfmoe run --json` in a new process, so that resident memory is this run's alone."""
    command = [sys.executable, "-m", "cfmoe.cli", "run", str(artifact), "--prompt", PROMPT, "--json"]
    command += ["--max-new-tokens", str(NEW_TOKENS), "--context-size", str(CONTEXT)]
    command += ["--memory-budget", budget, *SAMPLING]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, encoding="utf-8", check=False)
    if result.returncode != 0:
        message = result.stderr.strip().splitlines()[-1:] or ["no message"]
        raise RuntimeFault(f"the run at {budget} ended with code {result.returncode}: {message[0].removeprefix('error: ')}")
    decoded: dict[str, Any] = json.loads(result.stdout)
    return decoded


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, "utf-8")
    except OSError as error:
        raise os_error(error, path, "write") from error

"""How much expert memory locality saves, and what it costs: the Pareto table of docs/locality.md.

Run as: python benchmarks/locality.py run --plan screen --model DIR --train corpus_train.jsonl.xz --eval corpus_eval.jsonl.xz --out DIR
        python benchmarks/locality.py report --out DIR

Every run of a plan is one JSON file in the output folder, so a second call goes on where the first was stopped. --minutes ends a call
in time, --processes lets several small runs share one GPU. Trains on some domains of a domain-labelled corpus and measures held-out
documents of these and of the untouched ones: loss, ECR, and the exact hit rate of one LRU cache at every size. Of the domains trained
on, every second held-out document is kept for choices (the scale of a mean, the run to repeat) and none of them is reported.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), *(str(HERE.parent / root) for root in ("common", "tune"))]  # a machine that only measures needs no build

from locality_measure import evaluate, pooled  # noqa: E402
from locality_report import best, report  # noqa: E402
from locality_train import Bench, Run, elastic, screen, train, write_json  # noqa: E402

from cfmoe.errors import CFMoEError  # noqa: E402
from cfmoe.tune.checkpoint import load_model  # noqa: E402
from cfmoe.tune.elastic import load_adapter, merge  # noqa: E402
from cfmoe.tune.locality import KINDS  # noqa: E402

_BISECTIONS = 7  # of a scale between 0 and 1.25


def plan_of(options: argparse.Namespace) -> list[Run]:
    if options.runs is not None:
        listed = json.loads(options.runs.read_text())
        return [elastic(Run(**one), options.threshold, options.rank_budget) for one in listed]
    planned = screen(options.steps, options.kinds.split(","), options.adapters.split(","))
    return [elastic(run, options.threshold, options.rank_budget) for run in planned]


def claim(options: argparse.Namespace, bench: Bench, pace: float) -> Run | None:
    """The first run of the plan that nobody has taken, whose text is there and that would end in time; None where there is none."""
    for run in plan_of(options):
        taken = bench.out / f"{run.name}.claim"
        if taken.exists() or (bench.out / f"{run.name}.json").exists() or (options.only and not re.search(options.only, run.name)):
            continue
        if time.time() + pace * run.steps > options.deadline or (run.text != "corpus" and not bench.own_text_path.exists()):
            continue
        try:
            os.close(os.open(taken, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            continue
        return run
    return None


def work(options: argparse.Namespace) -> None:
    """Takes runs that nobody has taken; with --follow also those that are added to the plan, until there is a file named stop."""
    bench, pace = Bench(options), options.seconds_per_step
    while True:
        run = claim(options, bench, pace)
        if run is not None:
            result = train(run, bench)
            pace = max(options.seconds_per_step, result["seconds"] / run.steps)
            write_json(bench.out / f"{run.name}.json", result)
            bench.say(f"{run.name} done in {result['seconds']:.0f} s")
        elif (options.follow and not (bench.out / "stop").exists()) or (bench.out / "own.writing").exists():
            time.sleep(2)
        else:
            return


def run(options: argparse.Namespace) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    for stale in options.out.glob("*.claim"):  # of a call that was stopped
        stale.unlink()
    options.deadline = time.time() + 60 * options.minutes
    bench = Bench(options)  # the tokens and the base model's figures, once
    if options.processes == 1:
        bench.write_own_text(options.own_rows, options.own_batch, options.own_seconds)
        del bench
        work(options)
        return
    writing = bench.out / "own.writing"  # runs on other text need not wait for it
    writing.touch()
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", str(options.deadline)]
    children = [subprocess.Popen(command) for _ in range(options.processes)]
    try:
        bench.write_own_text(options.own_rows, options.own_batch, options.own_seconds)
    finally:
        writing.unlink()
    del bench
    codes = [child.wait() for child in children]
    if any(codes):
        raise SystemExit(f"workers ended with {codes}")


def scaled(options: argparse.Namespace) -> None:
    """Measures base + scale · (tuned − base) of means of adapters: at --scales, and at the scale that --limit allows on validation.

    Wortsman et al., Robust fine-tuning of zero-shot models (arXiv:2109.01903) and Model soups (arXiv:2203.05482).
    """
    if options.names is not None and len(options.names) != len(options.adapters_in):
        raise CFMoEError(f"{len(options.names)} --name for {len(options.adapters_in)} --adapters; give one each, or none")
    bench = Bench(options)
    start = {name: value.clone() for name, value in bench.base.float().state_dict().items()}
    for index, group in enumerate(options.adapters_in):
        paths = [Path(path) for path in group.split(",")]
        name = options.names[index] if options.names else "+".join(path.stem for path in paths)
        change = {key: torch.zeros_like(value) for key, value in start.items()}
        for path in paths:
            tuned = merge(load_adapter(load_model(bench.model, torch.device(bench.device), "float32"), path)).state_dict()
            for key, value in start.items():
                change[key] += (tuned[key] - value) / len(paths)
        model = load_model(bench.model, torch.device(bench.device), "float32")

        def measure(scale: float, wanted: set[str]) -> dict[str, Any]:
            model.load_state_dict({key: (value + scale * change[key]).bfloat16().float() for key, value in start.items()})  # noqa: B023
            return evaluate(model, {key: rows for key, rows in bench.eval_rows.items() if key in wanted}, bench.device)  # noqa: B023

        scales = {f"scale-{scale:g}-{name}": float(scale) for scale in map(float, filter(None, options.scales.split(",")))}
        if options.limit is not None:
            allowed = bench.base_figures["loss"] + math.log1p(options.limit / 100)
            low, high = 0.0, 1.25
            for _ in range(_BISECTIONS):
                middle = (low + high) / 2
                loss = pooled(measure(middle, set(bench.validation)), bench.validation)["loss"]
                low, high = (middle, high) if loss <= allowed else (low, middle)
            scales[f"limit-{options.limit:g}-{name}"] = low
        for title, scale in scales.items():
            adapter = "mean" if len(paths) > 1 else "scaled"
            facts = {"name": title, "adapter": adapter, "kind": "cache", "weight": scale, "members": [path.stem for path in paths]}
            write_json(bench.out / f"{title}.json", {"run": facts, "trained": 0, "eval": measure(scale, set(bench.eval_rows))})
            bench.say(f"{title} measured at {scale:g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run")
    running.add_argument("--model", type=Path, required=True)
    running.add_argument("--train", type=Path, help="domain-labelled corpus, .jsonl.xz")
    running.add_argument("--eval", type=Path, help="held-out documents in the same form")
    running.add_argument("--questions", type=Path, help="instead of a corpus: .jsonl of question and answer; every 20th is held out")
    running.add_argument("--out", type=Path, required=True)
    running.add_argument("--plan", choices=["screen"], default="screen")
    running.add_argument("--runs", type=Path, help="JSON list of runs instead of the plan: name, adapter, kind, weight, steps, seed, …")
    running.add_argument("--kinds", default=",".join(KINDS))
    running.add_argument("--adapters", default="lora,router,elastic")
    running.add_argument("--steps", type=int, default=300)
    running.add_argument("--batch", type=int, default=32)
    running.add_argument("--length", type=int, default=512)
    running.add_argument("--own-rows", type=int, default=0, help="rows that the base model writes, for runs with text own or both")
    running.add_argument("--own-batch", type=int, default=4096, help="rows written side by side")
    running.add_argument("--own-seconds", type=float, default=600.0, help="no further batch is written after that")
    running.add_argument("--eval-rows", type=int, default=1000, help="at most, per domain")
    running.add_argument("--threshold", type=float, default=0.35, help="of the elastic runs")
    running.add_argument("--rank-budget", type=int, help="of the elastic runs")
    running.add_argument("--minutes", type=float, default=60.0, help="no run starts that would end later")
    running.add_argument("--seconds-per-step", type=float, default=0.05, help="first guess of the pace")
    running.add_argument("--processes", type=int, default=1)
    running.add_argument("--device")
    running.add_argument("--only", help="runs whose name has this regular expression")
    running.add_argument("--follow", action="store_true", help="go on with runs that are added to --runs, until OUT/stop is there")
    running.add_argument("--keep", help="regular expression of the names of runs whose adapters are kept")
    running.add_argument("--quiet", action="store_true")
    running.add_argument("--worker", dest="deadline", type=float, help=argparse.SUPPRESS)
    reporting = commands.add_parser("report")
    reporting.add_argument("--out", type=Path, required=True)
    reporting.add_argument("--only", help="rows to print: those whose name has this regular expression")
    reporting.add_argument("--picture", type=Path, help="PNG to draw")
    between = commands.add_parser("scale")
    for name in ("--model", "--train", "--eval", "--out"):
        between.add_argument(name, type=Path, required=True)
    adapters_help = "adapter directories that runs kept, comma-separated: their mean is measured; may be given again"
    between.add_argument("--adapters", dest="adapters_in", action="append", required=True, help=adapters_help)
    between.add_argument("--name", dest="names", action="append", help="of a mean in the results; once for every --adapters")
    between.add_argument("--scales", default="1", help="comma-separated, may be empty")
    between.add_argument("--limit", type=float, help="percent that perplexity may rise on the validation documents; finds the scale")
    between.add_argument("--device")
    between.add_argument("--eval-rows", type=int, default=1000, help="at most, per domain")
    between.set_defaults(batch=32, length=512, keep=None, quiet=False, questions=None)
    choosing = commands.add_parser("best")
    choosing.add_argument("--out", type=Path, required=True)
    choosing.add_argument("--limit", type=float, default=0.5, help="percent that perplexity may rise on the trained domains")
    choosing.add_argument("--seeds", default="0,1,2")
    choosing.add_argument("--steps", type=int, help="instead of the run's own")
    options = parser.parse_args()
    if options.command == "report":
        report(options)
    elif options.command == "best":
        best(options)
    elif options.command == "scale":
        scaled(options)
    elif options.deadline is not None:
        work(options)
    else:
        run(options)


if __name__ == "__main__":
    main()

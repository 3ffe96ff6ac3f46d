"""From the runs of benchmarks/locality.py to a table, a picture, and the runs that are worth repeating."""

from __future__ import annotations

import argparse
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
from locality_measure import equal_hit_size, pooled
from locality_train import write_json


def table(out: Path) -> list[dict[str, Any]]:
    """A row per run, with the base model's figures first."""
    base = json.loads((out / "base.json").read_text())
    domains = base["eval"]
    groups = {"trained": base["trained"], "validation": [name for name in base["validation"] if name not in base["trained"]]}
    groups["untouched"] = [name for name in domains if name not in groups["trained"] and name not in groups["validation"]]
    groups = {group: names for group, names in groups.items() if names}
    reference = {group: pooled(domains, names) for group, names in groups.items()}
    results: list[dict[str, Any]] = [{"run": {"name": "base", "adapter": "", "kind": "", "weight": 0.0}, "trained": 0, "eval": domains}]
    results += [json.loads(path.read_text()) for path in sorted(out.glob("*.json")) if path.name not in ("base.json", "report.json")]
    lines = []
    for result in results:
        now = {group: pooled(result["eval"], names) for group, names in groups.items()}
        line: dict[str, Any] = {key: result["run"].get(key) for key in ("name", "adapter", "kind", "weight", "budget", "seed", "steps")}
        line["weight"] = round(line["weight"] or 0.0, 4)
        line["trained_parameters"] = result["trained"]
        text, quality = result["run"].get("text", "corpus"), result["run"].get("quality", "distill")
        longer = text == "corpus" and result["run"].get("steps", 0) > 300
        line["group"] = line["kind"] + (", longer" if longer else "") + (", own text" if text != "corpus" else "")
        line["text"] = f"{text} {quality}"
        line["group"] += ", every weight" if line["adapter"] == "full" else ""
        line["group"] += ", mean of several" if line["adapter"] == "mean" else ""
        line["distilled"] = quality == "distill"
        line["settings"] = _settings(result["run"])
        line["steps"] = f"{result['run'].get('steps', 0)} × {np.prod(result.get('batch', [0])) // 1024} Ki"
        for group, value in now.items():
            experts = len(value["chr"]) - 1
            line[f"loss_{group}"] = round(value["loss"], 4)
            line[f"perplexity_{group}_percent"] = round(100 * math.expm1(value["loss"] - reference[group]["loss"]), 2)
            line[f"ecr_{group}"] = round(float(np.mean(value["ecr"])), 4)
            for share in (25, 50, 75):
                line[f"chr{share}_{group}"] = round(value["chr"][round(share / 100 * experts)], 4)
            line[f"saving_{group}_percent"] = round(100 * (1 - equal_hit_size(reference[group]["chr"], value["chr"]) / 0.5), 1)
        lines.append(line)
    return lines


def _settings(run: dict[str, Any]) -> str:
    """What of a run is not as usual and has no column of its own."""
    usual = {"rank": 16, "lr": 1e-3, "release": 0.0, "budget": 0.0, "rank_budget": None, "threshold": None, "seed": 0}
    usual |= {"floor": 0.0, "average": 0.0}
    other = {key: run[key] for key, value in usual.items() if key in run and run[key] != value}
    return ", ".join(f"{key.replace('_', ' ')} {value:g}" for key, value in (run.get("settings", {}) | other).items() if value)


def report(options: argparse.Namespace) -> None:
    lines = table(options.out)
    write_json(options.out / "report.json", lines)
    columns = {
        "adapter": "adapter",
        "kind": "loss",
        "weight": "weight",
        "settings": "settings",
        "text": "text, quality",
        "steps": "steps × tokens",
        "trained_parameters": "trained",
        "perplexity_trained_percent": "ppl %",
        "perplexity_untouched_percent": "ppl % untouched",
        "ecr_trained": "ECR",
        "chr25_trained": "CHR 25 %",
        "chr50_trained": "CHR 50 %",
        "chr75_trained": "CHR 75 %",
        "saving_trained_percent": "saved %",
        "saving_untouched_percent": "saved % untouched",
    }
    if options.picture is not None:
        picture(options.picture, lines)
    print("| " + " | ".join(columns.values()) + " |")
    print("|" + "---|" * len(columns))
    shown = [line for line in lines if options.only is None or re.search(options.only, line["name"])]
    for line in sorted(shown, key=lambda one: (one["adapter"], one["kind"], one["weight"] or 0)):
        print("| " + " | ".join(f"{line[key]:,}" if isinstance(line.get(key), int) else str(line.get(key, "")) for key in columns) + " |")


def picture(path: Path, lines: list[dict[str, Any]]) -> None:
    """What was saved against what perplexity rose, a curve per loss."""
    from cfmoe.report.plots import Line
    from cfmoe.report.plots import lines as draw

    curves: dict[str, list[tuple[float, float]]] = {}
    for line in lines:
        if (
            line["adapter"] in ("lora", "full", "mean")
            and line["kind"] not in ("none", "l2")  # the last of the losses; eight colours are told apart
            and line["distilled"]
            and 0 <= line["perplexity_trained_percent"] <= 2.5
        ):
            curves.setdefault(line["group"], []).append((line["perplexity_trained_percent"], line["saving_trained_percent"]))
    drawn = {name: Line(*zip(*sorted(points), strict=True)) for name, points in sorted(curves.items()) if len(points) > 0}
    draw(path, "Cache that is no longer needed for the base model's hit rate", drawn, "rise of perplexity, %", "memory saved, %")


def best(options: argparse.Namespace) -> None:
    """Prints the run that promises most at the limit, with its weight scaled to reach it, once for every seed: a file for --runs."""
    lines = {
        line["name"]: line for line in table(options.out) if line["kind"] not in ("", "none") and line["adapter"] not in ("mean", "scaled")
    }
    group = "validation" if any("saving_validation_percent" in line for line in lines.values()) else "trained"

    def promise(line: dict[str, Any]) -> float:
        # Along one frontier the saving was seen to grow with about the square root of what perplexity rises.
        return float(line[f"saving_{group}_percent"] * math.sqrt(options.limit / max(0.1, line[f"perplexity_{group}_percent"])))

    name = max(lines, key=lambda one: promise(lines[one]))
    run = json.loads((options.out / f"{name}.json").read_text())["run"]
    scale = min(1.7, max(0.4, 0.9 * options.limit / max(0.05, lines[name][f"perplexity_{group}_percent"])))
    wanted = {"weight": round(run["weight"] * scale, 4), "steps": options.steps or run["steps"]}
    runs = [{**run, **wanted, "name": f"best-{name}-seed{seed}", "seed": int(seed)} for seed in options.seeds.split(",")]
    print(json.dumps(runs, indent=1))

"""Writes evaluations: JSON, CSV, pictures, and the table of answers with their ECR in the columns that such data is released in."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cfmoe.errors import os_error
from cfmoe.tune.data import Tokens
from cfmoe.tune.evaluate import Evaluation
from cfmoe.tune.hits import size_for_hit_rate
from cfmoe.tune.output import staged
from cfmoe.tune.tasks import Example

MARK = "results.json"
RELEASED = ("Input", "Output_Baseline", "ECR_Baseline", "Output_CFMoE", "ECR_CFMoE")


def as_json(evaluations: dict[str, Evaluation]) -> dict[str, Any]:
    """Metrics, ECR per layer and hit rates of every model, and what the second one saves where there are two."""
    result: dict[str, Any] = {
        name: {"metrics": one.metrics, "ecr_per_layer": list(one.ecr_per_layer), "hit_rates": one.chr} for name, one in evaluations.items()
    }
    if len(evaluations) == 2:
        base, tuned = evaluations.values()
        result["comparison"] = compare(base, tuned)
    return result


def compare(base: Evaluation, tuned: Evaluation) -> dict[str, Any]:
    """Perplexity and ECR against the base, and the cache that the tuned model needs for the base's LRU hit rate at each size.

    `saved` is the share of that cache that is no longer needed; None where the sizes that were asked for do not reach that far.
    """
    equal = []
    for one in base.chr:
        if one["policy"] == "lru" and one["phase"] == "all":
            needed = size_for_hit_rate(tuned.chr, "lru", one["chr"])
            saved = None if needed is None else 1 - needed / one["cache_fraction"]
            equal.append({"cache_fraction": one["cache_fraction"], "chr": one["chr"], "needed_fraction": needed, "saved": saved})
    return {
        "perplexity_percent": 100 * (tuned.metrics["perplexity"] / base.metrics["perplexity"] - 1),
        "ecr_gain": tuned.metrics.get("ecr", 0.0) - base.metrics.get("ecr", 0.0),
        "equal_hit_rate": equal,
    }


def write(
    out: Path,
    evaluations: dict[str, Evaluation],
    sequences: Sequence[Tokens],
    examples: Sequence[Example] | None,
    facts: dict[str, Any],
    force: bool,
) -> None:
    """Writes results.json, metrics.csv, hit_rates.csv, examples.csv, pictures, and released.csv where two models answered, into `out`."""
    with staged(out, force, MARK) as directory:
        _write(directory / MARK, json.dumps(facts | as_json(evaluations), indent=2, allow_nan=False) + "\n")
        names = list(evaluations)
        metrics = list(dict.fromkeys(name for one in evaluations.values() for name in one.metrics))
        rows = [[metric, *(one.metrics.get(metric, "") for one in evaluations.values())] for metric in metrics]
        _table(directory / "metrics.csv", ["metric", *names], rows)
        hits = [[name, *row.values()] for name, one in evaluations.items() for row in one.chr]
        _table(directory / "hit_rates.csv", ["model", *next(iter(evaluations.values())).chr[0]], hits)
        _examples(directory, evaluations, sequences, examples)
        _pictures(directory, evaluations)


def _examples(out: Path, evaluations: dict[str, Evaluation], sequences: Sequence[Tokens], examples: Sequence[Example] | None) -> None:
    header = ["index", "domain", "input", "reference"]
    for name in evaluations:
        header += [f"{part}_{name}" for part in ("output", "right", "ecr", "nats", "tokens")]
    rows = []
    for index, sequence in enumerate(sequences):
        row: list[Any] = [index, sequence.domain, examples[index].label if examples else "", examples[index].answer if examples else ""]
        for one in evaluations.values():
            scored = one.scored[index]
            right = one.right[index]
            row += [
                scored.written or "",
                "" if right is None else int(right),
                _number(scored.written_ecr),
                _number(scored.nats),
                scored.predicted,
            ]
        rows.append(row)
    _table(out / "examples.csv", header, rows)
    if examples is not None and len(evaluations) == 2 and all(one.scored[0].written is not None for one in evaluations.values()):
        base, tuned = evaluations.values()
        released = [
            [example.label, old.written, _number(old.written_ecr), new.written, _number(new.written_ecr)]
            for example, old, new in zip(examples, base.scored, tuned.scored, strict=True)
        ]
        _table(out / "released.csv", list(RELEASED), released)


def _pictures(out: Path, evaluations: dict[str, Evaluation]) -> None:
    from cfmoe.report.plots import Line, lines

    several = len(evaluations) > 1
    curves = {}
    for name, one in evaluations.items():
        for policy in dict.fromkeys(row["policy"] for row in one.chr):
            own = sorted((row["cache_fraction"], row["chr"]) for row in one.chr if row["policy"] == policy and row["phase"] == "all")
            label = f"{policy}, {name}" if several else policy
            curves[label] = Line([100 * size for size, _ in own], [rate for _, rate in own], bound=policy.startswith("opt"))
    title, x = "Cache hit rate, prefill and decode", "cache, share of all experts"
    lines(out / "hit_rates.png", title, curves, x, "hits per access", x_percent=True, y_share=True)
    layers = {name: Line(range(len(one.ecr_per_layer)), one.ecr_per_layer) for name, one in evaluations.items()}
    lines(out / "ecr_by_layer.png", "Experts that consecutive tokens share", layers, "MoE layer", "ECR", y_share=True)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6f}"


def _table(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    _write(path, text.getvalue())


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, "utf-8", errors="replace")
    except OSError as error:
        raise os_error(error, path, "write") from error

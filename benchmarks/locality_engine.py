"""Whether the engine hits as often as the table says: base and tuned model compiled, held-out text fed token by token.

Run as: python benchmarks/locality_engine.py --model DIR --adapters DIR,… --eval corpus_eval.jsonl.xz --out DIR

Every row of text starts with a cold LRU cache. Beside the engine's hit rates stand those of benchmarks/locality.py for the same rows, from
transformers' routing; they differ by what quantisation changes in the routing.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from locality_measure import UNTOUCHED, lru_hits, text_rows, tokenise

from cfmoe.compile import compile_model
from cfmoe.measure.machine import describe
from cfmoe.runtime import Engine
from cfmoe.tune.checkpoint import load_model
from cfmoe.tune.merged import save_merged
from cfmoe.tune.routers import RouterRecorder


def engine_rates(artifact: Path, rows: torch.Tensor, budget: str) -> dict[str, float]:
    """Hit rate, tokens per second and nats per token of decoding `rows` (rows, tokens), each from a cold cache."""
    hits = misses = 0
    nats = seconds = 0.0
    for row in rows.tolist():
        with Engine(artifact, memory_budget=budget, policy="lru", context_size=len(row)) as engine:
            session = engine.session()
            start = time.perf_counter()
            logits = torch.from_numpy(session.feed(row, decode=True))
            seconds += time.perf_counter() - start
            counts = session.metrics.decode
            hits, misses = hits + counts.hits, misses + counts.misses
            nats += torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(row[1:]), reduction="sum").item()
    predicted = rows.shape[0] * (rows.shape[1] - 1)
    return {"chr": hits / (hits + misses), "tokens_per_s": rows.numel() / seconds, "nats_per_token": nats / predicted}


@torch.no_grad()
def simulated(model: Path, rows: torch.Tensor) -> list[float]:
    """The hit rate of every cache size by transformers' routing."""
    loaded = load_model(model, torch.device("cpu"))
    with RouterRecorder(loaded) as recorder:
        hits, accesses = torch.zeros(()), 0
        for row in rows:
            loaded(input_ids=row[None].long(), use_cache=False)
            ids = torch.stack(recorder.ids)[:, None]
            hits = hits + lru_hits(ids, torch.ones(1, len(row), dtype=torch.bool), recorder.layers[0].num_experts)
            accesses += ids.numel()
    return (hits / accesses).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--adapters", required=True, help="adapter directories, comma-separated; of several the mean")
    parser.add_argument("--scale", type=float, default=1.0, help="of what they change")
    parser.add_argument("--eval", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=16, help="of 512 tokens, from the domains trained on")
    parser.add_argument("--budgets", default="25%,50%,75%")
    parser.add_argument("--quant", default="q8")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    streams = tokenise(options.eval, options.model, options.out / "eval.npz")
    every = text_rows([stream for name, stream in sorted(streams.items()) if name not in UNTOUCHED], 512).tokens
    rows = every[torch.linspace(0, len(every) - 1, min(options.rows, len(every))).long()]
    save_merged(options.model, [Path(path) for path in options.adapters.split(",")], options.out / "merged", options.scale)
    report: dict[str, Any] = {"machine": describe(), "rows": len(rows), "quant": options.quant}
    for name, model in (("base", options.model), ("tuned", options.out / "merged")):
        artifact = compile_model(model, options.out / f"{name}.cfmoe", quant=options.quant, force=True)
        curve = simulated(model, rows)
        for budget in options.budgets.split(","):
            measured = engine_rates(artifact, rows, budget)
            measured["chr_of_transformers_routing"] = curve[int(float(budget.rstrip("%")) / 100 * (len(curve) - 1))]
            report[f"{name} {budget}"] = measured
            print(name, budget, {key: round(value, 4) for key, value in measured.items()}, flush=True)
    (options.out / "engine.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()

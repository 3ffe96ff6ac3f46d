"""How well `cfmoe plan` predicts: measured against predicted decode speed at six budgets, calibration and runs interleaved.

Run as: python benchmarks/planner.py ARTIFACT --prompt FILE --out build/bench/planner.json

The run's own routing is recorded once, at full memory: tokens do not depend on the budget. Then, in rounds, the machine is calibrated as
`cfmoe plan` does it and every budget is run; the median of the absolute errors over rounds and budgets is the figure.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from cfmoe.artifact import Artifact
from cfmoe.measure.machine import cpu
from cfmoe.measure.text import read_text
from cfmoe.planner.calibrate import calibrate
from cfmoe.planner.cost import predict
from cfmoe.runtime import Engine, Sampling, Simulator, Tokenizer
from cfmoe.trace import Trace

BUDGETS = ("10%", "15%", "25%", "40%", "60%", "80%")
SAMPLING = Sampling(temperature=0.8, top_p=0.95, seed=7)  # greedy, small models repeat themselves


def record(artifact: Path, prompt: list[int], new_tokens: int, context: int) -> Trace:
    with (
        tempfile.TemporaryDirectory() as scratch,
        Engine(artifact, context_size=context, record_trace=True) as engine,
        engine.session() as session,
    ):
        session.generate(prompt, new_tokens, SAMPLING, stop_tokens=[])
        session.write_trace(Path(scratch) / "trace")
        return Trace.read(Path(scratch) / "trace")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--prompt", type=Path, required=True, help=".txt, .jsonl or .xz; its first tokens are the prompt")
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=384)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    prompt = Tokenizer(options.artifact).encode(read_text(options.prompt, 1 << 16))[: options.prompt_tokens]
    context = len(prompt) + options.new_tokens
    trace = record(options.artifact, prompt, options.new_tokens, context)
    artifact = Artifact.open(options.artifact)
    rows: list[dict[str, Any]] = []
    print(f"{'budget':8}{'measured':>10}{'predicted':>11}{'error':>8}{'first token ms':>16}{'predicted':>11}")
    with Simulator(trace) as simulator:
        for number in range(options.rounds):
            size, compute, device = calibrate(artifact, context)
            for budget in BUDGETS:
                with Engine(artifact.path, memory_budget=budget, context_size=context, io="direct") as engine:
                    session = engine.session()
                    session.generate(prompt, options.new_tokens, SAMPLING, stop_tokens=[])
                    metrics, slots = session.metrics, engine.memory.expert_slots
                    simulation = simulator.run(engine.policy, slots)
                assert simulation.decode.hits == metrics.decode.hits, "the simulator disagrees with the engine"
                speed = predict(simulation, trace, size, compute, device)
                assert speed.first_token_s is not None
                row = {
                    "round": number,
                    "memory_budget": budget,
                    "chr": metrics.decode.chr,
                    "measured_tokens_per_s": metrics.decode.tokens_per_s,
                    "predicted_tokens_per_s": speed.decode_tokens_per_s,
                    "error": speed.decode_tokens_per_s / metrics.decode.tokens_per_s - 1,
                    "measured_prefill_s": metrics.prefill.seconds,
                    "predicted_first_token_s": speed.first_token_s,
                }
                rows.append(row)
                print(
                    f"{budget:8}{row['measured_tokens_per_s']:10.0f}{row['predicted_tokens_per_s']:11.0f}{row['error']:+8.1%}"
                    f"{row['measured_prefill_s'] * 1e3:16.0f}{row['predicted_first_token_s'] * 1e3:11.0f}"
                )
    median = statistics.median(abs(row["error"]) for row in rows)
    print(f"median absolute error {median:.1%}")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        result = {"artifact": options.artifact.name, "median_absolute_error": median, "rows": rows, "machine": cpu()}
        options.out.write_text(json.dumps(result, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()

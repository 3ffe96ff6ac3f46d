"""The committed trace and the hit counts on it: what they are, and how to make them anew.

Run as: python tests/python/golden.py trace   (after a change of the trace format only: all counts change with it)
        python tests/python/golden.py hits    (after a change of a policy that is meant; look at the difference)
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from cfmoe.runtime import Engine, Sampling
from cfmoe.runtime.simulator import Semantics, Simulator, simulator_policies
from cfmoe.trace import Trace
from support import ROOT

TRACE = ROOT / "tests" / "data" / "golden.trace"
HITS = ROOT / "tests" / "data" / "golden_hits.json"

# Of the 192 experts of six layers: half of one token's working set, all of it, and a quarter, half and three quarters of all experts.
SIZES = (12, 24, 48, 96, 144)
# The prompts are shorter than the demo artifact's chunks of 256 tokens; so they make several, of which one is not full.
CHUNK = 16

# Two conversations of two turns each.
CONVERSATIONS = (
    (
        "The proposal adds a new statement to the language. It has been discussed at length on the mailing list, and most of the",
        " However, there is one objection",
    ),
    ("A package manager installs", " It also removes"),
)
NEW_TOKENS = 16


def make_trace(artifact: Path, out: Path) -> None:
    """Records the conversations from the demo model's artifact, with scores; sampled, because greedy text soon repeats itself."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(artifact / "tokenizer.json"))
    with Engine(artifact, memory_budget="25%", record_trace=True, record_scores=True) as engine, engine.session() as session:
        for seed, turns in enumerate(CONVERSATIONS):
            session.reset()
            for turn in turns:
                sampling = Sampling(temperature=0.8, top_p=0.95, seed=seed)
                session.generate(tokenizer.encode(turn).ids, NEW_TOKENS, sampling, stop_tokens=[])
        session.write_trace(out)


def hits(trace: Trace) -> dict[str, dict[str, list[int]]]:
    """``semantics policy`` → cache size → hits in prefill, in decode, and experts that hand-over loads; cold at each sample."""
    counts: dict[str, dict[str, list[int]]] = {}
    for semantics in Semantics:
        with Simulator(trace, semantics=semantics, chunk_size=CHUNK) as simulator:
            for policy in simulator_policies():
                runs = [simulator.run(policy, slots) for slots in SIZES]
                counts[f"{semantics} {policy}"] = {str(run.slots): [run.prefill.hits, run.decode.hits, run.hand_over_loads] for run in runs}
    return counts


def main(what: str) -> None:
    if what == "trace":
        from cfmoe.compile import compile_model

        with tempfile.TemporaryDirectory() as directory:
            make_trace(compile_model(ROOT / "assets" / "demo-moe-13m", Path(directory) / "demo"), TRACE)
    elif what != "hits":
        sys.exit("say trace or hits")
    rows = [f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in hits(Trace.read(TRACE)).items()]
    HITS.write_text("{\n" + ",\n".join(rows) + "\n}\n")


if __name__ == "__main__":
    main(*sys.argv[1:2] or [""])

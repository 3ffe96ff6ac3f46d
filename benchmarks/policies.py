"""Cache policies in the engine: tokens per second, hit rate and bytes read per token at several budgets, policies interleaved.

Run as: python benchmarks/policies.py ARTIFACT --prompt FILE --out build/bench/policies.json
"""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cfmoe.measure.machine import cpu, memory
from cfmoe.measure.speed import spread
from cfmoe.measure.text import read_text
from cfmoe.runtime import Engine, Sampling, Tokenizer, engine_policies

# Greedy, small models repeat themselves, and repetition would flatter every cache.
SAMPLING = Sampling(temperature=0.8, top_p=0.95, seed=7)


@dataclass
class Cell:
    """One policy at one budget."""

    policy: str
    memory_budget: str
    rates: list[float] = field(default_factory=list)
    chr: float = 0.0
    bytes_per_token: float = 0.0
    stall_share: list[float] = field(default_factory=list)

    def run(self, artifact: Path, prompt: list[int], new_tokens: int, io: str) -> None:
        context = len(prompt) + new_tokens
        with Engine(artifact, memory_budget=self.memory_budget, policy=self.policy, io=io, context_size=context) as engine:
            session = engine.session()
            session.generate(prompt, new_tokens, SAMPLING, stop_tokens=[])
            decode = session.metrics.decode
        self.rates.append(decode.tokens_per_s)
        self.chr = decode.chr
        self.bytes_per_token = decode.bytes_read / decode.tokens
        self.stall_share.append(decode.stall_ms / 1e3 / decode.seconds)

    def as_json(self) -> dict[str, Any]:
        return {
            "policy": self.policy,
            "memory_budget": self.memory_budget,
            "decode_tokens_per_s": spread(self.rates),
            "chr": self.chr,
            "decode_bytes_per_token": self.bytes_per_token,
            "stall_share": spread(self.stall_share),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--prompt", type=Path, required=True, help=".txt, .jsonl or .xz; its first tokens are the prompt")
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=384)
    parser.add_argument("--budgets", default="15%,25%,50%,75%")
    parser.add_argument("--policies", default=",".join(engine_policies()))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--io", default="direct")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    prompt = Tokenizer(options.artifact).encode(read_text(options.prompt, 1 << 16))[: options.prompt_tokens]
    cells = [Cell(policy, budget) for budget, policy in itertools.product(options.budgets.split(","), options.policies.split(","))]
    for _, cell in itertools.product(range(options.rounds), cells):
        cell.run(options.artifact, prompt, options.new_tokens, options.io)

    print(f"{'budget':8}{'policy':14}{'tok/s':>8}{'least':>8}{'most':>8}{'CHR':>8}{'KiB/token':>11}{'stall':>7}")
    for cell in cells:
        rate, stall = spread(cell.rates), spread(cell.stall_share)
        print(
            f"{cell.memory_budget:8}{cell.policy:14}{rate['median']:8.0f}{rate['min']:8.0f}{rate['max']:8.0f}{cell.chr:8.3f}"
            f"{cell.bytes_per_token / 1024:11.1f}{stall['median']:7.2f}"
        )
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        result = {
            "artifact": options.artifact.name,
            "prompt_tokens": len(prompt),
            "new_tokens": options.new_tokens,
            "rounds": options.rounds,
            "io": options.io,
            "machine": {"cpu": cpu(), "memory": memory()},
            "results": [cell.as_json() for cell in cells],
        }
        options.out.write_text(json.dumps(result, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()

"""Speed of prefill and decode over several memory budgets and thread counts, the configurations interleaved."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cfmoe.runtime import Engine, Memory

_WARM_UP_TOKENS = 4


@dataclass(frozen=True)
class Workload:
    """What one run does: `prompt_tokens` random token ids (seed 0), then `new_tokens` greedy ones, whatever they are."""

    prompt_tokens: int
    new_tokens: int
    io: str = "auto"

    def prompt(self, vocab_size: int) -> list[int]:
        return [int(token) for token in np.random.default_rng(0).integers(0, vocab_size, self.prompt_tokens)]


@dataclass
class Configuration:
    """One column of the experiment with what its runs gave; rates in tokens per second."""

    memory_budget: str | None
    threads: int | None
    memory: Memory | None = None
    io: str = ""
    prefill_rates: list[float] = field(default_factory=list)
    decode_rates: list[float] = field(default_factory=list)
    chr: float = 0.0
    prefill_bytes_per_token: float = 0.0
    decode_bytes_per_token: float = 0.0

    def as_json(self) -> dict[str, Any]:
        assert self.memory is not None
        return {
            "memory_budget": self.memory_budget,
            "threads": self.threads,
            "io": self.io,
            "budget_bytes": self.memory.budget_bytes,
            "expert_slots": self.memory.expert_slots,
            "expert_total": self.memory.expert_total,
            "prefill_tokens_per_s": spread(self.prefill_rates),
            "decode_tokens_per_s": spread(self.decode_rates),
            "chr": self.chr,
            "prefill_bytes_per_token": self.prefill_bytes_per_token,
            "decode_bytes_per_token": self.decode_bytes_per_token,
        }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and extremes of `values`."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def measure(
    artifact: Path,
    workload: Workload,
    budgets: Sequence[str | None],
    threads: Sequence[int | None],
    repeat: int,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Configuration]:
    """Runs every (budget, threads) `repeat` times, in rounds so that a slow minute of the machine falls on all of them.

    Each run opens the engine anew, warms it up with a few tokens and starts from a cold expert cache.
    """
    configurations = [Configuration(budget, count) for budget, count in itertools.product(budgets, threads)]
    total = repeat * len(configurations)
    for done, (_, configuration) in enumerate(itertools.product(range(repeat), configurations)):
        if progress is not None:
            progress("measuring", done, total)
        _run_once(artifact, workload, configuration)
    if progress is not None:
        progress("measuring", total, total)
    return configurations


def _run_once(artifact: Path, workload: Workload, configuration: Configuration) -> None:
    context = workload.prompt_tokens + workload.new_tokens
    with Engine(
        artifact, memory_budget=configuration.memory_budget, context_size=context, threads=configuration.threads, io=workload.io
    ) as engine:
        prompt = workload.prompt(engine.model.vocab_size)
        session = engine.session()
        session.generate(prompt[:_WARM_UP_TOKENS], _WARM_UP_TOKENS, stop_tokens=[])
        session.reset()
        session.generate(prompt, workload.new_tokens, stop_tokens=[])
        prefill, decode = session.metrics.prefill, session.metrics.decode
        configuration.memory, configuration.io = engine.memory, engine.io
        configuration.prefill_rates.append(prefill.tokens_per_s)
        configuration.decode_rates.append(decode.tokens_per_s)
        configuration.chr = decode.chr
        configuration.prefill_bytes_per_token = prefill.bytes_read / prefill.tokens
        configuration.decode_bytes_per_token = decode.bytes_read / decode.tokens

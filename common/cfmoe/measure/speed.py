"""Speed of prefill and decode over several memory budgets, thread counts and devices, the configurations interleaved."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cfmoe.errors import CFMoEError
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


@dataclass(frozen=True)
class Placement:
    """Where the phases run. One that nobody asked for by name (``derived``) is left out where the machine cannot do it."""

    prefill: str = "cpu"
    decode: str = "cpu"
    derived: bool = False

    def __str__(self) -> str:
        return self.prefill if self.prefill == self.decode else f"{self.prefill}/{self.decode}"


def placements(devices: Sequence[str]) -> list[Placement]:
    """Each device for both phases, ``prefill/decode`` pairs as written, and where the CPU is among them its pairs with the others."""
    out: list[Placement] = []
    for device in devices:
        prefill, slash, decode = device.partition("/")
        out.append(Placement(prefill, decode if slash else prefill))
    named = {(placement.prefill, placement.decode) for placement in out}
    for device in devices:
        for pair in ((device, "cpu"), ("cpu", device)):
            if "cpu" in devices and "/" not in device and pair not in named:
                named.add(pair)
                out.append(Placement(*pair, derived=True))
    return out


@dataclass
class Configuration:
    """One column of the experiment with what its runs gave; rates in tokens per second."""

    memory_budget: str | None
    threads: int | None
    placement: Placement = Placement()
    memory: Memory | None = None
    io: str = ""
    device_name: str = ""
    refused: str = ""  # why a derived placement cannot be had here
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
            "device": str(self.placement),
            "device_name": self.device_name,
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

    def seconds(self, workload: Workload) -> float:
        """For the prompt and the answer of `workload`, at the median rates."""
        prefill, decode = statistics.median(self.prefill_rates), statistics.median(self.decode_rates)
        return workload.prompt_tokens / prefill + workload.new_tokens / decode


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
    devices: Sequence[Placement] = (Placement(),),
) -> list[Configuration]:
    """Runs every (budget, threads, device) `repeat` times, in rounds so that a slow minute of the machine falls on all of them.

    Each run opens the engine anew, warms it up with a few tokens and starts from a cold expert cache. Derived placements that the machine
    refuses come back with the reason and without rates.
    """
    configurations = [Configuration(*values) for values in itertools.product(budgets, threads, devices)]
    total = repeat * len(configurations)
    for done, (_, configuration) in enumerate(itertools.product(range(repeat), configurations)):
        if progress is not None:
            progress("measuring", done, total)
        if configuration.refused:
            continue
        try:
            _run_once(artifact, workload, configuration)
        except CFMoEError as error:
            if not configuration.placement.derived:
                raise
            configuration.refused = str(error)
    if progress is not None:
        progress("measuring", total, total)
    return configurations


def _run_once(artifact: Path, workload: Workload, configuration: Configuration) -> None:
    context = workload.prompt_tokens + workload.new_tokens
    with Engine(
        artifact,
        memory_budget=configuration.memory_budget,
        context_size=context,
        threads=configuration.threads,
        io=workload.io,
        prefill_device=configuration.placement.prefill,
        decode_device=configuration.placement.decode,
    ) as engine:
        prompt = workload.prompt(engine.model.vocab_size)
        session = engine.session()
        session.generate(prompt[:_WARM_UP_TOKENS], _WARM_UP_TOKENS, stop_tokens=[])
        session.reset()
        session.generate(prompt, workload.new_tokens, stop_tokens=[])
        prefill, decode = session.metrics.prefill, session.metrics.decode
        configuration.memory, configuration.io, configuration.device_name = engine.memory, engine.io, engine.device_name
        configuration.prefill_rates.append(prefill.tokens_per_s)
        configuration.decode_rates.append(decode.tokens_per_s)
        configuration.chr = decode.chr
        configuration.prefill_bytes_per_token = prefill.bytes_read / prefill.tokens
        configuration.decode_bytes_per_token = decode.bytes_read / decode.tokens

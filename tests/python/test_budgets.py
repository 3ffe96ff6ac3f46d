"""The same tokens at every budget, I/O mode and thread count; budgets honoured; accounting that agrees with the event log."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cfmoe.errors import CFMoEError
from cfmoe.runtime import Engine, Sampling

PROMPTS = (1, 7, 128, 700)
SAMPLINGS = {"greedy": Sampling(), "seeded": Sampling(temperature=0.9, top_k=40, top_p=0.95, repetition_penalty=1.1, seed=11)}


def minimum_budget(artifact: Path) -> int:
    """The smallest budget in bytes, as the refusal names it."""
    with pytest.raises(CFMoEError) as refused:
        Engine(artifact, memory_budget=1)
    found = re.search(r"\((\d+) bytes\)", str(refused.value))
    assert found is not None, str(refused.value)
    return int(found[1])


def generate(artifact: Path, prompt: int, sampling: Sampling, budget: int | str | None, io: str, threads: int | None = None) -> list[int]:
    tokens = [(31 * i + 7) % 8000 + 10 for i in range(prompt)]
    with Engine(artifact, memory_budget=budget, io=io, threads=threads) as engine, engine.session() as session:
        return list(session.generate(tokens, 24, sampling=sampling, stop_tokens=[]).token_ids)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_tokens_do_not_depend_on_budget_or_io(prompt: int, demo_artifact: Path) -> None:
    budgets: list[int | str | None] = [minimum_budget(demo_artifact), "25%", "50%", None]
    for sampling in SAMPLINGS.values():
        expected = generate(demo_artifact, prompt, sampling, None, "buffered", threads=1)
        assert len(expected) == 24
        for budget, io in itertools.product(budgets, ("direct", "buffered", "mmap")):
            assert generate(demo_artifact, prompt, sampling, budget, io) == expected, (budget, io)


def test_a_budget_too_small_is_refused_with_the_smallest_that_works(demo_artifact: Path) -> None:
    smallest = minimum_budget(demo_artifact)
    Engine(demo_artifact, memory_budget=smallest).close()
    with pytest.raises(CFMoEError, match="budget"):
        Engine(demo_artifact, memory_budget=smallest - 1)


@pytest.mark.parametrize("budget", ["5%", "25%", "60%", "100%"])
def test_parts_add_up_to_at_most_the_budget(budget: str, demo_artifact: Path) -> None:
    with Engine(demo_artifact, memory_budget=budget) as engine:
        m = engine.memory
        assert m.weights_bytes + m.kv_bytes + m.workspace_bytes + m.pool_bytes + m.arena_bytes <= m.budget_bytes


RESIDENT = """
import sys
from cfmoe.runtime import Engine
from cfmoe.runtime._capi import library
from cfmoe.runtime.memory import PeakGrowth
library()
artifact, budget, io = sys.argv[1:]
with PeakGrowth() as peak, Engine(artifact, memory_budget=budget, io=io) as engine, engine.session() as session:
    session.generate([(31 * i + 7) % 8000 + 10 for i in range(700)], 48, stop_tokens=[])
    print(peak.bytes, engine.memory.budget_bytes)
"""


@pytest.mark.parametrize("io", ["direct", "buffered"])
@pytest.mark.parametrize("budget", ["5%", "50%"])
def test_resident_growth_stays_within_the_budget(budget: str, io: str, demo_artifact: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", RESIDENT, str(demo_artifact), budget, io], capture_output=True, text=True, check=True, timeout=120
    )
    growth, allowed = map(int, result.stdout.split())
    assert growth <= allowed + (8 << 20)


@pytest.mark.parametrize("budget", ["3%", "30%", "100%"])
def test_metrics_equal_the_event_log(budget: str, demo_artifact: Path) -> None:
    with Engine(demo_artifact, memory_budget=budget, log_events=True) as engine, engine.session() as session:
        session.generate([(17 * i) % 8000 + 10 for i in range(300)], 32, stop_tokens=[])
        metrics, events = session.metrics, session.events()
        record = engine.model.expert_record_bytes
    for phase, decode in ((metrics.prefill, False), (metrics.decode, True)):
        mine = [e for e in events if bool(e.decode) == decode]
        assert phase.hits == sum(bool(e.hit) for e in mine)
        assert phase.misses == sum(not e.hit for e in mine)
    # Direct reads are rounded up to whole sectors.
    assert metrics.decode.misses * record <= metrics.decode.bytes_read <= metrics.decode.misses * (record + 4096)


def test_prefill_reads_each_expert_at_most_once_per_chunk_and_layer(demo_artifact: Path) -> None:
    with Engine(demo_artifact, memory_budget="10%", log_events=True) as engine, engine.session() as session:
        session.feed([(17 * i) % 8000 + 10 for i in range(700)])
        events = [e for e in session.events() if not e.decode]
        chunk = engine.model.prefill_chunk
    seen = [(e.position // chunk, e.layer, e.expert) for e in events]
    assert len(seen) == len(set(seen))

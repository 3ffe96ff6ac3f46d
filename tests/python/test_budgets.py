"""The same tokens at every budget, I/O mode and thread count; budgets honoured; accounting that agrees with the event log."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cfmoe.errors import CFMoEError
from cfmoe.runtime import Engine, Sampling

PROMPTS = (1, 7, 128, 700)
SAMPLINGS = {"greedy": Sampling(), "seeded": Sampling(temperature=0.9, top_k=40, top_p=0.95, repetition_penalty=1.1, seed=11)}


@pytest.fixture(params=["demo", "moe-63m"])
def artifact(request: pytest.FixtureRequest, compiled: Callable[[Path], Path]) -> Path:
    return compiled(request.getfixturevalue("demo_model" if request.param == "demo" else "moe_63m"))


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


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_tokens_do_not_depend_on_budget_io_or_threads(prompt: int, sampling: str, artifact: Path) -> None:
    expected = generate(artifact, prompt, SAMPLINGS[sampling], None, "buffered", threads=1)
    assert len(expected) == 24
    budgets: list[int | str | None] = [minimum_budget(artifact), "10%", "25%", "50%", "75%", None]
    # A Latin square: every budget and every I/O mode meets each thread count.
    threads = itertools.cycle((2, 1, 3, 1, 3, 2, 3, 2, 1))
    for budget, io in itertools.product(budgets, ("direct", "buffered", "mmap")):
        count = next(threads)
        assert generate(artifact, prompt, SAMPLINGS[sampling], budget, io, count) == expected, (budget, io, count)


def test_a_budget_too_small_is_refused_with_the_smallest_that_works(artifact: Path) -> None:
    smallest = minimum_budget(artifact)
    Engine(artifact, memory_budget=smallest).close()
    with pytest.raises(CFMoEError, match="budget"):
        Engine(artifact, memory_budget=smallest - 1)


@pytest.mark.parametrize("budget", ["5%", "25%", "60%", "100%"])
def test_parts_add_up_to_at_most_the_budget(budget: str, artifact: Path) -> None:
    with Engine(artifact, memory_budget=budget) as engine:
        m = engine.memory
        assert m.weights_bytes + m.kv_bytes + m.workspace_bytes + m.pool_bytes + m.arena_bytes <= m.budget_bytes


RESIDENT = """
import sys
from cfmoe.runtime import Engine, load_library
from cfmoe.runtime.memory import PeakGrowth
load_library()
artifact, budget, io = sys.argv[1:]
with PeakGrowth() as peak, Engine(artifact, memory_budget=budget, io=io) as engine, engine.session() as session:
    session.generate([(31 * i + 7) % 8000 + 10 for i in range(700)], 48, stop_tokens=[])
    print(peak.bytes, engine.memory.budget_bytes)
"""


@pytest.mark.parametrize("io", ["direct", "buffered"])
@pytest.mark.parametrize("budget", ["5%", "50%"])
def test_resident_growth_stays_within_the_budget(budget: str, io: str, artifact: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", RESIDENT, str(artifact), budget, io], capture_output=True, text=True, check=True, timeout=120
    )
    growth, allowed = map(int, result.stdout.split())
    assert growth <= allowed + (8 << 20)


@pytest.mark.parametrize("budget", ["3%", "30%", "100%"])
def test_metrics_equal_the_event_log(budget: str, artifact: Path) -> None:
    with Engine(artifact, memory_budget=budget, log_events=True) as engine, engine.session() as session:
        session.generate([(17 * i) % 8000 + 10 for i in range(300)], 32, stop_tokens=[])
        metrics, events = session.metrics, session.events()
        record = engine.model.expert_record_bytes
    for phase, decode in ((metrics.prefill, False), (metrics.decode, True)):
        mine = [e for e in events if bool(e.decode) == decode]
        assert phase.hits == sum(bool(e.hit) for e in mine)
        assert phase.misses == sum(not e.hit for e in mine)
    # Direct reads are rounded up to whole sectors.
    assert metrics.decode.misses * record <= metrics.decode.bytes_read <= metrics.decode.misses * (record + 4096)


def test_prefill_reads_each_expert_at_most_once_per_chunk_and_layer(artifact: Path) -> None:
    with Engine(artifact, memory_budget="10%", log_events=True) as engine, engine.session() as session:
        session.feed([(17 * i) % 8000 + 10 for i in range(700)])
        events = [e for e in session.events() if not e.decode]
        chunk = engine.model.prefill_chunk
    seen = [(e.position // chunk, e.layer, e.expert) for e in events]
    assert len(seen) == len(set(seen))

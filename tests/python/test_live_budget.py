"""The budget changed in the middle of a conversation: the same tokens, memory given back, the heat map true; exported symbols."""

from __future__ import annotations

import importlib.resources
import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from cfmoe.errors import CFMoEError
from cfmoe.runtime import Engine, Sampling
from support import ROOT

PROMPT = [(31 * i + 7) % 8000 + 10 for i in range(300)]
NEXT = [(29 * i + 3) % 8000 + 10 for i in range(60)]


@pytest.fixture(scope="module")
def expected(demo_artifact: Path) -> tuple[list[int], list[int]]:
    with Engine(demo_artifact, threads=1) as engine, engine.session() as session:
        return tuple(session.generate(p, 24, Sampling(0.8, seed=3), stop_tokens=[]).token_ids for p in (PROMPT, NEXT))  # type: ignore[return-value]


@pytest.mark.parametrize("io", ["direct", "mmap"])
def test_tokens_do_not_depend_on_budgets_changed_on_the_way(io: str, demo_artifact: Path, expected: tuple[list[int], list[int]]) -> None:
    with Engine(demo_artifact, memory_budget="100%", io=io) as engine, engine.session() as session:
        budgets = iter(["40%", "5%", "90%", "3%", None, "50%"] * 8)
        slots = set()

        def change(_token: int) -> None:
            slots.add(engine.set_memory_budget(next(budgets)).expert_slots)

        assert session.generate(PROMPT, 24, Sampling(0.8, seed=3), stop_tokens=[], on_token=change).token_ids == expected[0]
        engine.set_memory_budget("10%")
        assert session.generate(NEXT, 24, Sampling(0.8, seed=3), stop_tokens=[], on_token=change).token_ids == expected[1]
        assert len(slots) == 6


def test_trims_from_another_thread_change_no_token(demo_artifact: Path, expected: tuple[list[int], list[int]]) -> None:
    with Engine(demo_artifact, memory_budget="100%", io="buffered") as engine, engine.session() as session:
        stop = threading.Event()

        def press() -> None:
            budget = engine.memory.largest_budget_bytes
            while not stop.wait(0.001):
                budget -= 200_000
                engine.trim(max(budget, 1))
                memory = engine.memory
                assert memory.weights_bytes + memory.kv_bytes + memory.workspace_bytes + memory.pool_bytes <= memory.budget_bytes

        presser = threading.Thread(target=press)
        presser.start()
        tokens = [session.generate(p, 24, Sampling(0.8, seed=3), stop_tokens=[]).token_ids for p in (PROMPT, NEXT)]
        stop.set()
        presser.join()
        assert tokens == list(expected)
        engine.trim()
        memory = engine.memory
        assert memory.budget_bytes == memory.smallest_budget_bytes
        assert memory.expert_slots == engine.model.top_k
        engine.trim(memory.largest_budget_bytes)
        assert engine.memory == memory


def test_a_budget_too_small_is_refused_and_changes_nothing(demo_artifact: Path) -> None:
    with Engine(demo_artifact, memory_budget="50%") as engine:
        before = engine.memory
        with pytest.raises(CFMoEError, match=rf"smallest that works.*\({before.smallest_budget_bytes} bytes\)"):
            engine.set_memory_budget(before.smallest_budget_bytes - 1)
        with pytest.raises(CFMoEError, match="fewer than the 4"):
            engine.set_memory_budget("1%")
        assert engine.memory == before
        assert engine.set_memory_budget(before.smallest_budget_bytes).expert_slots == engine.model.top_k
        assert engine.set_memory_budget(before.largest_budget_bytes).expert_slots == before.expert_total


def test_the_heat_map_shows_what_is_in_memory(demo_artifact: Path) -> None:
    with Engine(demo_artifact, memory_budget="30%", log_events=True) as engine, engine.session() as session:
        assert not engine.residents().any()
        shown: list[np.ndarray] = []
        session.generate(PROMPT, 8, stop_tokens=[], on_token=lambda _: shown.append(engine.residents()))
        memory = engine.memory
        assert [int(s.sum()) for s in shown] == [memory.expert_slots] * 8
        last = {(e.layer, e.expert) for e in session.events() if e.decode and e.position == session.position - 2}
        assert len(last) == engine.model.moe_layers * engine.model.top_k
        assert all(shown[-1][key] for key in last)
        engine.trim()
        assert engine.residents().sum() == engine.model.top_k


RESIDENT = """
import json, sys
from cfmoe.runtime import Engine, load_library
from cfmoe.runtime.memory import resident_bytes
load_library()
with Engine(sys.argv[1], memory_budget="100%", io="direct") as engine, engine.session() as session:
    session.generate([(31 * i + 7) % 8000 + 10 for i in range(700)], 8, stop_tokens=[])
    full, pool = resident_bytes(), engine.memory.pool_bytes
    engine.trim()
    print(json.dumps([pool - engine.memory.pool_bytes, full - resident_bytes()]))
"""


def test_a_trim_gives_memory_back(demo_artifact: Path) -> None:
    result = subprocess.run([sys.executable, "-c", RESIDENT, str(demo_artifact)], capture_output=True, text=True, check=True, timeout=120)
    shrunk, fallen = json.loads(result.stdout)
    assert shrunk > 4 << 20
    # A slot's padding was never touched.
    assert fallen >= 0.7 * shrunk


def test_a_recorded_trace_names_no_slots_that_were_changed(demo_artifact: Path, tmp_path: Path) -> None:
    from cfmoe.trace.trace import Trace

    with Engine(demo_artifact, memory_budget="50%", record_trace=True) as engine, engine.session() as session:
        session.generate(PROMPT, 4, stop_tokens=[])
        session.write_trace(tmp_path / "a.trace")
        assert Trace.read(tmp_path / "a.trace").slots == engine.memory.expert_slots
        engine.set_memory_budget("40%")
        session.write_trace(tmp_path / "a.trace")
        assert Trace.read(tmp_path / "a.trace").slots == 0


def test_exported_symbols_are_the_c_api() -> None:
    declared: set[str] = set()
    for header in (ROOT / "runtime_ext" / "include" / "cfmoe").glob("*.h"):
        declared |= set(re.findall(r"CFMOE_API[^;(]*?\b(cfmoe_\w+)\(", header.read_text()))
    with importlib.resources.as_file(importlib.resources.files("cfmoe.runtime").joinpath("libcfmoe.so")) as library:
        listing = subprocess.run(["nm", "-D", "--defined-only", str(library)], capture_output=True, text=True, check=True).stdout
    assert {line.split()[2] for line in listing.splitlines()} == declared


def test_the_header_stays_narrow() -> None:
    assert len((ROOT / "runtime_ext" / "include" / "cfmoe" / "cfmoe.h").read_text().splitlines()) <= 250

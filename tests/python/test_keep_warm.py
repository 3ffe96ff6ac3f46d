"""Warm starts: the first prompt finds what was read ahead, no token depends on it, and a trace gives the order."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from cfmoe.errors import CFMoEError
from cfmoe.runtime import Engine, Sampling
from cfmoe.trace.metrics import popular_experts
from cfmoe.trace.trace import Phase, Segment, Trace

PROMPT = [(31 * i + 7) % 8000 + 10 for i in range(120)]
SAMPLING = Sampling(0.8, seed=5)


def wait_until_filled(engine: Engine) -> None:
    deadline = time.monotonic() + 60
    while engine.residents().sum() < engine.memory.expert_slots:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def cold(demo_artifact: Path) -> list[int]:
    with Engine(demo_artifact, memory_budget="60%") as engine, engine.session() as session:
        return session.generate(PROMPT, 24, SAMPLING, stop_tokens=[]).token_ids


@pytest.mark.parametrize("io", ["direct", "buffered", "mmap"])
def test_a_warm_start_misses_nothing_that_it_has_read_and_changes_no_token(io: str, demo_artifact: Path, cold: list[int]) -> None:
    with Engine(demo_artifact, memory_budget="100%", io=io, log_events=True) as engine, engine.session() as session:
        engine.keep_warm()
        wait_until_filled(engine)
        for _ in range(2):
            assert session.generate(PROMPT, 24, SAMPLING, stop_tokens=[]).token_ids == cold
            metrics = session.metrics
            assert metrics.prefill.misses == metrics.decode.misses == metrics.decode.bytes_read == 0
            events = session.events()
            assert len(events) == metrics.prefill.hits + metrics.decode.hits
            assert max(event.position for event in events) < len(PROMPT) + 24
            session.reset()
            assert session.metrics.prefill.prefetched == 0


def test_a_prompt_that_comes_at_once_counts_the_same_as_one_that_waits(demo_artifact: Path, cold: list[int]) -> None:
    found = []
    for wait in (True, False):
        with Engine(demo_artifact, memory_budget="60%") as engine, engine.session() as session:
            engine.keep_warm(range(191, -1, -1))
            if wait:
                wait_until_filled(engine)
            assert session.generate(PROMPT, 24, SAMPLING, stop_tokens=[]).token_ids == cold
            metrics = session.metrics
            found.append((metrics.prefill.hits, metrics.prefill.misses, metrics.decode.hits, metrics.decode.misses))
            memory = engine.memory
            assert memory.weights_bytes + memory.kv_bytes + memory.workspace_bytes + memory.pool_bytes <= memory.budget_bytes
    assert found[0] == found[1]


def test_conversations_find_what_the_one_before_left(demo_artifact: Path) -> None:
    with Engine(demo_artifact, memory_budget="100%") as engine, engine.session() as session:
        engine.keep_warm([])
        assert not engine.residents().any()
        first = session.generate(PROMPT, 24, SAMPLING, stop_tokens=[]).token_ids
        assert session.metrics.prefill.misses > 0
        assert session.metrics.prefill.prefetched == 0
        session.reset()
        assert session.generate(PROMPT, 24, SAMPLING, stop_tokens=[]).token_ids == first
        assert session.metrics.prefill.misses == 0


def test_wrong_experts_are_refused(demo_artifact: Path) -> None:
    with Engine(demo_artifact) as engine:
        with pytest.raises(CFMoEError, match="expert 192 to keep warm is outside 0 to 191"):
            engine.keep_warm([3, 192])
        with pytest.raises(CFMoEError, match="negative"):
            engine.keep_warm([-1])
        assert not engine.residents().any()


def test_popular_experts_come_first_and_none_is_left_out() -> None:
    ids = np.array([[[0, 2], [1, 3]], [[2, 1], [3, 0]], [[2, 0], [3, 1]]], dtype=np.uint8)
    trace = Trace(ids, (Segment(3, Phase.DECODE, True, False, 0),), experts=4)
    assert popular_experts(trace) == [2, 7, 0, 5, 1, 4, 3, 6]

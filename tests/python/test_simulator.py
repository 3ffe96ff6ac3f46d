"""The simulator: golden hit counts, and what holds for every trace, policy and cache size."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import golden
from cfmoe.errors import CFMoEError
from cfmoe.runtime.simulator import Counts, Semantics, Simulation, Simulator, default_policy, engine_policies, simulator_policies
from cfmoe.trace import Phase, Trace
from cfmoe.trace.synthetic import synthetic_trace

ORACLES = ["opt", "opt-bypass", "lopt"]


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    """A small trace with scores that know nothing: uniform or skewed, sticky or not, of one sample or several, with prompts or without."""
    experts = draw(st.integers(1, 12))
    seed = draw(st.integers(0, 1 << 32))
    trace = synthetic_trace(
        tokens=draw(st.integers(1, 40)),
        layers=draw(st.integers(1, 3)),
        experts=experts,
        top_k=draw(st.integers(1, min(experts, 4))),
        zipf=draw(st.sampled_from([0.0, 0.7, 1.5])),
        stickiness=draw(st.sampled_from([0.0, 0.5, 0.9])),
        sample_tokens=draw(st.integers(1, 40)),
        prompt_tokens=draw(st.integers(0, 20)),
        seed=seed,
    )
    scores = np.random.default_rng(seed).integers(0, 65536, (trace.tokens, trace.layers, trace.experts))
    return replace(trace, scores=scores.astype(np.uint16), chunk_size=draw(st.integers(1, 12)))


def hits_of(simulator: Simulator, policy: str, slots: int, lookahead: int | None = None) -> int:
    return simulator.run(policy, slots, lookahead).all.hits


def compulsory_misses(trace: Trace) -> int:
    """Distinct experts of each sample, summed."""
    starts, token = [], 0
    for segment in trace.segments:
        if segment.begins_sample:
            starts.append(token)
        token += segment.tokens
    keys = trace.ids.astype(np.int64) + np.arange(trace.layers)[:, None] * trace.experts
    return sum(len(np.unique(sample)) for sample in np.split(keys, starts[1:]))


def test_policies() -> None:
    assert simulator_policies() == engine_policies() + ORACLES
    assert default_policy() in engine_policies()


def test_golden_hits() -> None:
    """What changes these counts changes what every user's cache does: see golden.py for how to make them anew."""
    trace = Trace.read(golden.TRACE)
    assert trace.scores is not None
    expected = json.loads(golden.HITS.read_text())
    assert golden.hits(trace) == expected
    assert set(expected) == {f"{semantics} {policy}" for semantics in Semantics for policy in simulator_policies()}
    assert all(len(row) == 5 for row in expected.values())
    assert golden.TRACE.stat().st_size < 60_000


@settings(deadline=None, max_examples=200)
@given(trace=traces(), warm=st.booleans(), data=st.data())
def test_no_policy_is_better_than_opt_with_bypass(trace: Trace, warm: bool, data: st.DataObject) -> None:
    with Simulator(trace, semantics=Semantics.reference, warm=warm) as simulator:
        slots = data.draw(st.integers(0, simulator.total))
        bound = hits_of(simulator, "opt-bypass", slots)
        for policy in simulator_policies():
            assert bound >= hits_of(simulator, policy, slots, data.draw(st.integers(0, 50))), policy


@settings(deadline=None, max_examples=200)
@given(trace=traces(), warm=st.booleans(), data=st.data())
def test_no_policy_that_always_admits_is_better_than_opt(trace: Trace, warm: bool, data: st.DataObject) -> None:
    with Simulator(trace, semantics=Semantics.reference, warm=warm) as simulator:
        slots = data.draw(st.integers(0, simulator.total))
        bound = hits_of(simulator, "opt", slots)
        for policy in [*engine_policies(), "lopt"]:
            assert bound >= hits_of(simulator, policy, slots, data.draw(st.integers(0, 50))), policy


@settings(deadline=None, max_examples=200)
@given(trace=traces(), warm=st.booleans())
def test_some_policies_gain_by_every_slot(trace: Trace, warm: bool) -> None:
    """LRU and OPT of a size keep all that they keep of a smaller one."""
    with Simulator(trace, semantics=Semantics.reference, warm=warm) as simulator:
        for policy in ("lru", "opt", "opt-bypass"):
            rates = [simulator.run(policy, slots).all.chr for slots in range(simulator.total + 1)]
            assert rates == sorted(rates), policy
            assert rates[0] == 0


@settings(deadline=None, max_examples=200)
@given(trace=traces(), semantics=st.sampled_from(Semantics))
def test_when_everything_fits_only_first_accesses_miss(trace: Trace, semantics: Semantics) -> None:
    expected = compulsory_misses(trace)
    with Simulator(trace, semantics=semantics) as simulator:
        for policy in simulator_policies():
            run = simulator.run(policy, simulator.total)
            assert (run.all.misses, run.hand_over_loads) == (expected, 0), policy
            assert simulator.run(policy, simulator.total + 1000) == run


@settings(deadline=None, max_examples=200)
@given(trace=traces(), semantics=st.sampled_from(Semantics), warm=st.booleans(), data=st.data())
def test_counts_add_up(trace: Trace, semantics: Semantics, warm: bool, data: st.DataObject) -> None:
    groups = trace.layers * sum(segment.tokens for segment in trace.segments if segment.phase == Phase.DECODE)
    with Simulator(trace, semantics=semantics, warm=warm) as simulator:
        slots = data.draw(st.integers(trace.top_k, simulator.total))
        for policy in simulator_policies():
            run = simulator.run(policy, slots)
            assert run.decode.accesses == groups * trace.top_k
            assert sum(run.groups_by_misses) == groups
            assert sum(misses * count for misses, count in enumerate(run.groups_by_misses)) == run.decode.misses
            prompts = trace.tokens * trace.layers - groups
            if semantics is Semantics.reference:
                assert run.prefill.accesses == prompts * trace.top_k
                assert run.hand_over_loads == 0
            else:
                # An expert counts once per chunk and layer.
                assert run.prefill.accesses <= prompts * trace.top_k
            assert run.all == Counts(run.prefill.hits + run.decode.hits, run.prefill.misses + run.decode.misses)


@settings(deadline=None, max_examples=30)
@given(trace=traces(), semantics=st.sampled_from(Semantics), data=st.data())
def test_a_sweep_is_its_runs(trace: Trace, semantics: Semantics, data: st.DataObject) -> None:
    seen: list[tuple[str, int, int]] = []
    with Simulator(trace, semantics=semantics) as simulator:
        policies = data.draw(st.lists(st.sampled_from(simulator_policies()), max_size=4))
        sizes = data.draw(st.lists(st.integers(trace.top_k, simulator.total + 2), max_size=4))
        lookahead = data.draw(st.none() | st.integers(0, 100))
        runs = simulator.sweep(policies, iter(sizes), lookahead, lambda *step: seen.append(step))
        assert runs == [simulator.run(policy, slots, lookahead) for policy in policies for slots in sizes]
    count = len(policies) * len(sizes)
    assert seen == [("simulating", done, count) for done in range(count + 1)]


def test_a_sweep_passes_on_what_a_run_refuses() -> None:
    with Simulator(synthetic_trace(50, 2, 8, 2)) as simulator, pytest.raises(CFMoEError, match="cache of 1 experts"):
        simulator.sweep(["lru", "lfu"], [4, 1, 8])


def test_four_tokens_are_lopts_window() -> None:
    trace = synthetic_trace(200, 3, 16, 2, stickiness=0.3)
    with Simulator(trace) as simulator:
        assert simulator.run("lopt", 12) == simulator.run("lopt", 12, lookahead=4 * 3 * 2)
        assert simulator.run("lopt", 12) != simulator.run("lopt", 12, lookahead=2 * 3 * 2)
        assert simulator.run("lopt", 12, lookahead=2**32 - 1).decode == simulator.run("opt", 12).decode


def test_chunk_sizes() -> None:
    """The option goes before the trace's own, which goes before 256."""

    def run(of_trace: int, option: int | None) -> Simulation:
        trace = replace(synthetic_trace(600, 2, 8, 2, prompt_tokens=500), chunk_size=of_trace)
        with Simulator(trace, chunk_size=option) as simulator:
            return simulator.run("lru", 6)

    assert run(64, None) == run(0, 64) == run(7, 64)
    assert run(0, None) == run(256, None)
    assert len({run(size, None).prefill.accesses for size in (16, 64, 256, 500)}) == 4


def test_what_a_run_refuses() -> None:
    trace = synthetic_trace(20, 2, 8, 2)
    with Simulator(trace) as simulator:
        for policy, slots, expected in [
            ("belady", 4, 'cache policy "belady" is unknown; use one of: lru, '),
            ("lru", 1, "a cache of 1 experts is smaller than the 2 that one token needs"),
            ("lru", -1, "a cache of -1 experts is not allowed"),
            ("learned", 4, 'cache policy "learned" predicts from the router\'s scores, which the trace does not have'),
            ("gate", 4, 'cache policy "gate" predicts from the router\'s scores'),
        ]:
            with pytest.raises(CFMoEError) as caught:
                simulator.run(policy, slots)
            assert expected in str(caught.value)
        for lookahead in (-1, 2**32):
            with pytest.raises(CFMoEError, match=f"lookahead of {lookahead}"):
                simulator.run("lopt", 4, lookahead)
    with pytest.raises(CFMoEError, match="the simulator is closed"):
        simulator.run("lru", 4)
    simulator.close()
    for chunk_size in (-1, 0, 2**32):
        with pytest.raises(CFMoEError, match=f"chunk size of {chunk_size}"):
            Simulator(trace, chunk_size=chunk_size)


def test_what_no_simulator_takes() -> None:
    ids = np.zeros((1, 1024, 1), np.uint16)
    trace = synthetic_trace(1, 1, 1, 1)
    with pytest.raises(CFMoEError, match="1024 layers of 65535 experts, more than the 1048576"):
        Simulator(Trace(ids, trace.segments, 65535), name="large.trace")


def test_semantics_by_name() -> None:
    """A plain word means the same as the member."""
    trace = synthetic_trace(20, 2, 8, 2)
    with Simulator(trace, semantics=Semantics("reference")) as simulator, Simulator(trace, semantics="reference") as named:  # type: ignore[arg-type]
        assert named.run("lru", 0) == simulator.run("lru", 0)

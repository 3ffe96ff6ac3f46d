"""The simulator tells the truth about the engine: on the trace that an engine recorded it counts the engine's own hits and misses."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cfmoe.errors import CFMoEError
from cfmoe.runtime import Engine, Metrics, Sampling
from cfmoe.runtime.engine import Event
from cfmoe.runtime.simulator import Counts, Semantics, Simulation, Simulator
from cfmoe.trace import Phase, Trace

BUDGETS = ("5%", "30%", "70%")
POLICIES = ("lru", "learned")
TURNS = ((90, 24), (31, 17))  # tokens of the prompt, new tokens
LONG = ((700, 8), (300, 8))
SECTOR = 4096  # direct reads are rounded up to whole ones


@pytest.fixture(params=["demo", "moe-63m"])
def artifact(request: pytest.FixtureRequest, compiled: Callable[[Path], Path]) -> Path:
    return compiled(request.getfixturevalue("demo_model" if request.param == "demo" else "moe_63m"))


class Recorded:
    """An engine's two turns in one session: its counts, its events and its trace, and that trace replayed as the engine ran."""

    def __init__(self, artifact: Path, out: Path, budget: str, policy: str, turns: tuple[tuple[int, int], ...], io: str = "auto") -> None:
        with (
            Engine(artifact, memory_budget=budget, policy=policy, io=io, log_events=True, record_trace=True) as engine,
            engine.session() as session,
        ):
            tokens = ((37 * i + 11) % 8000 + 10 for i in itertools.count())
            for prompt, new in turns:
                session.generate(list(itertools.islice(tokens, prompt)), new, Sampling(temperature=0.9, seed=3), stop_tokens=[])
            session.write_trace(out)
            self.policy, self.memory, self.model = engine.policy, engine.memory, engine.model
            self.trace = Trace.read(out)
            with Simulator(self.trace) as simulator:
                self.simulation: Simulation = simulator.run(self.policy, self.memory.expert_slots)
            # Hand-over reads in the background, and no decoded token need have met its last reads.
            deadline = time.monotonic() + 10
            loads = self.simulation.prefill.misses + self.simulation.hand_over_loads
            while session.metrics.prefill.bytes_read < loads * self.model.expert_record_bytes and time.monotonic() < deadline:
                time.sleep(0.01)
            self.metrics: Metrics = session.metrics
            self.events: list[Event] = session.events()


def assert_conforms(run: Recorded) -> None:
    """Hits and misses of each phase, to the access; and what was read, hand-over included."""
    prefill, decode, simulation = run.metrics.prefill, run.metrics.decode, run.simulation
    assert simulation.prefill == Counts(prefill.hits, prefill.misses)
    assert simulation.decode == Counts(decode.hits, decode.misses)
    loads = simulation.prefill.misses + simulation.hand_over_loads
    per_load = prefill.bytes_read // loads
    assert run.model.expert_record_bytes <= per_load < run.model.expert_record_bytes + SECTOR
    assert prefill.bytes_read == loads * per_load
    assert decode.bytes_read == simulation.decode.misses * per_load
    by_group = misses_by_group(run)
    assert simulation.groups_by_misses == tuple(by_group.count(misses) for misses in range(run.model.top_k + 1))


def misses_by_group(run: Recorded) -> list[int]:
    """Misses of every decode group, from the events."""
    decoded = [event for event in run.events if event.decode]
    groups = itertools.groupby(decoded, key=lambda event: (event.position, event.layer))
    return [sum(not event.hit for event in group) for _, group in groups]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("budget", BUDGETS)
def test_engine_and_simulator_count_alike(budget: str, policy: str, artifact: Path, tmp_path: Path) -> None:
    run = Recorded(artifact, tmp_path / "run.trace", budget, policy, TURNS)
    assert run.policy == run.trace.policy == policy
    assert run.memory.expert_slots == run.trace.slots
    assert run.model.expert_record_bytes == run.trace.expert_bytes
    assert (run.trace.scores is not None) == (policy == "learned")
    # The last token of each turn is read with the next prompt.
    assert [(s.tokens, s.phase, s.hand_over, s.position) for s in run.trace.segments] == [
        (90, Phase.PREFILL, True, 0),
        (23, Phase.DECODE, False, 90),
        (32, Phase.PREFILL, True, 113),
        (16, Phase.DECODE, False, 145),
    ]
    assert_conforms(run)


@pytest.mark.parametrize("policy", POLICIES)
def test_with_prompts_of_several_chunks(policy: str, artifact: Path, tmp_path: Path) -> None:
    run = Recorded(artifact, tmp_path / "run.trace", "20%", policy, LONG)
    assert run.trace.chunk_size == run.model.prefill_chunk < 300
    assert [s.tokens for s in run.trace.segments] == [700, 7, 301, 7]
    assert_conforms(run)
    # It is the chunks that count: in one piece the prompts have fewer accesses, in smaller ones more.
    with Simulator(run.trace, chunk_size=2048) as whole, Simulator(run.trace, chunk_size=32) as small:
        accesses = [simulator.run(policy, run.trace.slots).prefill.accesses for simulator in (whole, small)]
    assert accesses[0] < run.simulation.prefill.accesses < accesses[1]


def test_with_mapped_experts(artifact: Path, tmp_path: Path) -> None:
    """The same counts, whatever reads the records."""
    runs = [Recorded(artifact, tmp_path / f"{io}.trace", "15%", "learned", TURNS, io) for io in ("mmap", "buffered")]
    for run in runs:
        assert_conforms(run)
    assert runs[0].simulation == runs[1].simulation
    assert runs[0].trace.to_bytes() == runs[1].trace.to_bytes()


def test_events_are_the_accesses_of_the_trace(artifact: Path, tmp_path: Path) -> None:
    """Decode: one per (token, layer, k) in routing order. The reference's stream is the same as the engine's there."""
    run = Recorded(artifact, tmp_path / "run.trace", "30%", "lru", TURNS)
    decoded = [(event.position, event.layer, event.expert) for event in run.events if event.decode]
    expected, token = [], 0
    for segment in run.trace.segments:
        if segment.phase == Phase.DECODE:
            expected += [
                (segment.position + i, layer, int(expert))
                for i in range(segment.tokens)
                for layer in range(run.trace.layers)
                for expert in run.trace.ids[token + i, layer]
            ]
        token += segment.tokens
    assert decoded == expected
    with Simulator(run.trace, semantics=Semantics.reference) as reference:
        assert reference.run("lru", run.trace.slots).decode.accesses == len(decoded)


def test_with_other_calls_and_a_second_sample(artifact: Path, tmp_path: Path) -> None:
    """Prompts in several calls, decode of given tokens, and a reset, which begins a sample with a cold cache."""
    tokens = [(53 * i + 5) % 8000 + 10 for i in range(900)]
    counted = {"prefill": Counts(0, 0), "decode": Counts(0, 0)}
    with (
        Engine(artifact, memory_budget="20%", policy="learned", record_trace=True) as engine,
        engine.session() as session,
    ):
        for sample in range(2):
            session.reset()
            session.feed(tokens[:256], logits=False)
            session.feed(tokens[256:300], logits=False)
            session.feed(tokens[300:340], logits=False)
            session.feed(tokens[340:352], decode=True, logits=False)
            session.feed(tokens[400 + sample : 430], logits=False)
            session.generate(tokens[500:503], 9, stop_tokens=[])
            for name, counts in counted.items():
                phase = getattr(session.metrics, name)
                counted[name] = counts + Counts(phase.hits, phase.misses)
        session.write_trace(tmp_path / "run.trace")
        slots = engine.memory.expert_slots
    trace = Trace.read(tmp_path / "run.trace")
    # Chunks of 256: the second call goes on where the first ended with a whole chunk, the third begins a chunk of its own.
    expected = [(300, False), (40, True), (12, False), (30, False), (3, True), (8, False)]
    assert [(s.tokens, s.hand_over) for s in trace.segments[:6]] == expected
    assert [s.begins_sample for s in trace.segments] == [number % 6 == 0 for number in range(12)]
    with Simulator(trace) as simulator, Simulator(trace, warm=True) as warm:
        run = simulator.run("learned", slots)
        assert (run.prefill, run.decode) == (counted["prefill"], counted["decode"])
        assert warm.run("learned", slots) != run


def test_what_is_recorded(demo_artifact: Path, tmp_path: Path) -> None:
    out = tmp_path / "run.trace"
    with Engine(demo_artifact) as engine, engine.session() as session:
        session.generate([10, 11, 12], 2)
        with pytest.raises(CFMoEError, match="the engine records no trace: open it with record_trace"):
            session.write_trace(out)
    with Engine(demo_artifact, policy="lru", record_trace=True, record_scores=True) as engine, engine.session() as session:
        with pytest.raises(CFMoEError, match="no token has been run; generate first"):
            session.write_trace(out)
        assert not out.exists()
        session.generate([10, 11, 12], 2)
        session.write_trace(out)
        trace = Trace.read(out)
        with pytest.raises(CFMoEError, match=r"cannot write .*: No such file or directory"):
            session.write_trace(tmp_path / "none" / "run.trace")
    assert list(tmp_path.iterdir()) == [out]
    assert (trace.tokens, trace.layers, trace.experts, trace.top_k) == (4, 6, 32, 4)
    # Those of the chosen are the largest, best first.
    assert trace.scores is not None
    chosen = trace.scores[np.arange(4)[:, None, None], np.arange(6)[:, None], trace.ids].astype(int)
    assert (np.diff(chosen, axis=-1) <= 0).all()
    assert (chosen[..., -1] == np.sort(trace.scores, axis=-1)[..., -trace.top_k]).all()
    # Probabilities of all experts add up to one, but for the rounding of each.
    np.testing.assert_allclose(trace.scores.sum(axis=-1, dtype=np.int64), 65535, atol=trace.experts / 2)

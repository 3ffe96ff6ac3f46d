"""Measures this machine: computing times of an artifact in the engine, and the storage that it lies on."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from cfmoe.artifact import Artifact
from cfmoe.errors import os_error
from cfmoe.measure.bandwidth import file_speed
from cfmoe.measure.machine import cpu
from cfmoe.planner.cost import Compute, predict
from cfmoe.planner.devices import KERNEL_EFFICIENCY, DeviceProfile, measured_profile
from cfmoe.planner.footprint import Footprint, of_engine
from cfmoe.runtime import Engine, PhaseMetrics, Simulator
from cfmoe.trace import Trace

_PROMPT_TOKENS, _NEW_TOKENS = 256, 128
_ROUNDS = 3
_SMALL_SHARE = 0.3  # of the experts: enough misses to see what one costs


def calibrate(
    artifact: Artifact, context_size: int | None = None, progress: Callable[[str, int, int], None] | None = None
) -> tuple[Footprint, Compute, DeviceProfile]:
    """Runs the artifact for some seconds with as many experts in memory as fit and with three tenths of them, in turns, and reads from
    its own file of experts. Medians.

    Raises CFMoEError as Engine does.
    """
    runs = _Runs(artifact, context_size)
    path = artifact.path / "experts.bin"
    for done in range(_ROUNDS):
        if progress is not None:
            progress("calibrating", done, _ROUNDS)
        runs.once()
    try:
        storage = file_speed(path, (runs.footprint.slot_bytes,), repeat=48)
    except OSError as error:
        raise os_error(error, path, "measure the storage with") from error
    if progress is not None:
        progress("calibrating", _ROUNDS, _ROUNDS)
    # The memory's bandwidth as the roofline has it: what decoding read per second, were all of its time reading.
    memory = runs.footprint.active_bytes / runs.decode_s / KERNEL_EFFICIENCY
    device = replace(measured_profile(cpu(), memory, storage), source=f"measured at {path}")
    return runs.footprint, runs.compute(device), device


class _Runs:
    """The engine's runs: everything in memory, and a small cache."""

    def __init__(self, artifact: Artifact, context_size: int | None) -> None:
        self._artifact, self._context_size = artifact, context_size
        self._full: list[float] = []
        self._prefill: list[float] = []
        self._small: list[float] = []

    def once(self) -> None:
        with Engine(self._artifact.path, context_size=self._context_size) as engine:
            self.footprint = of_engine(self._artifact, engine)
            prefill, decode = self._run(engine)
        self._prefill.append((prefill.seconds - prefill.stall_ms / 1e3) / prefill.tokens)
        self._full.append((decode.seconds - decode.stall_ms / 1e3) / decode.tokens)
        budget = self.footprint.budget(max(self.footprint.top_k, round(_SMALL_SHARE * self.footprint.total)))
        with (
            Engine(self._artifact.path, context_size=self._context_size, memory_budget=budget, record_trace=True) as engine,
            tempfile.TemporaryDirectory(prefix="cfmoe-") as scratch,
        ):
            _, decode = self._run(engine, Path(scratch) / "trace")
            self._policy, self._slots = engine.policy, engine.memory.expert_slots
        self._small.append(decode.seconds / decode.tokens)

    def _run(self, engine: Engine, trace: Path | None = None) -> tuple[PhaseMetrics, PhaseMetrics]:
        with engine.session() as session:
            room = engine.model.context_size
            prompt = min(_PROMPT_TOKENS, room // 2)
            ids = [(31 * i + 7) % engine.model.vocab_size for i in range(prompt)]
            session.generate(ids, min(_NEW_TOKENS, room - prompt), stop_tokens=[])
            if trace is not None:
                session.write_trace(trace)
                self._trace = Trace.read(trace)
            return session.metrics.prefill, session.metrics.decode

    @property
    def decode_s(self) -> float:
        """Seconds of a decoded token with everything in memory, as far as it was not waiting for storage."""
        return statistics.median(self._full)

    def compute(self, device: DeviceProfile) -> Compute:
        """The processor's cost of a miss is what the small cache took beyond the model's prediction without it."""
        without = Compute(self.decode_s, statistics.median(self._prefill), 0.0, measured=True)
        with Simulator(self._trace) as simulator:
            speed = predict(simulator.run(self._policy, self._slots), self._trace, self.footprint, without, device)
        misses = speed.bytes_per_token / self.footprint.record_bytes
        beyond = statistics.median(self._small) - 1 / speed.decode_tokens_per_s
        return replace(without, miss_s=max(0.0, beyond / misses) if misses else 0.0)

"""Replays a routing trace against caches of any size and policy, with the engine's own decisions."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from typing import Self

from cfmoe.errors import CFMoEError
from cfmoe.runtime import _capi
from cfmoe.trace import Trace

DEFAULT_LOOKAHEAD_TOKENS = 4


class Semantics(StrEnum):
    """What a simulation imitates.

    ``engine``: prefill layer by layer and chunk by chunk, hand-over, then groups of top-k. ``reference``: one stream of accesses in the
    order token, layer, k, prefill like decode and nothing pinned, as the literature has it; every cache size from 0 is allowed.
    """

    engine = "engine"
    reference = "reference"


@dataclass(frozen=True)
class Counts:
    """Accesses of one phase."""

    hits: int
    misses: int

    @property
    def accesses(self) -> int:
        return self.hits + self.misses

    @property
    def chr(self) -> float:
        """Hits per access; 0 without accesses."""
        return self.hits / self.accesses if self.accesses else 0.0

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.hits + other.hits, self.misses + other.misses)


@dataclass(frozen=True)
class Simulation:
    """What a cache of `slots` experts under `policy` would have done.

    hand_over_loads: experts read between prefill and decode, which are no accesses. groups_by_misses: how many decode groups, (token,
    layer) pairs, had 0, 1, … top_k misses.
    """

    policy: str
    slots: int
    prefill: Counts
    decode: Counts
    hand_over_loads: int
    groups_by_misses: tuple[int, ...]

    @property
    def all(self) -> Counts:
        """Both phases."""
        return self.prefill + self.decode


def engine_policies() -> list[str]:
    """Names of the policies that an engine takes."""
    return str(_capi.library().cfmoe_engine_policies().decode()).split(",")


def simulator_policies() -> list[str]:
    """Names of all policies, oracles included."""
    return str(_capi.library().cfmoe_simulator_policies().decode()).split(",")


def default_policy() -> str:
    """The engine's policy unless told otherwise."""
    return str(_capi.library().cfmoe_default_policy().decode())


class Simulator:
    """A trace, laid out for replaying. Its runs are independent of each other, and may go in several threads.

    chunk_size: of prefill, in tokens; None for the trace's own, or 256 where it has none. warm: keep the cache from sample to sample.
    Raises CFMoEError where the trace is too long or of too many experts, or the chunk size is none.
    """

    def __init__(
        self,
        trace: Trace,
        *,
        semantics: Semantics = Semantics.engine,
        warm: bool = False,
        chunk_size: int | None = None,
        name: str = "trace",
    ) -> None:
        self._handle = ctypes.c_void_p()
        self._lib = _capi.library()
        self._trace = trace
        if chunk_size is not None and not 0 < chunk_size < 1 << 32:
            raise CFMoEError(f"a chunk size of {chunk_size} tokens is not allowed: use a positive number, or leave it out")
        reference = Semantics(semantics) is Semantics.reference
        options = _capi.SimulatorOptions(ctypes.sizeof(_capi.SimulatorOptions), int(reference), int(warm), chunk_size or 0)
        data = trace.to_bytes()
        error = _capi.ErrorText()
        error.check(
            self._lib.cfmoe_simulator_create(
                data, len(data), name.encode("utf-8", "replace"), ctypes.byref(options), ctypes.byref(self._handle), *error.arguments
            )
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self.close()

    def close(self) -> None:
        """Frees the trace's copy; further calls do nothing."""
        self._lib.cfmoe_simulator_destroy(self._handle)
        self._handle = ctypes.c_void_p()

    @property
    def total(self) -> int:
        """Experts of all layers."""
        return self._trace.layers * self._trace.experts

    def run(self, policy: str, slots: int, lookahead: int | None = None) -> Simulation:
        """Replays the trace with a cache of `slots` experts, more than all of them being all.

        lookahead: of ``lopt``, in accesses; None for those of four tokens. Raises CFMoEError where the policy is unknown, needs scores that
        the trace lacks, or the size is below what the semantics allow.
        """
        if not self._handle:
            raise CFMoEError("the simulator is closed: make another")
        if slots < 0:
            raise CFMoEError(f"a cache of {slots} experts is not allowed: use 0 or a positive number")
        if lookahead is not None and not 0 <= lookahead < 1 << 32:
            raise CFMoEError(f"a lookahead of {lookahead} accesses is not allowed: use 0 to {(1 << 32) - 1}")
        slots = min(slots, self.total)
        out = _capi.Simulation()
        misses = (ctypes.c_uint64 * (self._trace.top_k + 1))()
        ahead = DEFAULT_LOOKAHEAD_TOKENS * self._trace.layers * self._trace.top_k if lookahead is None else lookahead
        error = _capi.ErrorText()
        error.check(self._lib.cfmoe_simulator_run(self._handle, policy.encode(), slots, ahead, ctypes.byref(out), misses, *error.arguments))
        return Simulation(
            policy,
            slots,
            Counts(out.prefill_hits, out.prefill_misses),
            Counts(out.decode_hits, out.decode_misses),
            out.hand_over_loads,
            tuple(misses),
        )

    def sweep(
        self,
        policies: Iterable[str],
        slots: Iterable[int],
        lookahead: int | None = None,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> list[Simulation]:
        """Every policy at every size, on all usable CPUs; policy by policy, in the order given."""
        sizes = list(slots)
        pairs = [(policy, size) for policy in policies for size in sizes]
        results: list[Simulation] = []
        with ThreadPoolExecutor(_usable_cpus()) as pool:
            runs = [pool.submit(self.run, policy, size, lookahead) for policy, size in pairs]
            try:
                for done, run in enumerate(runs):
                    if progress is not None:
                        progress("simulating", done, len(runs))
                    results.append(run.result())
            finally:
                pool.shutdown(cancel_futures=True)
        if progress is not None:
            progress("simulating", len(runs), len(runs))
        return results


def _usable_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

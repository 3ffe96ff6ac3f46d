"""Cache hit rates of what was evaluated: the one place where evaluation meets the simulator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from cfmoe.planner import sweep
from cfmoe.runtime import Semantics
from cfmoe.trace import Trace


def hit_rates(
    trace: Trace, policies: Sequence[str], sizes: Sequence[str], progress: Callable[[str, int, int], None] | None = None
) -> list[dict[str, Any]]:
    """policy, cache_experts, cache_fraction, phase, accesses, hits and chr for every policy, size and phase, by the engine's semantics.

    policies: names, ["all"], or none for the usual ones; sizes as `--cache` takes them. Sizes below top-k are raised to it.
    """
    chosen = sweep.chosen_policies(policies, trace, Semantics.engine)
    slots = [max(trace.top_k, sweep.cache_slots(size, trace, 0)) for size in sizes]
    rows = sweep.as_results(sweep.sweep(trace, chosen, slots, progress=progress), trace)
    return [{key: value for key, value in row.items() if key != "cache_bytes"} for row in rows if row["accesses"]]


def size_for_hit_rate(rates: Sequence[dict[str, Any]], policy: str, wanted: float, phase: str = "all") -> float | None:
    """The smallest cache, as a share of all experts, at which `policy` reaches the hit rate `wanted`; between sizes by a straight line.

    None where no size among `rates` reaches it.
    """
    curve = sorted((one["cache_fraction"], one["chr"]) for one in rates if one["policy"] == policy and one["phase"] == phase)
    before: tuple[float, float] | None = None
    for size, rate in curve:
        if rate >= wanted:
            if before is None or rate == before[1]:
                return float(size)
            return float(before[0] + (size - before[0]) * (wanted - before[1]) / (rate - before[1]))
        before = (size, rate)
    return None

"""Simulating many caches: sizes as people write them, results as rows, CSV and pictures."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfmoe.artifact.staging import StagingDirectory
from cfmoe.errors import CFMoEError
from cfmoe.planner.cost import Speed, predict, roofline
from cfmoe.planner.devices import DeviceProfile
from cfmoe.planner.footprint import Footprint
from cfmoe.runtime import Counts, Semantics, Simulation, Simulator, default_policy, parse_size, simulator_policies
from cfmoe.trace import Trace

ORACLES = ("opt", "opt-bypass", "lopt")
DEFAULT_SIZES = tuple(f"{percent}%" for percent in range(10, 101, 10))


@dataclass(frozen=True)
class Row:
    """One cache and what it did; `cache_bytes` None where nobody knows how large an expert is, `speed` None where none was asked for."""

    simulation: Simulation
    cache_bytes: int | None
    speed: Speed | None


def cache_slots(text: str, trace: Trace, expert_bytes: int) -> int:
    """Experts of a cache size: ``25%`` of all (rounded down), ``96`` experts, or ``64MiB``.

    Raises CFMoEError where it is no size, or is in bytes and `expert_bytes` is 0.
    """
    total = trace.layers * trace.experts
    share = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)%", text)
    if share:
        if float(share[1]) > 100:
            raise CFMoEError(f"--cache {text} is more than all experts: use at most 100%")
        return int(float(share[1]) * total / 100 + 1e-9)
    if re.fullmatch(r"[0-9]{1,9}", text):
        return min(int(text), total)
    try:
        size = parse_size(text)
    except CFMoEError as error:
        raise CFMoEError(f"--cache {text} is no size: use 25%, 96 (experts) or 64MiB") from error
    if expert_bytes == 0:
        raise CFMoEError(f"--cache {text} is in bytes and the trace does not say how large an expert is: give --expert-size")
    return min(size // expert_bytes, total)


def chosen_policies(names: Sequence[str], trace: Trace, semantics: Semantics) -> list[str]:
    """The policies to simulate: `names`; for ``all`` those that the trace has what they need of; by default the engine's and the usual.

    Raises CFMoEError for a name that is unknown.
    """
    known = simulator_policies()
    usable = [name for name in known if trace.scores is not None or name not in ("gate", "learned")]
    if semantics is Semantics.engine:
        usable.remove("opt-bypass")  # an engine has to compute from somewhere
    if not names:
        return [name for name in dict.fromkeys((default_policy(), "lru", "lfu", "opt")) if name in usable]
    if list(names) == ["all"]:
        return usable
    for name in names:
        if name not in known:
            raise CFMoEError(f"--policy {name} is unknown; use all, or some of: {', '.join(known)}")
    return list(dict.fromkeys(names))


def sweep(
    trace: Trace,
    policies: Sequence[str],
    slots: Sequence[int],
    *,
    semantics: Semantics = Semantics.engine,
    warm: bool = False,
    lookahead: int | None = None,
    expert_bytes: int = 0,
    plan: tuple[Footprint, DeviceProfile] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Row]:
    """Every policy at every size. `plan` adds predicted speeds, which only the engine's semantics allow."""
    with Simulator(trace, semantics=semantics, warm=warm) as simulator:
        simulations = simulator.sweep(policies, sorted(set(slots)), lookahead, progress)
    compute = roofline(*plan) if plan is not None else None
    return [
        Row(
            one,
            one.slots * expert_bytes if expert_bytes else None,
            None if plan is None or compute is None else predict(one, trace, plan[0], compute, plan[1]),
        )
        for one in simulations
    ]


def as_results(rows: Sequence[Row], trace: Trace) -> list[dict[str, Any]]:
    """One flat object per cache and phase."""
    results = []
    for row in rows:
        one = row.simulation
        phases: dict[str, Counts] = {"prefill": one.prefill, "decode": one.decode, "all": one.all}
        for phase, counts in phases.items():
            result: dict[str, Any] = {
                "policy": one.policy,
                "cache_experts": one.slots,
                "cache_bytes": row.cache_bytes,
                "cache_fraction": one.slots / (trace.layers * trace.experts),
                "phase": phase,
                "accesses": counts.accesses,
                "hits": counts.hits,
                "chr": counts.chr,
            }
            if row.speed is not None:
                result["predicted_tokens_per_s"] = row.speed.decode_tokens_per_s
            results.append(result)
    return results


def write_results(out: Path, rows: Sequence[Row], trace: Trace, facts: dict[str, Any], force: bool) -> Path:
    """Writes results.csv, results.json, chr.png and, with predictions, speed.png into a new directory. Raises CFMoEError."""
    from cfmoe.report.plots import Line, lines

    results = as_results(rows, trace)
    total = trace.layers * trace.experts
    by_policy: dict[str, list[Row]] = {}
    for row in rows:
        by_policy.setdefault(row.simulation.policy, []).append(row)
    with StagingDirectory(out, force) as staging:
        table = io.StringIO()
        writer = csv.DictWriter(table, list(results[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(results)
        (staging.path / "results.csv").write_text(table.getvalue(), "utf-8")
        (staging.path / "results.json").write_text(json.dumps(facts | {"results": results}, indent=2) + "\n", "utf-8")
        phase = "decode" if rows[0].simulation.decode.accesses else "prefill"
        lines(
            staging.path / "chr.png",
            f"Cache hit rate, {phase}",
            {
                policy: Line(
                    [100 * row.simulation.slots / total for row in own],
                    [(row.simulation.decode if phase == "decode" else row.simulation.prefill).chr for row in own],
                    bound=policy in ORACLES,
                )
                for policy, own in by_policy.items()
            },
            "cache, share of all experts",
            "hits per access",
            x_percent=True,
            y_share=True,
        )
        if rows[0].speed is not None:
            lines(
                staging.path / "speed.png",
                f"Predicted decode speed on {facts['device_profile']}",
                {
                    policy: Line(
                        [(row.cache_bytes or 0) / (1 << 20) for row in own],
                        [row.speed.decode_tokens_per_s for row in own if row.speed is not None],
                        bound=policy in ORACLES,
                    )
                    for policy, own in by_policy.items()
                },
                "memory for experts, MiB",
                "tokens per second",
            )
        staging.commit()
    return out

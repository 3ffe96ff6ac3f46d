"""How fast the simulator is: OPT, LOPT, LRU and LFU at 27 sizes on a trace of DeepSeek-MoE's shape, against plain Python.

Run as: python benchmarks/simulator.py --out build/bench/simulator.json

The trace is synthetic: Zipf popularity, settable stickiness, fixed seed. Plain Python is what one writes first: an OrderedDict for LRU,
and for Belady a dictionary of next uses whose greatest is sought at every miss. Both run on the trace's beginning; the ratio is of times
per simulated access. Their hits must equal the simulator's in reference semantics.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cfmoe.measure.machine import cpu
from cfmoe.runtime import Semantics, Simulator
from cfmoe.trace import Phase, Segment, Trace
from cfmoe.trace.synthetic import synthetic_trace

TOKENS, LAYERS, EXPERTS, TOP_K = 20_000, 27, 64, 6
POLICIES = ("opt", "lopt", "lru", "lfu")
PLAIN_TOKENS = 400
PLAIN_SHARE = 0.5  # of all experts


def plain_lru(accesses: list[int], slots: int) -> int:
    """Hits of the obvious LRU."""
    cache: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for expert in accesses:
        if expert in cache:
            hits += 1
            cache.move_to_end(expert)
            continue
        if len(cache) == slots:
            cache.popitem(last=False)
        cache[expert] = None
    return hits


def plain_belady(accesses: list[int], slots: int) -> int:
    """Hits of the obvious Belady: next uses from a pass backwards, the victim by the maximum over the cache."""
    following, upcoming = [0] * len(accesses), dict[int, int]()
    for place in range(len(accesses) - 1, -1, -1):
        following[place] = upcoming.get(accesses[place], len(accesses))
        upcoming[accesses[place]] = place
    cache: dict[int, int] = {}
    hits = 0
    for place, expert in enumerate(accesses):
        if expert in cache:
            hits += 1
        elif len(cache) == slots:
            del cache[max(cache, key=cache.__getitem__)]
        cache[expert] = following[place]
    return hits


def measure_plain(name: str, plain: Callable[[list[int], int], int], trace: Trace, simulated_ns: float) -> dict[str, Any]:
    part = Trace(trace.ids[:PLAIN_TOKENS], (Segment(PLAIN_TOKENS, Phase.DECODE, True, False, 0),), EXPERTS)
    accesses = (part.ids.astype(int) + np.arange(LAYERS)[None, :, None] * EXPERTS).reshape(-1).tolist()
    slots = int(PLAIN_SHARE * LAYERS * EXPERTS)
    start = time.perf_counter()
    hits = plain(accesses, slots)
    nanoseconds = (time.perf_counter() - start) / len(accesses) * 1e9
    with Simulator(part, semantics=Semantics.reference) as simulator:
        assert simulator.run(name, slots).decode.hits == hits, f"plain {name} disagrees with the simulator"
    return {
        "policy": name,
        "plain_ns_per_access": nanoseconds,
        "simulator_ns_per_access": simulated_ns,
        "ratio": nanoseconds / simulated_ns,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stickiness", type=float, default=0.3)
    parser.add_argument("--zipf", type=float, default=0.8)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    trace = synthetic_trace(TOKENS, LAYERS, EXPERTS, TOP_K, zipf=options.zipf, stickiness=options.stickiness, seed=0)
    total = LAYERS * EXPERTS
    slots = [total * part // 27 for part in range(1, 28)]
    start = time.perf_counter()
    with Simulator(trace) as simulator:
        laid_out = time.perf_counter() - start
        seconds = {}
        for policy in POLICIES:
            begin = time.perf_counter()
            simulator.sweep([policy], slots)
            seconds[policy] = time.perf_counter() - begin
    whole = time.perf_counter() - start
    accesses = trace.ids.size * len(slots)
    per_access = {policy: time_ / accesses * 1e9 for policy, time_ in seconds.items()}
    print(f"{TOKENS:,} tokens × {LAYERS} layers × {TOP_K}, {len(slots)} sizes, {len(POLICIES)} policies: {whole:.1f} s")
    for policy in POLICIES:
        print(f"  {policy:6}{seconds[policy]:7.1f} s, {per_access[policy]:6.1f} ns per access")
    plain = [
        measure_plain("lru", plain_lru, trace, per_access["lru"]),
        measure_plain("opt", plain_belady, trace, per_access["opt"]),
    ]
    for row in plain:
        print(f"  plain {row['policy']}: {row['plain_ns_per_access']:,.0f} ns per access, {row['ratio']:,.0f} times the simulator's")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        result = {"seconds": whole, "layout_seconds": laid_out, "per_policy_seconds": seconds, "plain": plain, "machine": cpu()}
        options.out.write_text(json.dumps(result, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()

"""The cost model: from misses per (token, layer) to tokens per second and the time to the first token.

A decoded token costs what it costs with everything in memory, plus, for every MoE layer, the time by which reading its missing experts
outlasts computing those that are there, plus what each miss costs the processor. A prompt is computed while its missing experts are
read; the longer of the two counts.
"""

from __future__ import annotations

from dataclasses import dataclass

from cfmoe.planner.devices import DeviceProfile
from cfmoe.planner.footprint import Footprint
from cfmoe.runtime import Simulation
from cfmoe.trace import Phase, Trace

# Of prefill's arithmetic, where it was not measured: weights are read once for a chunk, and each token costs this part of what it costs
# alone in decode. The shipped models take a quarter on two cores.
PREFILL_SHARE = 0.25


@dataclass(frozen=True)
class Compute:
    """Seconds per token with all experts in memory, and the processor's seconds per missing expert, which reading takes from computing.

    `measured` on this machine, or worked out from a device's figures.
    """

    decode_s: float
    prefill_s: float
    miss_s: float
    measured: bool


@dataclass(frozen=True)
class Speed:
    """What a budget gives: decoded tokens per second, seconds to the first token of the trace's mean prompt (None without prompts)."""

    decode_tokens_per_s: float
    first_token_s: float | None
    stall_share: float  # of decoding, spent waiting for storage
    bytes_per_token: float  # read from storage per decoded token


def roofline(footprint: Footprint, device: DeviceProfile) -> Compute:
    """Computing times from the memory's bandwidth: every active byte is read once a token."""
    seconds = footprint.active_bytes / (device.memory_bytes_per_s * device.kernel_efficiency)
    seconds += footprint.layers * device.layer_overhead_s
    return Compute(seconds, PREFILL_SHARE * seconds, device.miss_overhead_s, measured=False)


def predict(simulation: Simulation, trace: Trace, footprint: Footprint, compute: Compute, device: DeviceProfile) -> Speed:
    """The speed of one simulated cache."""
    groups = sum(simulation.groups_by_misses)
    stall = misses_per_token = 0.0
    if groups:
        # Hits compute while misses load; what is left of a load then is waited for.
        expert_s = compute.decode_s * footprint.active_expert_bytes / footprint.active_bytes / (footprint.layers * footprint.top_k)
        for misses, count in enumerate(simulation.groups_by_misses):
            wait = device.read_seconds(misses, footprint.record_bytes) - (footprint.top_k - misses) * expert_s
            stall += max(0.0, wait) * count / groups * footprint.layers
            misses_per_token += misses * count / groups * footprint.layers
    decode_s = compute.decode_s + stall + misses_per_token * compute.miss_s
    return Speed(
        1 / decode_s,
        _first_token(simulation, trace, footprint, compute, device),
        stall / decode_s,
        misses_per_token * footprint.record_bytes,
    )


def _first_token(simulation: Simulation, trace: Trace, footprint: Footprint, compute: Compute, device: DeviceProfile) -> float | None:
    prompts = [segment.tokens for segment in trace.segments if segment.phase == Phase.PREFILL]
    if not prompts:
        return None
    misses = simulation.prefill.misses
    computing = sum(prompts) * compute.prefill_s + misses * compute.miss_s
    reading = misses * footprint.record_bytes / device.storage_bytes_per_s_2
    return (max(computing, reading) + len(prompts) * device.storage_latency_s) / len(prompts) + compute.decode_s

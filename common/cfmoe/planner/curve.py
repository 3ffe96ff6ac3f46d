"""The curve of memory against speed, its knee and its cliff, and the budget to recommend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cfmoe.planner.cost import Compute, Speed, predict
from cfmoe.planner.devices import DeviceProfile
from cfmoe.planner.footprint import Footprint
from cfmoe.runtime import Simulation, Simulator
from cfmoe.trace import Trace

CLIFF_GAIN = 1.1  # caching helps where it makes decoding faster by a tenth than the smallest cache that runs
ENOUGH_SPEED = 0.5  # of the speed with everything in memory; a user gives up speed for memory, but not most of it


@dataclass(frozen=True)
class Point:
    """One budget in bytes, what the cache does in it, and how fast it is predicted to be."""

    budget_bytes: int
    simulation: Simulation
    speed: Speed


@dataclass(frozen=True)
class Curve:
    """Points by ascending budget. `knee`: where more memory begins to save less time; `cliff`: below it caching is useless.

    cliff is None where no budget makes decoding faster than the smallest one by a tenth. recommended: the smallest budget with at least
    half the speed of everything in memory, or the knee where that is larger.
    """

    points: Sequence[Point]
    knee: Point
    cliff: Point | None
    recommended: Point


def sizes(footprint: Footprint) -> list[int]:
    """Cache sizes from the smallest that runs to all experts: every twentieth part, and doubling below the first."""
    low, high = footprint.top_k, footprint.total
    doubling = [low << step for step in range(high.bit_length()) if low << step < high / 20]
    return sorted({low, *doubling, *(max(low, round(high * part / 20)) for part in range(1, 21))})


def curve(
    simulator: Simulator,
    trace: Trace,
    policy: str,
    footprint: Footprint,
    compute: Compute,
    device: DeviceProfile,
    progress: Callable[[str, int, int], None] | None = None,
) -> Curve:
    """Simulates `policy` at every size and predicts its speed."""
    simulations = simulator.sweep([policy], sizes(footprint), progress=progress)
    points = [Point(footprint.budget(one.slots), one, predict(one, trace, footprint, compute, device)) for one in simulations]
    knee = _knee(points)
    enough = points[-1].speed.decode_tokens_per_s * ENOUGH_SPEED
    recommended = next(point for point in points if point.budget_bytes >= knee.budget_bytes and point.speed.decode_tokens_per_s >= enough)
    return Curve(points, knee, _cliff(points), recommended)


def _knee(points: Sequence[Point]) -> Point:
    """Where the curve of seconds per token lies furthest below the straight line from its first point to its last, both axes scaled to 1.

    Satopaa et al., "Finding a 'Kneedle' in a haystack", 2011. Time and not speed: reading dominates, so speed grows ever faster towards
    the end, and its steepest part is where the last misses go. The first point where the curve lies nowhere below that line.
    """
    first, last = points[0], points[-1]
    width, height = last.budget_bytes - first.budget_bytes, _seconds(first) - _seconds(last)
    if width <= 0 or height <= 0:
        return first
    return max(points, key=lambda point: (_seconds(first) - _seconds(point)) / height - (point.budget_bytes - first.budget_bytes) / width)


def _seconds(point: Point) -> float:
    return 1 / point.speed.decode_tokens_per_s


def _cliff(points: Sequence[Point]) -> Point | None:
    least = points[0].speed.decode_tokens_per_s * CLIFF_GAIN
    return next((point for point in points if point.speed.decode_tokens_per_s >= least), None)

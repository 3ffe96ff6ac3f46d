"""cfmoe plan: how much memory to give, before giving it."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cfmoe.cli._common import ForceOption, JsonOption, facts_table, print_json, progress_bar, stdout
from cfmoe.errors import CFMoEError

if TYPE_CHECKING:
    from cfmoe.planner.cost import Compute
    from cfmoe.planner.curve import Curve, Point
    from cfmoe.planner.devices import DeviceProfile
    from cfmoe.planner.footprint import Footprint

ROWS = 12  # of the printed table; --json has all points


class Quant(StrEnum):
    """Quantisation presets."""

    mixed = "mixed"
    q4 = "q4"
    q8 = "q8"
    f16 = "f16"
    f32 = "f32"


def plan(
    model: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="Artifact directory, or a checkpoint directory.", show_default=False)],
    trace: Annotated[Path, typer.Option("--trace", help="Routing trace of this model: cfmoe profile or run --trace.", show_default=False)],
    device_profile: Annotated[
        str | None,
        typer.Option("--device-profile", help="A device of the table (--devices), or a file. [default: measure this machine]"),
    ] = None,
    policy: Annotated[str | None, typer.Option("--policy", help="Cache policy. [default: the engine's]")] = None,
    memory_budget: Annotated[str | None, typer.Option("--memory-budget", help="A budget to look at: 800MiB or 50% of the experts.")] = None,
    context_size: Annotated[
        int | None, typer.Option("--context-size", min=1, help="Tokens that fit. [default: the model's, at most 4096]")
    ] = None,
    quant: Annotated[Quant | None, typer.Option("--quant", help="Preset, for a checkpoint. [default: mixed]")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Picture of the curve to write, a PNG.")] = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Predict speed over memory budgets and recommend one.

    The trace is replayed against caches of every size; what their misses cost follows from the device's speeds.
    """
    from cfmoe.planner.cost import predict
    from cfmoe.planner.curve import Point, curve
    from cfmoe.runtime import Simulator, default_policy
    from cfmoe.runtime.size import parse_budget
    from cfmoe.trace import Trace
    from cfmoe.trace.trace import check_writable

    if out is not None:
        check_writable(out, force)
    loaded = Trace.read(trace)
    budget = parse_budget(memory_budget)
    chosen = policy or default_policy()
    with progress_bar() as progress:
        footprint, compute, device = _facts(model, device_profile, quant, context_size, progress)
        footprint.check(loaded, trace)
        with Simulator(loaded, name=str(trace)) as simulator:
            found = curve(simulator, loaded, chosen, footprint, compute, device, progress)
            asked = None
            if memory_budget is not None:
                size = budget.bytes or footprint.budget(int(budget.percent * footprint.total / 100 + 1e-9))
                one = simulator.run(chosen, footprint.slots(size))
                asked = Point(size, one, predict(one, loaded, footprint, compute, device))
    if out is not None:
        _draw(out, found, device)
    if as_json:
        print_json(_as_json(found, asked, footprint, compute, device, chosen))
    else:
        _print(found, asked, footprint, compute, device, chosen)


def _facts(
    model: Path, device_profile: str | None, quant: Quant | None, context_size: int | None, progress: Any
) -> tuple[Footprint, Compute, DeviceProfile]:
    """Sizes, computing times and the device, measured where no profile is given."""
    from cfmoe.artifact import Artifact
    from cfmoe.planner import footprint
    from cfmoe.planner.cost import roofline
    from cfmoe.planner.devices import find_device

    if (model / "manifest.json").exists() or not (model / "config.json").exists():
        artifact = Artifact.open(model)
        if quant is not None:
            raise CFMoEError(f"--quant {quant.value} is for checkpoints; {model} is an artifact, whose weights are stored already")
        if device_profile is None:
            from cfmoe.planner.calibrate import calibrate

            return calibrate(artifact, context_size, progress)
        size = footprint.of_artifact(artifact, context_size)
    else:
        if device_profile is None:
            raise CFMoEError(
                f"{model} is a checkpoint, which this machine cannot be measured with: give --device-profile, or compile it first"
            )
        try:
            from cfmoe.compile.footprint import footprint_of_checkpoint
        except ImportError as error:
            raise CFMoEError(f"planning for a checkpoint needs the compiler's packages ({error}): install cfmoe[compile]") from error
        size = footprint_of_checkpoint(model, (quant or Quant.mixed).value, context_size)
    device = find_device(device_profile)
    return size, roofline(size, device), device


def _point_json(point: Point | None) -> dict[str, Any] | None:
    if point is None:
        return None
    return {
        "budget_bytes": point.budget_bytes,
        "cache_experts": point.simulation.slots,
        "chr": point.simulation.decode.chr,
        "prefill_chr": point.simulation.prefill.chr,
        "decode_tokens_per_s": point.speed.decode_tokens_per_s,
        "first_token_s": point.speed.first_token_s,
        "stall_share": point.speed.stall_share,
        "bytes_per_token": point.speed.bytes_per_token,
    }


def _as_json(
    found: Curve, asked: Point | None, footprint: Footprint, compute: Compute, device: DeviceProfile, policy: str
) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "policy": policy,
        "device": device.as_json(),
        "footprint": asdict(footprint),
        "compute": asdict(compute),
        "curve": [_point_json(point) for point in found.points],
        "knee": _point_json(found.knee),
        "cliff": _point_json(found.cliff),
        "recommended": _point_json(found.recommended),
        "asked": _point_json(asked),
    }


def _print(found: Curve, asked: Point | None, footprint: Footprint, compute: Compute, device: DeviceProfile, policy: str) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from cfmoe.runtime import format_size

    estimated = " (KV cache and workspace estimated)" if footprint.estimated else ""
    facts = [
        ("device", f"{device.name}: {device.source}"),
        (
            "computing",
            f"{compute.decode_s * 1e3:.2f} ms per token with all experts, {'measured' if compute.measured else 'from bandwidth'}",
        ),
        ("storage", f"{device.storage_bytes_per_s_2 / 1e9:.2f} GB/s, {device.storage_latency_s * 1e6:.0f} µs latency"),
        ("memory", f"{format_size(footprint.fixed_bytes)} beside the experts, {format_size(footprint.slot_bytes)} per expert{estimated}"),
    ]
    stdout.print(facts_table(f"{footprint.name}, policy {policy}", facts))
    table = Table(box=SIMPLE_HEAD)
    for name in ("budget", "experts", "CHR", "tok/s", "first token", "waiting", "read/token"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    named: dict[int, list[str]] = {}
    for point, text in ((found.cliff, "cliff"), (found.knee, "knee"), (found.recommended, "recommended"), (asked, "--memory-budget")):
        if point is not None:
            named.setdefault(point.budget_bytes, []).append(text)
    step = max(1, len(found.points) // ROWS)
    shown = {point.budget_bytes: point for index, point in enumerate(found.points) if index % step == 0 or point is found.points[-1]}
    shown |= {point.budget_bytes: point for point in (found.cliff, found.knee, found.recommended, asked) if point is not None}
    for budget in sorted(shown):
        one, speed = shown[budget].simulation, shown[budget].speed
        table.add_row(
            format_size(budget),
            f"{one.slots}/{footprint.total}",
            f"{one.decode.chr:.3f}",
            f"{speed.decode_tokens_per_s:,.1f}",
            "–" if speed.first_token_s is None else f"{speed.first_token_s:,.2f} s",
            f"{speed.stall_share:.0%}",
            format_size(round(speed.bytes_per_token)),
            ", ".join(named.get(budget, [])),
        )
    stdout.print(table)
    best, full = found.recommended, found.points[-1]
    saved, kept = 1 - best.budget_bytes / full.budget_bytes, best.speed.decode_tokens_per_s / full.speed.decode_tokens_per_s
    size = format_size(best.budget_bytes)
    print(f"recommended: --memory-budget {best.budget_bytes} ({size}), {saved:.0%} less memory, {kept:.0%} of the speed")
    if found.cliff is None:
        print("no cache makes decoding faster by a tenth than the smallest one that runs")
    elif found.cliff is not found.points[0]:
        print(f"below {format_size(found.cliff.budget_bytes)} caching is useless: hardly faster than the smallest budget that runs")


def _draw(out: Path, found: Curve, device: DeviceProfile) -> None:
    from cfmoe.report.plots import Line, Mark, lines

    mib = 1 << 20
    named = (("cliff", found.cliff), ("knee", found.knee), ("recommended", found.recommended))
    marks = [Mark(point.budget_bytes / mib, point.speed.decode_tokens_per_s, name) for name, point in named if point is not None]
    curve = Line([point.budget_bytes / mib for point in found.points], [point.speed.decode_tokens_per_s for point in found.points])
    lines(out, f"Predicted decode speed on {device.name}", {"tok/s": curve}, "memory budget, MiB", "tokens per second", marks=marks)

"""cfmoe doctor: what this machine can do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cfmoe.cli._common import ForceOption, JsonOption, facts_table, print_json, progress_bar, stdout
from cfmoe.errors import CFMoEError


def doctor(
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure the read bandwidth of memory and of this directory's storage.")
    ] = False,
    out: Annotated[Path | None, typer.Option("--out", help="With --measure: device profile to write, for plan --device-profile.")] = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show what this machine can do.

    CPU features, memory, tools, packages, drivers and, measured, bandwidths.
    """
    from cfmoe.measure.machine import describe

    if out is not None and not measure:
        raise CFMoEError(f"--out {out} does nothing without --measure, which finds what to write there")
    if out is not None:
        from cfmoe.trace.trace import check_writable

        check_writable(out, force)
    facts = describe()
    if measure:
        facts["bandwidth"] = _measure(facts["cpu"]["usable_cpus"])
        if out is not None:
            _write_profile(out, facts)
    if as_json:
        print_json(facts)
    else:
        _print(facts)


def _measure(cpus: int) -> dict[str, Any]:
    from dataclasses import asdict

    from cfmoe.measure.bandwidth import memory_bandwidth, storage_speed

    counts = sorted({1, min(2, cpus)})
    memory = {}
    with progress_bar() as progress:
        for done, threads in enumerate(counts):
            progress("measuring", done, len(counts) + 1)
            memory[str(threads)] = memory_bandwidth(threads)
        progress("measuring", len(counts), len(counts) + 1)
        storage = storage_speed(Path.cwd())
        progress("measuring", len(counts) + 1, len(counts) + 1)
    return {"memory_bytes_per_s": memory, "storage": asdict(storage)}


def _write_profile(out: Path, facts: dict[str, Any]) -> None:
    import json

    from cfmoe.errors import os_error
    from cfmoe.measure.bandwidth import StorageSpeed
    from cfmoe.planner.devices import measured_profile

    measured = facts["bandwidth"]
    profile = measured_profile(facts["cpu"], max(measured["memory_bytes_per_s"].values()), StorageSpeed(**measured["storage"]))
    try:
        out.write_text(json.dumps(profile.as_json(), indent=2) + "\n", "utf-8")
    except OSError as error:
        raise os_error(error, out, "write") from error


def _print(facts: dict[str, Any]) -> None:
    from cfmoe.runtime import format_size

    cpu, memory = facts["cpu"], facts["memory"]
    machine = [
        ("system", facts["os"]),
        ("CPU", f"{cpu['name']} ({cpu['arch']}), {cpu['physical_cores']} cores, {cpu['usable_cpus']} usable CPUs"),
        ("features", " ".join(cpu["features"]) or "none that kernels are chosen by"),
        ("memory", ", ".join(f"{format_size(size)} {name.removesuffix('_bytes')}" for name, size in memory.items() if size is not None)),
        ("Python", facts["python"]),
    ]
    if "bandwidth" in facts:
        for threads, rate in facts["bandwidth"]["memory_bytes_per_s"].items():
            machine.append((f"memory, {threads} thread{'s' if threads != '1' else ''}", f"{rate / 1e9:.1f} GB/s plain read"))
        storage = facts["bandwidth"]["storage"]
        kind = "past the page cache" if storage["direct"] else "through the page cache: this file system has no direct I/O"
        speeds = f"{storage['bytes_per_s'] / 1e9:.2f} GB/s one read at a time, {storage['bytes_per_s_2'] / 1e9:.2f} two"
        machine.append(("storage", f"{speeds}, {storage['latency_s'] * 1e6:.0f} µs latency, {kind}"))
    stdout.print(facts_table("Machine", machine))
    stdout.print()
    stdout.print(facts_table("Tools", [(name, found or "not found") for name, found in facts["tools"].items()]))
    stdout.print()
    stdout.print(facts_table("Packages", [(name, found or "not installed") for name, found in facts["packages"].items()]))
    stdout.print()
    stdout.print(facts_table("Drivers", [(name, _driver(found)) for name, found in facts["drivers"].items()]))
    stdout.print()
    stdout.print(facts_table("Devices", [row for kind, found in facts["devices"].items() for row in _devices(kind, found)]))
    stdout.print()
    stdout.print(
        facts_table("Ready to", [(use, "yes" if not gap else f"no: install cfmoe[{use}]") for use, gap in facts["missing"].items()])
    )


def _devices(kind: str, found: dict[str, Any]) -> list[tuple[str, str]]:
    from cfmoe.runtime import format_size

    if not found["found"]:
        return [(kind, found["reason"] or "none")]
    return [
        (
            f"{kind} {device['index']}",
            f"{device['name']} ({device['type']}), {format_size(device['memory_bytes'])}, "
            f"{'shared with the CPU' if device['unified'] else 'of its own'}; {device['driver']}; {' '.join(device['features'])}",
        )
        for device in found["found"]
    ]


def _driver(found: dict[str, Any]) -> str:
    if found["library"] is None:
        return "no loader library"
    return f"{found['library']}; {', '.join(found['drivers']) or 'no driver registered'}"

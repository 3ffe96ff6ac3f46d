"""cfmoe doctor: what this machine can do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cfmoe.cli._common import JsonOption, facts_table, print_json, progress_bar, stdout


def doctor(
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure the read bandwidth of memory and of this directory's storage.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what this machine can do.

    CPU features, memory, tools, packages, drivers and, measured, bandwidths.
    """
    from cfmoe.measure.machine import describe

    facts = describe()
    if measure:
        facts["bandwidth"] = _measure(facts["cpu"]["usable_cpus"])
    if as_json:
        print_json(facts)
    else:
        _print(facts)


def _measure(cpus: int) -> dict[str, Any]:
    from dataclasses import asdict

    from cfmoe.measure.bandwidth import memory_bandwidth, storage_bandwidth

    counts = sorted({1, min(2, cpus)})
    memory = {}
    with progress_bar() as progress:
        for done, threads in enumerate(counts):
            progress("measuring", done, len(counts) + 1)
            memory[str(threads)] = memory_bandwidth(threads)
        progress("measuring", len(counts), len(counts) + 1)
        storage = storage_bandwidth(Path.cwd())
        progress("measuring", len(counts) + 1, len(counts) + 1)
    return {"memory_bytes_per_s": memory, "storage_bytes_per_s": asdict(storage)}


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
        storage = facts["bandwidth"]["storage_bytes_per_s"]
        kind = "past the page cache" if storage["direct"] else "through the page cache: this file system has no direct I/O"
        machine.append(("storage", f"{storage['sequential'] / 1e9:.2f} GB/s in order, {storage['random'] / 1e9:.2f} shuffled, {kind}"))
    stdout.print(facts_table("Machine", machine))
    stdout.print()
    stdout.print(facts_table("Tools", [(name, found or "not found") for name, found in facts["tools"].items()]))
    stdout.print()
    stdout.print(facts_table("Packages", [(name, found or "not installed") for name, found in facts["packages"].items()]))
    stdout.print()
    stdout.print(facts_table("Drivers", [(name, _driver(found)) for name, found in facts["drivers"].items()]))
    stdout.print()
    stdout.print(
        facts_table("Ready to", [(use, "yes" if not gap else f"no: install cfmoe[{use}]") for use, gap in facts["missing"].items()])
    )


def _driver(found: dict[str, Any]) -> str:
    if found["library"] is None:
        return "no loader library"
    return f"{found['library']}; {', '.join(found['drivers']) or 'no driver registered'}"

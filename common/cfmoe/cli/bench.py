"""cfmoe bench: tokens per second over memory budgets, thread counts and devices."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cfmoe.cli._common import Device, JsonOption, print_json, progress_bar, split_integers, split_list, stdout
from cfmoe.cli.run import Io
from cfmoe.errors import CFMoEError

if TYPE_CHECKING:
    from cfmoe.measure.speed import Configuration, Workload


def bench(
    artifact: Annotated[Path, typer.Argument(help="Artifact directory.", show_default=False)],
    memory_budget: Annotated[
        list[str] | None,
        typer.Option("--memory-budget", metavar="LIST", help="Budgets, 100%,50%,64MiB for instance. [default: all experts]"),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", min=1, help="Tokens of the prompt: random ids.")] = 128,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=2, help="Tokens to generate.")] = 64,
    threads: Annotated[
        list[str] | None,
        typer.Option("--threads", metavar="LIST", help="Thread counts, 1,2 for instance. [default: one per physical core]"),
    ] = None,
    devices: Annotated[
        list[str] | None,
        typer.Option(
            "--devices",
            metavar="LIST",
            help="Where to run: cpu,vulkan for instance, or vulkan/cpu for prefill and decode; with cpu in the list, its pairs with "
            "the others too, where this machine can do them. [default: cpu]",
        ),
    ] = None,
    io: Annotated[Io, typer.Option("--io", help="How expert records are read.")] = Io.auto,
    repeat: Annotated[int, typer.Option("--repeat", min=1, help="Runs of each configuration, interleaved.")] = 3,
    as_json: JsonOption = False,
) -> None:
    """Measure prefill and decode speed; medians over interleaved runs."""
    from cfmoe.artifact import Artifact
    from cfmoe.measure.machine import cpu, memory
    from cfmoe.measure.speed import Workload, measure, placements

    context = Artifact.open(artifact).manifest.model.context_size
    if prompt_tokens + new_tokens > context:
        raise CFMoEError(
            f"--prompt-tokens {prompt_tokens} and --new-tokens {new_tokens} do not fit the artifact's context of {context} tokens; "
            "use fewer"
        )
    workload = Workload(prompt_tokens, new_tokens, io.value)
    budgets: list[str | None] = [*split_list(memory_budget or [])] or [None]
    counts: list[int | None] = [*split_integers(threads or [], "--threads", 1, 1024)] or [None]
    wanted = split_list(devices or []) or ["cpu"]
    for device in wanted:
        if not set(device.split("/")) <= set(Device) or device.count("/") > 1:
            raise CFMoEError(f"--devices {device} is unknown: use {', '.join(Device)}, or two of them as PREFILL/DECODE")
    with progress_bar() as progress:
        found = measure(artifact, workload, budgets, counts, repeat, progress, placements(wanted))
    configurations = [configuration for configuration in found if not configuration.refused]
    refused = {str(configuration.placement): configuration.refused for configuration in found if configuration.refused}
    fastest = str(min(configurations, key=lambda configuration: configuration.seconds(workload)).placement)
    if as_json:
        print_json(
            {
                "artifact": str(artifact),
                "prompt": "random token ids, seed 0",
                "prompt_tokens": prompt_tokens,
                "new_tokens": new_tokens,
                "repeat": repeat,
                "machine": {"cpu": cpu(), "memory": memory()},
                "results": [configuration.as_json() for configuration in configurations],
                "refused": refused,
                "fastest_device": fastest,
            }
        )
    else:
        _print(workload, repeat, configurations)
        for placement, reason in refused.items():
            stdout.print(f"left out {placement}: {reason}", markup=False, highlight=False, soft_wrap=True)
        if len(wanted) > 1:
            prefill, _, decode = fastest.partition("/")
            options = f"--prefill-device {prefill} --decode-device {decode}" if decode else f"--device {prefill}"
            stdout.print(f"fastest for this prompt and answer: {options}", markup=False, highlight=False)


def _print(workload: Workload, repeat: int, configurations: list[Configuration]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from cfmoe.runtime import format_size

    table = Table(
        title=f"{workload.prompt_tokens} prompt tokens, {workload.new_tokens} new; median (min–max) of {repeat}",
        title_justify="left",
        box=SIMPLE_HEAD,
    )
    for name in ("device", "budget", "memory", "experts", "threads", "prefill tok/s", "decode tok/s", "CHR", "read/token"):
        table.add_column(name, justify="right", no_wrap=True)
    for configuration in configurations:
        result = configuration.as_json()
        rates = [
            f"{rate['median']:,.0f} ({rate['min']:,.0f}–{rate['max']:,.0f})"
            for rate in (result["prefill_tokens_per_s"], result["decode_tokens_per_s"])
        ]
        table.add_row(
            str(configuration.placement),
            configuration.memory_budget or "all",
            format_size(result["budget_bytes"]),
            f"{result['expert_slots']}/{result['expert_total']}",
            str(configuration.threads or "auto"),
            *rates,
            f"{configuration.chr:.3f}",
            format_size(round(configuration.decode_bytes_per_token)),
        )
    stdout.print(table)

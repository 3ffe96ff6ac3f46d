"""cfmoe make-random: a full-size checkpoint with random weights, for benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cfmoe.cli._common import ForceOption, JsonOption, compiler_packages, print_summary, with_progress


def make_random(
    family: Annotated[
        str,
        typer.Argument(
            help="olmoe-1b-7b, deepseek-moe-16b, deepseek-v2-lite, qwen1.5-moe-a2.7b, qwen3-30b-a3b, mixtral-8x7b or gpt-oss-20b.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="The checkpoint directory to write.", show_default=False)],
    layers: Annotated[int | None, typer.Option("--layers", min=1, help="Its first layers only. [default: all]")] = None,
    locality: Annotated[
        float, typer.Option("--locality", help="From 0 (what random weights give) to below 1: how alike the routing of tokens is.")
    ] = 0.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the weights.")] = 0,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a checkpoint of a public model's shape with random bf16 weights (gpt-oss: experts in MXFP4), for benchmarks."""
    with compiler_packages():
        from cfmoe.compile.random_checkpoint import make_random as make
    from cfmoe.runtime import format_size

    facts, seconds = with_progress(
        lambda progress: make(family, out, layers=layers, locality=locality, seed=seed, force=force, progress=progress)
    )
    line = f"{out}: {facts['parameters'] / 1e9:.2f} billion parameters, {format_size(facts['bytes'])}, in {seconds:.1f} s"
    print_summary({"checkpoint": str(out), **facts, "seconds": seconds}, line, as_json)

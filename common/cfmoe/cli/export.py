"""cfmoe export: the same weights for llama.cpp and for MLC-LLM."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from cfmoe.cli._common import ForceOption, JsonOption, compiler_packages, print_summary, with_progress

ModelArgument = Annotated[Path, typer.Argument(help="Checkpoint directory: config.json, tokenizer.json, weights.", show_default=False)]

export = typer.Typer(help="Write a checkpoint for another engine: llama.cpp or MLC-LLM.", no_args_is_help=True)


class GgufQuant(StrEnum):
    """llama.cpp's types of matrices that are offered."""

    f32 = "f32"
    f16 = "f16"
    q8_0 = "q8_0"
    q4_0 = "q4_0"


@export.command("gguf")
def gguf(
    model: ModelArgument,
    out: Annotated[Path, typer.Option("--out", help="The .gguf file to write.", show_default=False)],
    quant: Annotated[
        GgufQuant,
        typer.Option("--quant", help="Type of the matrices. q4_0: embedding and head in q8_0."),
    ] = GgufQuant.q8_0,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a GGUF file for llama.cpp."""
    with compiler_packages():
        from cfmoe.compile.export_gguf import export_gguf
    path, seconds = with_progress(lambda progress: export_gguf(model, out, quant=quant.value, force=force, progress=progress))
    _report(path, quant.value, path.stat().st_size, seconds, as_json)


@export.command("mlc")
def mlc(
    model: ModelArgument,
    out: Annotated[Path, typer.Option("--out", help="The directory to write.", show_default=False)],
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write q4f16_1 parameters and mlc-chat-config.json for MLC-LLM."""
    with compiler_packages():
        from cfmoe.compile.export_mlc import export_mlc
    path, seconds = with_progress(lambda progress: export_mlc(model, out, force=force, progress=progress))
    size = sum(file.stat().st_size for file in path.iterdir())
    _report(path, "q4f16_1", size, seconds, as_json)


def _report(path: Path, quant: str, size: int, seconds: float, as_json: bool) -> None:
    from cfmoe.runtime import format_size

    facts = {"file": str(path), "quant": quant, "bytes": size, "seconds": seconds}
    print_summary(facts, f"{path}: {format_size(size)}, {quant}, in {seconds:.1f} s", as_json)

"""cfmoe compile: Hugging Face checkpoint directory to artifact directory."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from cfmoe.cli._common import ForceOption, JsonOption, print_json, progress_bar, split_list
from cfmoe.errors import CFMoEError


class Quant(StrEnum):
    """The quantisation presets."""

    mixed = "mixed"
    q4 = "q4"
    q8 = "q8"
    f16 = "f16"
    f32 = "f32"


def compile_command(
    model: Annotated[Path, typer.Argument(help="Checkpoint directory: config.json, tokenizer.json, *.safetensors.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="The artifact directory to write.", show_default=False)],
    target: Annotated[
        list[str] | None, typer.Option("--target", metavar="LIST", help="What to compile for: llvm (this CPU). [default: llvm]")
    ] = None,
    quant: Annotated[
        Quant,
        typer.Option("--quant", help="mixed: experts in 4 bits, the rest in 8. q4: attention in 4 bits too. q8, f16, f32: everything."),
    ] = Quant.mixed,
    context_size: Annotated[
        int | None, typer.Option("--context-size", min=16, help="Longest context in tokens. [default: the model's]")
    ] = None,
    prefill_chunk: Annotated[int, typer.Option("--prefill-chunk", min=1, help="Tokens that prefill handles at once.")] = 256,
    dump_ir: Annotated[Path | None, typer.Option("--dump-ir", help="Write the IR after every phase into this directory.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep what an interruption leaves beside --out, and go on from what an earlier one left.")
    ] = False,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Compile a checkpoint directory into an artifact directory."""
    import time

    try:
        from cfmoe.compile import compile_model
    except ImportError as error:
        raise CFMoEError(f"the compiler's packages are missing ({error}); install cfmoe[compile]") from error
    from cfmoe.artifact import Artifact
    from cfmoe.runtime import format_size

    start = time.monotonic()
    with progress_bar() as progress:
        path = compile_model(
            model,
            out,
            quant=quant.value,
            targets=tuple(split_list(target or ["llvm"])),
            context_size=context_size,
            prefill_chunk=prefill_chunk,
            dump_ir=dump_ir,
            force=force,
            resume=resume,
            progress=progress,
        )
    artifact = Artifact.open(path)
    seconds = time.monotonic() - start
    total = sum(entry.size for entry in artifact.manifest.files.values())
    if as_json:
        print_json(
            {
                "artifact": str(path),
                "quant": quant.value,
                "targets": sorted(artifact.manifest.targets),
                "bytes": total,
                "expert_bytes": artifact.expert_bytes,
                "seconds": round(seconds, 3),
            }
        )
    else:
        print(f"{path}: {format_size(total)}, {quant.value}, {', '.join(sorted(artifact.manifest.targets))}, in {seconds:.1f} s")

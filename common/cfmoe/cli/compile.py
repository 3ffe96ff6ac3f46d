"""cfmoe compile: Hugging Face checkpoint directory to artifact directory."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from cfmoe.cli._common import ForceOption, JsonOption, compiler_packages, print_summary, split_list, stderr, with_progress


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
        list[str] | None,
        typer.Option(
            "--target",
            metavar="LIST",
            help="What to compile for: llvm (this CPU), and vulkan, opencl or metal, each plain or with -adreno, -mali, -desktop. "
            "[default: llvm]",
        ),
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
    with compiler_packages():
        from cfmoe.compile import compile_model
    from cfmoe.artifact import Artifact
    from cfmoe.runtime import format_size

    path, seconds = with_progress(
        lambda progress: compile_model(
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
    )
    artifact = Artifact.open(path)
    if artifact.manifest.chat_absent:
        note = f"note: the apps will not use the chat template: {artifact.manifest.chat_absent}"
        stderr.print(note, style="yellow", markup=False, highlight=False, soft_wrap=True)
    total = sum(entry.size for entry in artifact.manifest.files.values())
    names = sorted(artifact.manifest.targets)
    facts = {
        "artifact": str(path),
        "quant": quant.value,
        "targets": names,
        "bytes": total,
        "expert_bytes": artifact.expert_bytes,
        "seconds": seconds,
        "chat": artifact.manifest.chat is not None,
        "chat_absent": artifact.manifest.chat_absent,
    }
    print_summary(facts, f"{path}: {format_size(total)}, {quant.value}, {', '.join(names)}, in {seconds:.1f} s", as_json)

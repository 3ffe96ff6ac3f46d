"""cfmoe profile: a routing trace of a checkpoint over a text."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cfmoe.cli._common import ForceOption, JsonOption, print_json, progress_bar, stdout
from cfmoe.errors import CFMoEError

if TYPE_CHECKING:
    from cfmoe.trace import Trace
    from cfmoe.trace.metrics import Locality


class Dtype(StrEnum):
    """The types that a model can compute in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def profile(
    model: Annotated[Path, typer.Argument(help="Checkpoint directory of any MoE family that transformers knows.", show_default=False)],
    data: Annotated[
        Path, typer.Option("--data", help='Text to run over: .txt, .jsonl with a field "text", or .xz of these.', show_default=False)
    ],
    out: Annotated[Path, typer.Option("--out", help="The trace file to write.", show_default=False)],
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Tokens of the text at most, from its beginning.")] = 20_000,
    window: Annotated[int, typer.Option("--window", min=1, help="Tokens per window; each is a sample with an empty context.")] = 512,
    prompt_tokens: Annotated[
        int | None,
        typer.Option("--prompt-tokens", min=0, help="Tokens of each window that count as prefill. [default: half the window]"),
    ] = None,
    scores: Annotated[
        bool, typer.Option("--scores/--no-scores", help="Record the router's scores of all experts too, which some policies need.")
    ] = True,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Windows that run side by side.")] = 4,
    device: Annotated[str, typer.Option("--device", help="auto (the first CUDA device, else the CPU), cpu, cuda, cuda:1, …")] = "auto",
    dtype: Annotated[Dtype, typer.Option("--dtype", help="Computing type. auto: float32 on the CPU, elsewhere as stored.")] = Dtype.auto,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Record which experts the tokens of a text are routed to.

    The first --prompt-tokens tokens of each window are recorded as a prompt, the rest as decoded one by one.
    """
    import time

    from cfmoe.trace.metrics import locality_by_phase
    from cfmoe.trace.trace import check_writable

    prompt_tokens = window // 2 if prompt_tokens is None else prompt_tokens
    if prompt_tokens > window:
        raise CFMoEError(f"--prompt-tokens {prompt_tokens} is more than the window of {window} tokens; use at most {window}")
    check_writable(out, force)
    try:
        from cfmoe.tune.checkpoint import load_model, load_tokenizer, pick_device
        from cfmoe.tune.profile import profile as record
        from cfmoe.tune.profile import read_tokens
    except ImportError as error:
        raise CFMoEError(f"the packages for this are missing ({error}); install cfmoe[tune]") from error

    start = time.monotonic()
    place = pick_device(device)
    ids = read_tokens(data, load_tokenizer(model), tokens)
    loaded = load_model(model, place, dtype.value)
    with progress_bar() as progress:
        trace = record(loaded, ids, window, prompt_tokens, batch_size, scores, progress)
    trace.write(out, force)
    seconds = time.monotonic() - start
    locality = locality_by_phase(trace)
    if as_json:
        print_json(
            {
                "trace": str(out),
                "model": str(model),
                "bytes": out.stat().st_size,
                "tokens": trace.tokens,
                "samples": sum(segment.begins_sample for segment in trace.segments),
                "window": window,
                "prompt_tokens": prompt_tokens,
                "layers": trace.layers,
                "experts": trace.experts,
                "top_k": trace.top_k,
                "scores": scores,
                "device": str(place),
                "seconds": round(seconds, 3),
                "locality": {phase: value.as_json() for phase, value in locality.items()},
            }
        )
    else:
        _print(out, trace, locality, seconds)


def _print(out: Path, trace: Trace, locality: dict[str, Locality], seconds: float) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from cfmoe.runtime import format_size

    table = Table(
        title=f"Experts that consecutive tokens share (ECR); by chance {trace.top_k / trace.experts:.3f}",
        title_justify="left",
        box=SIMPLE_HEAD,
    )
    table.add_column("MoE layer", justify="right")
    columns = [(f"ECR {phase}", value.ecr_per_layer, value.ecr) for phase, value in locality.items()]
    if trace.scores is not None:
        columns.append(("GDS all", locality["all"].gds_per_layer, locality["all"].gds))
    for name, _, _ in columns:
        table.add_column(name, justify="right")
    for layer in range(trace.layers):
        table.add_row(str(layer), *(_number(None if values is None else values[layer]) for _, values, _ in columns))
    table.add_section()
    table.add_row("mean", *(_number(mean) for _, _, mean in columns))
    stdout.print(table)
    samples = sum(segment.begins_sample for segment in trace.segments)
    print(f"{out}: {trace.tokens:,} tokens in {samples} samples, {format_size(out.stat().st_size)}, in {seconds:.1f} s")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"

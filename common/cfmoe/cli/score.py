"""cfmoe score: perplexity of a text through the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cfmoe.cli._common import AnyDevice, DecodeDeviceOption, DeviceOption, JsonOption, PrefillDeviceOption, print_json, progress_bar, stderr
from cfmoe.errors import CFMoEError


def score(
    artifact: Annotated[Path, typer.Argument(help="Artifact directory.", show_default=False)],
    data: Annotated[
        Path, typer.Option("--data", help='Text to score: .txt, .jsonl with a field "text", or .xz of these.', show_default=False)
    ],
    max_bytes: Annotated[
        str | None, typer.Option("--max-bytes", help="Score the first so many bytes of the text, 64KiB for instance.")
    ] = None,
    window: Annotated[int, typer.Option("--window", min=2, help="Tokens per window; each starts from an empty context.")] = 512,
    memory_budget: Annotated[str | None, typer.Option("--memory-budget", help="As for run.")] = None,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="[default: one per physical core]")] = None,
    device: DeviceOption = AnyDevice.cpu,
    prefill_device: PrefillDeviceOption = None,
    decode_device: DecodeDeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compute the perplexity of a text through the engine."""
    import time

    from cfmoe.artifact import Artifact
    from cfmoe.measure.perplexity import perplexity
    from cfmoe.measure.text import read_text
    from cfmoe.runtime import Engine, Tokenizer, parse_size

    context = Artifact.open(artifact).manifest.model.context_size
    if window > context:
        raise CFMoEError(f"--window {window} is longer than the artifact's context of {context} tokens; use at most {context}")
    text = read_text(data, None if max_bytes is None else parse_size(max_bytes))
    ids = Tokenizer(artifact).encode(text)
    start = time.monotonic()
    with (
        Engine(
            artifact,
            memory_budget=memory_budget,
            context_size=window,
            threads=threads,
            device=device,
            prefill_device=prefill_device,
            decode_device=decode_device,
        ) as engine,
        progress_bar() as progress,
    ):
        if engine.warning:
            stderr.print(f"warning: {engine.warning}", style="yellow", markup=False, highlight=False, soft_wrap=True)
        placement = engine.placement
        result = perplexity(engine.session(), ids, window, engine.model.prefill_chunk, progress)
    seconds = time.monotonic() - start
    if as_json:
        print_json(
            {
                "perplexity": result.perplexity,
                "nll": result.nll,
                "tokens": result.tokens,
                "windows": result.windows,
                "window": window,
                "text_bytes": len(text.encode()),
                "text_tokens": len(ids),
                "device": placement,
                "seconds": round(seconds, 3),
            }
        )
    else:
        print(
            f"perplexity {result.perplexity:.4f}, {result.nll:.5f} nats per token "
            f"over {result.tokens:,} tokens in {result.windows} windows of {window}, {seconds:.1f} s"
        )

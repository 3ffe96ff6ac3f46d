"""cfmoe run: a prompt in, tokens out, inside a memory budget."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cfmoe.cli._common import AnyDevice, DecodeDeviceOption, DeviceOption, ForceOption, JsonOption, PrefillDeviceOption, print_json, stderr
from cfmoe.errors import CFMoEError

if TYPE_CHECKING:
    from cfmoe.runtime import Engine, Metrics, PhaseMetrics


class Io(StrEnum):
    """How expert records are read."""

    auto = "auto"
    direct = "direct"
    buffered = "buffered"
    mmap = "mmap"


def run(
    artifact: Annotated[Path, typer.Argument(help="Artifact directory.", show_default=False)],
    prompt: Annotated[str, typer.Option("--prompt", help="The text to continue, or @FILE to read it from a file.", show_default=False)],
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the checkpoint's chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Tokens to generate at most.")] = 128,
    memory_budget: Annotated[
        str | None,
        typer.Option(
            "--memory-budget", help="For everything: 800MiB, bytes, or 50% of the experts. [default: all experts if memory allows]"
        ),
    ] = None,
    context_size: Annotated[
        int | None, typer.Option("--context-size", min=1, help="Tokens that fit. [default: the model's, at most 4096]")
    ] = None,
    policy: Annotated[str | None, typer.Option("--policy", help="Cache policy. [default: learned]")] = None,
    io: Annotated[Io, typer.Option("--io", help="How expert records are read.")] = Io.auto,
    device: DeviceOption = AnyDevice.cpu,
    prefill_device: PrefillDeviceOption = None,
    decode_device: DecodeDeviceOption = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", min=0.0, help="Sample with this temperature. [default: greedy]")
    ] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", min=1, help="Sample from the K likeliest tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option("--top-p", min=0.0, max=1.0, help="Sample from the likeliest tokens of total mass P.")
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option("--repetition-penalty", min=0.0, help="Above 1: make tokens seen before less likely.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Seed of sampling. [default: 0]")] = None,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="[default: one per physical core]")] = None,
    trace: Annotated[
        Path | None, typer.Option("--trace", help="Routing trace to write; its gathering takes memory outside the budget.")
    ] = None,
    trace_scores: Annotated[
        bool, typer.Option("--trace-scores", help="Keep the router's scores in the trace whatever the policy.")
    ] = False,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Continue a prompt inside a memory budget.

    The text streams to standard output, the metrics go to standard error.
    """
    if not temperature:
        for name, value in (("--top-k", top_k), ("--top-p", top_p), ("--seed", seed)):
            if value is not None:
                raise CFMoEError(f"{name} {value} does nothing without --temperature above 0: greedy decoding takes the likeliest token")
    if trace is None:
        for name, given in (("--trace-scores", trace_scores), ("--force", force)):
            if given:
                raise CFMoEError(f"{name} does nothing without --trace FILE")
    text = read_prompt(prompt)

    from dataclasses import asdict

    from cfmoe.artifact import Artifact
    from cfmoe.runtime import Engine, Sampling, Tokenizer, load_library
    from cfmoe.runtime.memory import PeakGrowth
    from cfmoe.trace.trace import check_writable

    if trace is not None:
        check_writable(trace, force)
    opened = Artifact.open(artifact)
    if chat:
        from cfmoe.artifact.chat import apply_chat_template

        text = apply_chat_template(opened, text)
    tokenizer = Tokenizer(artifact)
    prompt_ids = tokenizer.encode(text)
    if not prompt_ids:
        raise CFMoEError("--prompt is empty; give at least one character")
    sampling = Sampling(
        temperature=temperature or 0.0,
        top_k=top_k or 0,
        top_p=1.0 if top_p is None else top_p,
        repetition_penalty=1.0 if repetition_penalty is None else repetition_penalty,
        seed=seed or 0,
    )
    stream = tokenizer.stream()
    pieces: list[str] = []

    def on_token(token: int) -> None:
        pieces.append(stream.push(token))
        if not as_json:
            _write(pieces[-1])

    # Growth of memory is this artifact's alone, so what every run needs is loaded before.
    load_library()
    with (
        PeakGrowth() as peak,
        Engine(
            artifact,
            memory_budget=memory_budget,
            context_size=context_size,
            threads=threads,
            io=io.value,
            policy=policy,
            record_trace=trace is not None,
            record_scores=trace_scores,
            device=device,
            prefill_device=prefill_device,
            decode_device=decode_device,
        ) as engine,
    ):
        if engine.warning:
            stderr.print(f"warning: {engine.warning}", style="yellow", markup=False, highlight=False, soft_wrap=True)
        session = engine.session()
        stops = opened.manifest.chat.stop_token_ids if chat and opened.manifest.chat else None
        generation = session.generate(prompt_ids, max_new_tokens, sampling=sampling, stop_tokens=stops, on_token=on_token)
        pieces.append(stream.flush())
        if trace is not None:
            session.write_trace(trace)
        if not as_json:
            _write(pieces[-1] + "\n")
            _summarise(engine, session.metrics, peak.bytes)
            return
        print_json(
            {
                "text": "".join(pieces),
                "token_ids": generation.token_ids,
                "prompt_tokens": generation.prompt_tokens,
                "new_tokens": len(generation.token_ids),
                "finish_reason": generation.finish_reason,
                "io": engine.io,
                "device": engine.placement,
                "device_name": engine.device_name,
                **_metrics(session.metrics),
                "memory": asdict(engine.memory) | {"peak_rss_growth_bytes": peak.bytes},
            }
        )


def read_prompt(option: str) -> str:
    """The text of --prompt: the option itself, or the file that it names after an @. UTF-8, or a CFMoEError naming the offset."""
    from cfmoe.errors import os_error
    from cfmoe.measure.text import decode_utf8

    if not option.startswith("@"):
        # What was not UTF-8 on the command line arrives as lone surrogates.
        return decode_utf8(option.encode("utf-8", "surrogateescape"), "--prompt")
    path = Path(option[1:])
    try:
        data = path.read_bytes()
    except OSError as error:
        raise os_error(error, path, "read") from error
    return decode_utf8(data, path)


def _write(text: str) -> None:
    """To standard output at once, whatever its encoding."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()


def _metrics(metrics: Metrics) -> dict[str, Any]:
    def speed(phase: PhaseMetrics) -> dict[str, Any]:
        return {"tokens_per_s": phase.tokens_per_s, "hits": phase.hits, "misses": phase.misses, "prefetched": phase.prefetched}

    def reading(phase: PhaseMetrics) -> dict[str, Any]:
        return {"bytes_read": phase.bytes_read, "stall_ms": phase.stall_ms}

    rates = {"chr": metrics.decode.chr, "first_32_chr": metrics.first_32_chr}
    return {
        "prefill": speed(metrics.prefill) | reading(metrics.prefill),
        "decode": speed(metrics.decode) | rates | reading(metrics.decode),
    }


def _summarise(engine: Engine, metrics: Metrics, growth: int) -> None:
    from cfmoe.runtime import format_size

    memory = engine.memory
    phases = []
    for name, phase in (("prefill", metrics.prefill), ("decode", metrics.decode)):
        read = format_size(round(phase.bytes_read / max(phase.tokens, 1)))
        phases.append(f"{name} {phase.tokens} tokens at {phase.tokens_per_s:,.1f} tok/s, {read} read per token")
    lines = [
        "; ".join(phases),
        f"cache hit rate {metrics.decode.chr:.3f}, {memory.expert_slots} of {memory.expert_total} experts in memory "
        f"({engine.policy}, {engine.io} I/O)" + (f", {engine.placement} on {engine.device_name}" if engine.device_name else ""),
        f"budget {format_size(memory.budget_bytes)}: weights {format_size(memory.weights_bytes)}, KV {format_size(memory.kv_bytes)}, "
        f"workspace {format_size(memory.workspace_bytes)}, experts {format_size(memory.pool_bytes + memory.arena_bytes)}; "
        f"resident memory grew by {format_size(growth)}",
    ]
    for line in lines:
        stderr.print(line, style="dim", markup=False, highlight=False, soft_wrap=True)

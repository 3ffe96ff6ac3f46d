"""cfmoe tune: fine-tune a checkpoint for routing locality."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from cfmoe.cli._common import ForceOption, JsonOption, print_json, progress_bar, split_list, stdout
from cfmoe.errors import CFMoEError


class Adapter(StrEnum):
    """What is trained."""

    lora = "lora"
    router = "router"
    full = "full"


class LocalityKind(StrEnum):
    """The locality losses."""

    none = "none"
    js = "js"
    kl = "kl"
    l2 = "l2"
    overlap = "overlap"
    hinge = "hinge"
    window = "window"
    cache = "cache"


def tune(
    model: Annotated[Path, typer.Argument(help="Checkpoint directory of any MoE family that transformers knows.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="The directory to write: adapter/, merged/, tune.json, log/.", show_default=False)],
    task: Annotated[str | None, typer.Option("--task", help="Task set: gsm8k, alpaca, … (see docs). Answers alone are learnt.")] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", help="File of the task, .json or .jsonl [default: the hub]; without --task a text, as for profile."),
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=2, help="Examples or documents to use at most.")] = None,
    held_out: Annotated[float, typer.Option("--held-out", min=0.0, max=0.9, help="Share of every domain to measure on.")] = 0.05,
    max_length: Annotated[int, typer.Option("--max-length", min=16, help="Tokens of a packed row, and of a sequence at most.")] = 512,
    own_text: Annotated[
        int,
        typer.Option("--own-text", min=0, help="Train on so many rows that the model writes itself, begun with the data's first words."),
    ] = 0,
    adapter: Annotated[
        Adapter, typer.Option("--adapter", help="lora: attention, experts and routers. router: the routers alone. full: everything.")
    ] = Adapter.lora,
    rank: Annotated[int, typer.Option("--rank", min=1, help="LoRA rank of an adapted layer.")] = 16,
    alpha: Annotated[float, typer.Option("--alpha", min=0.0, help="LoRA scale; updates are scaled by alpha / sqrt(rank).")] = 16.0,
    elastic_threshold: Annotated[
        float | None,
        typer.Option("--elastic-threshold", min=0.0, max=1.0, help="Adapt only the layers whose ECR on the data is below it."),
    ] = None,
    elastic_rank_budget: Annotated[
        int | None, typer.Option("--elastic-rank-budget", min=1, help="Sum of ranks, shared out by what the layers lack.")
    ] = None,
    qlora: Annotated[bool, typer.Option("--qlora", help="Hold the frozen linear layers in 4 bits; needs bitsandbytes and CUDA.")] = False,
    locality: Annotated[LocalityKind, typer.Option("--locality", help="The locality loss.")] = LocalityKind.cache,
    locality_weight: Annotated[float, typer.Option("--locality-weight", min=0.0, help="Weight of the locality loss.")] = 0.15,
    quality_budget: Annotated[
        str | None,
        typer.Option("--quality-budget", help="Let the weight follow from what perplexity may rise, 0.5% for instance."),
    ] = None,
    ramp: Annotated[float, typer.Option("--ramp", min=0.0, max=1.0, help="Share of the steps over which the weight rises.")] = 0.1,
    release: Annotated[
        float, typer.Option("--release", min=0.0, max=1.0, help="Share of the steps at the end over which it falls to 0.")
    ] = 0.0,
    layer_weights: Annotated[
        list[str] | None, typer.Option("--layer-weights", metavar="LIST", help="Relative weight of each MoE layer. [default: all alike]")
    ] = None,
    temperature: Annotated[float, typer.Option("--temperature", min=0.01, help="Of overlap, window and cache, in logits.")] = 0.25,
    window_decay: Annotated[float, typer.Option("--window-decay", min=0.01, max=0.999, help="Of window, per token.")] = 0.9,
    cache_capacity: Annotated[
        float, typer.Option("--cache-capacity", min=0.01, max=1.0, help="Of cache: its share of all experts.")
    ] = 0.35,
    distill: Annotated[
        float | None,
        typer.Option(
            "--distill",
            min=0.0,
            max=1.0,
            help="Share of the divergence from the base model in the quality term, the rest being the data's cross-entropy. "
            "[default: 1 for a text, 0 for a task]",
        ),
    ] = None,
    aux_loss_alpha: Annotated[float, typer.Option("--aux-loss-alpha", min=0.0, help="Weight of the load-balance loss.")] = 0.0,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Steps of the optimiser. [default: --epochs over the data]")] = None,
    epochs: Annotated[float, typer.Option("--epochs", min=0.0, help="Passes over the data.")] = 1.0,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Rows per process and micro-batch.")] = 8,
    accumulate: Annotated[int, typer.Option("--accumulate", min=1, help="Micro-batches per step.")] = 1,
    learning_rate: Annotated[
        float, typer.Option("--learning-rate", min=0.0, help="Highest; rises at first, then falls as a cosine.")
    ] = 5e-4,
    learning_rate_floor: Annotated[
        float, typer.Option("--learning-rate-floor", min=0.0, max=1.0, help="What it falls to, as a share of the highest.")
    ] = 0.0,
    warmup: Annotated[float, typer.Option("--warmup", min=0.0, max=1.0, help="Share of the steps over which it rises.")] = 0.05,
    average: Annotated[
        float,
        typer.Option(
            "--average",
            min=0.0,
            max=1.0,
            help="Keep the mean of what was trained over this share of the steps, the last ones; goes with a --learning-rate-floor of 0.4.",
        ),
    ] = 0.0,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16; what is trained stays float32.")] = False,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Compute activations twice rather than keep them.")
    ] = False,
    evaluate_every: Annotated[
        int | None, typer.Option("--evaluate-every", min=1, help="Steps between held-out measurements, each with a checkpoint.")
    ] = None,
    early_stopping: Annotated[
        int | None, typer.Option("--early-stopping", min=1, help="Stop after so many of them without a better one; keep the best.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the split, the order of the data and the adapter.")] = 0,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.")] = False,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Fine-tune a checkpoint so that consecutive tokens choose the same experts.

    Start it with torchrun or accelerate launch (-m cfmoe.cli tune …) for several processes.
    """
    if task is None and data is None:
        raise CFMoEError("neither --task nor --data says what to train on; give one")
    budget = None if quality_budget is None else parse_share(quality_budget, "--quality-budget")
    weights = None if layer_weights is None else _numbers(layer_weights)
    try:
        from cfmoe.tune.recipe import Recipe
        from cfmoe.tune.recipe import tune as follow
    except ImportError as error:
        raise CFMoEError(f"the packages for this are missing ({error}); install cfmoe[tune]") from error

    recipe = Recipe(
        model=model,
        out=out,
        task=task,
        data=data,
        limit=limit,
        held_out=held_out,
        max_length=max_length,
        own_text=own_text,
        adapter=adapter.value,
        rank=rank,
        alpha=alpha,
        elastic_threshold=elastic_threshold,
        elastic_rank_budget=elastic_rank_budget,
        qlora=qlora,
        locality=locality.value,
        locality_weight=locality_weight,
        ramp=ramp,
        release=release,
        quality_budget=budget,
        layer_weights=weights,
        temperature=temperature,
        window_decay=window_decay,
        cache_capacity=cache_capacity,
        distill=distill,
        aux_loss_alpha=aux_loss_alpha,
        steps=steps,
        epochs=epochs,
        batch_size=batch_size,
        accumulate=accumulate,
        learning_rate=learning_rate,
        learning_rate_floor=learning_rate_floor,
        warmup=warmup,
        average=average,
        bf16=bf16,
        gradient_checkpointing=gradient_checkpointing,
        evaluate_every=evaluate_every,
        early_stopping=early_stopping,
        seed=seed,
        device=device,
    )
    with progress_bar() as progress:
        summary = follow(recipe, force, resume, progress)
    if summary is None:  # another process than the first
        return
    if as_json:
        print_json(summary)
    else:
        _print(out, summary)


def parse_share(text: str, option: str) -> float:
    """0.5% or 0.005 as a number above 0 and at most 1."""
    digits, percent = text.strip().removesuffix("%"), text.strip().endswith("%")
    try:
        value = float(digits) / (100 if percent else 1)
    except ValueError:
        value = -1.0
    if not 0 < value <= 1:
        raise CFMoEError(f"{option} {text} is no share above 0 and up to 100%; write 0.5% for instance")
    return value


def _numbers(values: list[str]) -> tuple[float, ...]:
    numbers = []
    for item in split_list(values):
        try:
            numbers.append(float(item))
        except ValueError:
            numbers.append(-1.0)
        if not 0 <= numbers[-1] < float("inf"):
            raise CFMoEError(f"--layer-weights {item} is no number of 0 or more")
    if not sum(numbers):
        raise CFMoEError("--layer-weights are all 0; give at least one layer some weight, or --locality none")
    return tuple(numbers)


def _print(out: Path, summary: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), title="On held-out data", title_justify="left")
    for heading in ("", "before", "after"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, label in (("loss", "nats per token"), ("perplexity", "perplexity"), ("ecr", "ECR"), ("locality", "locality loss")):
        if name in summary["before"]:
            table.add_row(label, f"{summary['before'][name]:.4f}", f"{summary['after'][name]:.4f}")
    stdout.print(table)
    share = 100 * summary["trained_parameters"] / summary["model_parameters"]
    print(f"{summary['steps']} steps, {summary['trained_parameters']:,} parameters trained ({share:.1f} %), {summary['seconds']:.0f} s")
    print(f"{out / 'merged'} is the tuned checkpoint, {out / 'adapter'} what was trained")

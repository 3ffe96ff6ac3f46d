"""cfmoe evaluate: answers, perplexity, locality and cache hit rates of a checkpoint, and of an adapter beside it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cfmoe.cli._common import ForceOption, JsonOption, print_json, progress_bar, split_list, stdout
from cfmoe.errors import CFMoEError

if TYPE_CHECKING:
    from cfmoe.tune.evaluate import Evaluation

DEFAULT_SIZES = "10%,20%,25%,30%,35%,40%,45%,50%,60%,75%,90%"


def evaluate(
    model: Annotated[Path, typer.Argument(help="Checkpoint directory of any MoE family that transformers knows.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="The directory to write: JSON, CSV, pictures.", show_default=False)],
    adapter: Annotated[
        Path | None, typer.Option("--adapter", help="Adapter directory of cfmoe tune, or a merged checkpoint, to set beside the model.")
    ] = None,
    task: Annotated[str | None, typer.Option("--task", help="Task set, as for tune.")] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="File of the task [default: the hub]; without --task a text, as for tune.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Examples or documents to use at most, from the beginning.")] = None,
    max_length: Annotated[int, typer.Option("--max-length", min=16, help="Tokens of a sequence at most.")] = 512,
    new_tokens: Annotated[
        int | None, typer.Option("--new-tokens", min=0, help="Tokens of an answer at most; 0 writes none. [default: the task's]")
    ] = None,
    policy: Annotated[list[str] | None, typer.Option("--policy", metavar="LIST", help="Cache policies, as for simulate.")] = None,
    cache: Annotated[list[str] | None, typer.Option("--cache", metavar="LIST", help="Cache sizes, as for simulate.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Sequences side by side.")] = 8,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "auto",
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Evaluate a checkpoint, and an adapter beside it, on a task set or a text.

    Started by torchrun or accelerate launch, the processes share the sequences.
    """
    if task is None and data is None:
        raise CFMoEError("neither --task nor --data says what to evaluate on; give one")
    if task is None and new_tokens is not None:
        raise CFMoEError(f"--new-tokens {new_tokens} is for --task: a text has no questions")
    try:
        from cfmoe.tune.evaluation import run
        from cfmoe.tune.evaluation_report import as_json as flat
    except ImportError as error:
        raise CFMoEError(f"the packages for this are missing ({error}); install cfmoe[tune]") from error

    with progress_bar() as progress:
        found = run(
            model,
            adapter,
            task,
            data,
            out=out,
            limit=limit,
            max_length=max_length,
            new_tokens=new_tokens,
            policies=split_list(policy or []),
            sizes=split_list(cache or [DEFAULT_SIZES]),
            batch_size=batch_size,
            device=device,
            force=force,
            progress=progress,
        )
    if found is None:  # another process than the first
        return
    if as_json:
        print_json({"out": str(out)} | flat(found))
    else:
        _print(out, found)


def _print(out: Path, found: dict[str, Evaluation]) -> None:
    from rich.table import Table

    from cfmoe.tune.evaluation_report import compare

    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("", *found):
        table.add_column(heading, justify="right" if heading else "left")
    metrics = list(dict.fromkeys(name for one in found.values() for name in one.metrics))
    for name in metrics:
        table.add_row(name.replace("_", " "), *(_value(one.metrics.get(name)) for one in found.values()))
    first = next(iter(found.values()))
    for row in first.chr:
        if row["policy"] == "lru" and row["phase"] == "all":
            same = (row["policy"], row["phase"], row["cache_experts"])
            rates = [r["chr"] for one in found.values() for r in one.chr if (r["policy"], r["phase"], r["cache_experts"]) == same]
            table.add_row(f"LRU hits, cache {row['cache_fraction']:.0%}", *map(_value, rates))
    stdout.print(table)
    if len(found) == 2:
        result: dict[str, Any] = compare(*found.values())
        print(f"perplexity {result['perplexity_percent']:+.2f} %, ECR {result['ecr_gain']:+.4f}")
        for one in result["equal_hit_rate"]:
            if one["saved"] is not None and abs(one["cache_fraction"] - 0.5) < 0.01:
                print(f"hits as often as the base with a cache of 50 % of its experts: with {100 * one['needed_fraction']:.1f} %")
    print(f"wrote {out}/results.json, metrics.csv, hit_rates.csv, examples.csv and pictures")


def _value(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}" if value >= 1000 and value == int(value) else f"{value:.4f}"

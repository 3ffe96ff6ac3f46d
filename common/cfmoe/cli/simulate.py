"""cfmoe simulate: what caches of other sizes and policies would have done with a routing trace."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cfmoe.cli._common import ForceOption, JsonOption, print_json, progress_bar, split_list, stdout
from cfmoe.errors import CFMoEError

if TYPE_CHECKING:
    from cfmoe.planner.sweep import Row
    from cfmoe.trace import Trace


class SemanticsName(StrEnum):
    """What a simulation imitates."""

    engine = "engine"
    reference = "reference"


def simulate(
    trace: Annotated[
        Path, typer.Argument(help="Trace file; or router choices saved as .pt, .pth or .npz, with --experts.", show_default=False)
    ],
    policy: Annotated[
        list[str] | None,
        typer.Option("--policy", metavar="LIST", help="Policies, lru,opt for instance, or all. [default: the engine's, lru, lfu, opt]"),
    ] = None,
    cache: Annotated[
        list[str] | None,
        typer.Option("--cache", metavar="LIST", help="Sizes: 25% of all experts, 96 experts, or 64MiB. [default: 10%,20%,… 100%]"),
    ] = None,
    semantics: Annotated[
        SemanticsName,
        typer.Option("--semantics", help="engine: what the engine does. reference: one stream of accesses, nothing pinned, any size."),
    ] = SemanticsName.engine,
    warm: Annotated[bool, typer.Option("--warm", help="Keep the cache from sample to sample instead of starting each cold.")] = False,
    lookahead: Annotated[
        int | None, typer.Option("--lookahead", min=0, max=2**31, help="Accesses that lopt sees ahead. [default: those of four tokens]")
    ] = None,
    expert_size: Annotated[
        str | None, typer.Option("--expert-size", help="Size of one expert, where the trace does not say it, for sizes in bytes.")
    ] = None,
    artifact: Annotated[
        Path | None, typer.Option("--artifact", help="Artifact of the trace's model: adds predicted speed to the results.")
    ] = None,
    device_profile: Annotated[
        str | None, typer.Option("--device-profile", help="Device that speed is predicted for, as for plan. [default: oneplus-15r]")
    ] = None,
    experts: Annotated[int | None, typer.Option("--experts", min=1, help="Experts of one layer, for .pt, .pth and .npz.")] = None,
    prompt_tokens: Annotated[
        int | None,
        typer.Option("--prompt-tokens", min=0, help="Tokens of each sample that are a prompt, for .pt, .pth and .npz. [default: 0]"),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Directory to write: results.csv, results.json and pictures.")] = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Replay a routing trace against caches of any size and policy."""
    from cfmoe.artifact import Artifact
    from cfmoe.planner import footprint, sweep
    from cfmoe.planner.devices import find_device
    from cfmoe.runtime import Semantics, parse_size

    if device_profile is not None and artifact is None:
        raise CFMoEError(f"--device-profile {device_profile} does nothing without --artifact, which says what a token computes")
    if artifact is not None and semantics is SemanticsName.reference:
        raise CFMoEError("--artifact predicts what the engine does: leave it out, or use --semantics engine")
    if lookahead is not None and "lopt" not in split_list(policy or []):
        raise CFMoEError(f"--lookahead {lookahead} does nothing without --policy lopt")
    loaded = read_trace(trace, experts, prompt_tokens)
    chosen = Semantics(semantics.value)
    policies = sweep.chosen_policies(split_list(policy or []), loaded, chosen)
    plan, expert_bytes = None, loaded.expert_bytes
    if artifact is not None:
        size = footprint.of_artifact(Artifact.open(artifact))
        size.check(loaded, trace)
        plan, expert_bytes = (size, find_device(device_profile or "oneplus-15r")), size.slot_bytes
    if expert_size is not None:
        expert_bytes = parse_size(expert_size)
    texts = split_list(cache or []) or list(sweep.DEFAULT_SIZES)
    slots = [sweep.cache_slots(text, loaded, expert_bytes) for text in texts]
    if not cache and chosen is Semantics.engine:
        slots = [max(loaded.top_k, size) for size in slots]
    with progress_bar() as progress:
        rows = sweep.sweep(
            loaded,
            policies,
            slots,
            semantics=chosen,
            warm=warm,
            lookahead=lookahead,
            expert_bytes=expert_bytes,
            plan=plan,
            progress=progress,
        )
    facts: dict[str, Any] = {
        "trace": str(trace),
        "semantics": chosen.value,
        "warm": warm,
        "tokens": loaded.tokens,
        "layers": loaded.layers,
        "experts": loaded.experts,
        "top_k": loaded.top_k,
        "device_profile": plan[1].name if plan is not None else None,
    }
    if out is not None:
        sweep.write_results(out, rows, loaded, facts, force)
    if as_json:
        print_json(facts | {"results": sweep.as_results(rows, loaded)})
        return
    _print(rows, loaded, chosen.value)
    if out is not None:
        print(f"wrote {out}/results.csv, results.json and pictures")


def read_trace(path: Path, experts: int | None, prompt_tokens: int | None) -> Trace:
    """A trace file, or an import of what researchers save. Raises CFMoEError."""
    from cfmoe.trace import Trace
    from cfmoe.trace.researchers import load_layers

    if path.suffix not in (".pt", ".pth", ".npz"):
        for name, value in (("--experts", experts), ("--prompt-tokens", prompt_tokens)):
            if value is not None:
                raise CFMoEError(f"{name} {value} is for .pt, .pth and .npz; {path} says it itself")
        return Trace.read(path)
    if experts is None:
        raise CFMoEError(f"{path} does not say how many experts a layer has: give --experts")
    return load_layers(path, experts, prompt_tokens or 0)


def _print(rows: list[Row], trace: Trace, semantics: str) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from cfmoe.runtime import format_size

    total = trace.layers * trace.experts
    prefill = rows[0].simulation.prefill.accesses > 0
    shape = f"{trace.tokens:,} tokens, {trace.layers} MoE layers of {trace.experts} experts, top-{trace.top_k}"
    title = f"Cache hit rates, {semantics} semantics: {shape}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    names = ["policy", "cache", "experts", "memory", *(["prefill"] if prefill else []), "decode", "reads/token"]
    predicted = rows[0].speed is not None
    for name in [*names, *(["tok/s predicted"] if predicted else [])]:
        table.add_column(name, justify="left" if name == "policy" else "right", no_wrap=True)
    decoded = rows[0].simulation.decode.accesses / (trace.layers * trace.top_k)
    previous = rows[0].simulation.policy
    for row in rows:
        one = row.simulation
        if one.policy != previous:
            table.add_section()
            previous = one.policy
        cells = [one.policy, f"{one.slots / total:.0%}", str(one.slots), "–" if row.cache_bytes is None else format_size(row.cache_bytes)]
        cells += [f"{one.prefill.chr:.3f}"] if prefill else []
        cells += [f"{one.decode.chr:.3f}", f"{one.decode.misses / decoded:.1f}"] if decoded else ["–", "–"]
        table.add_row(*cells, *([f"{row.speed.decode_tokens_per_s:,.1f}"] if row.speed is not None else []))
    stdout.print(table)

"""cfmoe demo: the embedded model at three memory budgets, with a report page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cfmoe.cli._common import JsonOption, print_json, progress_bar, stdout
from cfmoe.errors import CFMoEError, RuntimeFault

if TYPE_CHECKING:
    from cfmoe.report.demo import Demo


def demo(
    out: Annotated[Path, typer.Option("--out", help="Where artifact and report go; an earlier demo's are replaced.")] = Path("out/demo"),
    as_json: JsonOption = False,
) -> None:
    """Run the embedded model at three memory budgets.

    Compiles it, runs one prompt with 100 %, 50 % and 25 % of the expert memory, prints a table and writes a report page.
    """
    try:
        from cfmoe.report.demo import run_demo
    except ImportError as error:
        raise CFMoEError(f"the demo's packages are missing ({error}); install cfmoe[compile,report]") from error

    with progress_bar() as progress:
        result = run_demo(out, progress)
    if as_json:
        runs = {run.budget: run.result for run in result.runs}
        print_json({"report": str(result.page.resolve()), "texts_equal": result.all_equal, "runs": runs})
    else:
        _print(result)
    if not result.all_equal:
        raise RuntimeFault("the texts differ between budgets")


def _print(result: Demo) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from cfmoe.runtime import format_size

    print(result.runs[0].result["text"].strip())
    print()
    table = Table(box=SIMPLE_HEAD)
    for name in ("experts kept", "memory", "prefill tok/s", "decode tok/s", "CHR", "read/token", "growth"):
        table.add_column(name, justify="right", no_wrap=True)
    for run in result.runs:
        memory, decode = run.result["memory"], run.result["decode"]
        table.add_row(
            f"{run.budget} ({memory['expert_slots']})",
            format_size(memory["budget_bytes"]),
            f"{run.result['prefill']['tokens_per_s']:,.0f}",
            f"{decode['tokens_per_s']:,.0f}",
            f"{decode['chr']:.3f}",
            format_size(round(run.bytes_per_token)),
            format_size(memory["peak_rss_growth_bytes"]),
        )
    stdout.print(table)
    print(f"the text is {'the same' if result.all_equal else 'NOT the same'} at every budget; report: {result.page.resolve()}")

"""The demo's report: one HTML file with everything inside, light and dark."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cfmoe.report.figures import SERIES, Bars, bars, stacked_bars

_MIB = 1 << 20


@dataclass(frozen=True)
class DemoRun:
    """One budget's `run --json`."""

    budget: str
    result: dict[str, Any]

    @property
    def resident_bytes(self) -> int:
        return int(self.result["memory"]["budget_bytes"])

    @property
    def bytes_per_token(self) -> float:
        """Bytes read from storage per decoded token."""
        return float(self.result["decode"]["bytes_read"]) / max(self.result["new_tokens"] - 1, 1)


def demo_page(runs: Sequence[DemoRun], model: str, machine: str, prompt: str, all_equal: bool) -> str:
    """The page's HTML."""
    labels = [run.budget for run in runs]
    memory = stacked_bars(labels, _memory_parts(runs), [f"{run.resident_bytes / _MIB:.1f} MiB" for run in runs])
    speed = [run.result["decode"]["tokens_per_s"] for run in runs]
    rates = [run.result["decode"]["chr"] for run in runs]
    read = [run.bytes_per_token / 1024 for run in runs]
    figures = [
        ("Decode speed", "tokens per second", bars(Bars(labels, speed, [f"{rate:,.0f}" for rate in speed]), SERIES[0])),
        (
            "Cache hit rate",
            "of expert accesses while decoding",
            bars(Bars(labels, rates, [f"{rate:.3f}" for rate in rates]), SERIES[1], limit=1.0),
        ),
        ("Read from storage", "KiB per decoded token", bars(Bars(labels, read, [f"{size:,.0f}" for size in read]), SERIES[2])),
    ]
    smallest = runs[-1]
    saved = 1 - smallest.resident_bytes / runs[0].resident_bytes
    verdict = "the very same text" if all_equal else "different texts, which is a fault"
    return _PAGE.format(
        title=html.escape(f"{model} inside a memory budget"),
        lead=html.escape(
            f"With {smallest.budget} of the expert memory the model needs {saved:.0%} less memory in all and writes {verdict}; "
            "what does not fit is read from storage when a token asks for it."
        ),
        machine=html.escape(machine),
        memory=memory,
        figures="\n".join(_figure(*figure) for figure in figures),
        table=_table(runs),
        prompt=html.escape(prompt),
        text=html.escape(runs[0].result["text"]),
        equal="Equal at every budget." if all_equal else "<strong>The texts differ.</strong>",
    )


def _memory_parts(runs: Sequence[DemoRun]) -> dict[str, list[float]]:
    names = {
        "experts": ("pool_bytes", "arena_bytes"),
        "weights": ("weights_bytes",),
        "KV cache": ("kv_bytes",),
        "workspace": ("workspace_bytes",),
    }
    return {name: [sum(run.result["memory"][key] for key in keys) / _MIB for run in runs] for name, keys in names.items()}


def _figure(title: str, caption: str, svg: str) -> str:
    return f"<figure><figcaption><b>{html.escape(title)}</b> {html.escape(caption)}</figcaption>{svg}</figure>"


def _table(runs: Sequence[DemoRun]) -> str:
    rows = []
    for run in runs:
        memory, prefill, decode = run.result["memory"], run.result["prefill"], run.result["decode"]
        cells = (
            run.budget,
            f"{memory['expert_slots']} / {memory['expert_total']}",
            f"{memory['budget_bytes'] / _MIB:.1f} MiB",
            f"{memory['peak_rss_growth_bytes'] / _MIB:.1f} MiB",
            f"{prefill['tokens_per_s']:,.0f}",
            f"{decode['tokens_per_s']:,.0f}",
            f"{decode['chr']:.3f}",
            f"{run.bytes_per_token / 1024:,.0f} KiB",
            f"{decode['stall_ms']:,.0f} ms",
        )
        rows.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    return "\n".join(rows)


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{
  color-scheme: light dark;
  --font: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif;
  --page: #f6f7f9; --surface: #ffffff; --ink: #1a2130; --muted: #5c6675; --grid: #e3e7ec;
  --series-1: #2b6cb8; --series-2: #1a8f7a; --series-3: #c4701c; --series-4: #7a5bb5; --series-5: #8a94a3;
}}
@media (prefers-color-scheme: dark) {{
  :root {{
    --page: #11151b; --surface: #1a2029; --ink: #e8ecf2; --muted: #9aa5b4; --grid: #2d3642;
    --series-1: #6ba4e8; --series-2: #4cc2aa; --series-3: #e89a4c; --series-4: #ab90e0; --series-5: #7b8696;
  }}
}}
* {{ box-sizing: border-box; }}
body {{ margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 var(--font); }}
main {{ max-width: 1080px; margin: 0 auto; padding: 44px 20px 64px; }}
h1 {{ font-size: 29px; line-height: 1.2; margin: 0 0 10px; letter-spacing: -0.01em; }}
h2 {{ font-size: 18px; margin: 38px 0 12px; }}
p.lead {{ font-size: 18px; max-width: 44em; margin: 0 0 6px; }}
p.note, figcaption {{ color: var(--muted); font-size: 14px; }}
p.note {{ margin: 6px 0; }}
figure, .card {{
  margin: 0; min-width: 0; padding: 18px 20px;
  background: var(--surface); border: 1px solid var(--grid); border-radius: 10px;
}}
figcaption {{ margin-bottom: 10px; }}
figcaption b {{ display: block; color: var(--ink); font-size: 15px; }}
figure svg {{ display: block; width: 100%; height: auto; }}
figure.wide {{ overflow-x: auto; }}
figure.wide svg {{ min-width: 640px; }}
.row {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 16px; margin-top: 16px; }}
.scroll {{ overflow-x: auto; padding: 6px 20px; }}
table {{ border-collapse: collapse; width: 100%; font-size: 14.5px; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: right; padding: 9px 0 9px 18px; white-space: nowrap; }}
th {{ color: var(--muted); font-weight: 500; }}
th:first-child, td:first-child {{ text-align: left; padding-left: 0; }}
tr + tr td, tbody tr:first-child td {{ border-top: 1px solid var(--grid); }}
blockquote {{ margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }}
blockquote .prompt {{ color: var(--muted); }}
</style>
<main>
<h1>{title}</h1>
<p class="lead">{lead}</p>
<p class="note">{machine}</p>
<h2>Memory</h2>
<figure class="wide"><figcaption><b>What the budget is spent on</b> MiB, by share of the experts that may stay in memory</figcaption>
{memory}</figure>
<h2>What it costs</h2>
<div class="row">
{figures}
</div>
<h2>Numbers</h2>
<div class="card scroll">
<table>
<thead><tr><th>budget</th><th>experts in memory</th><th>memory</th><th>resident growth</th><th>prefill tok/s</th><th>decode tok/s</th>
<th>hit rate</th><th>read per token</th><th>waited</th></tr></thead>
<tbody>
{table}
</tbody>
</table>
</div>
<h2>Text</h2>
<div class="card"><blockquote><span class="prompt">{prompt}</span>{text}</blockquote></div>
<p class="note">{equal}</p>
</main>
</html>
"""

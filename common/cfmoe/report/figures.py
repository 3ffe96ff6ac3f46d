"""Figures as inline SVG. Colours are placeholders that become CSS variables, so that one picture serves light and dark pages."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib

matplotlib.use("svg")
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Placeholder in the drawing → variable of the page. matplotlib writes colours as lower-case #rrggbb.
_INK, _MUTED, _GRID, _SURFACE = "#010101", "#020202", "#030303", "#040404"
SERIES = ("#050501", "#050502", "#050503", "#050504", "#050505")
_VARIABLES = {_INK: "--ink", _MUTED: "--muted", _GRID: "--grid", _SURFACE: "--surface"} | {
    color: f"--series-{number}" for number, color in enumerate(SERIES, 1)
}

_STYLE = {
    "svg.fonttype": "none",  # text stays text: the page's font, selectable
    "svg.hashsalt": "cfmoe",
    "font.family": "sans-serif",
    "font.size": 10.5,
    "text.color": _INK,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _MUTED,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
}


@dataclass(frozen=True)
class Bars:
    """One bar per label; `texts` stand at the bars' ends."""

    labels: Sequence[str]
    values: Sequence[float]
    texts: Sequence[str]


def bars(data: Bars, color: str, limit: float | None = None) -> str:
    """Horizontal bars with direct labels; the axis ends at `limit` if given. Drawn for a narrow column."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(3.7, 0.52 * len(data.labels) + 0.45))
        axes = figure.subplots()
        axes.barh(data.labels, data.values, height=0.56, color=color)
        top = limit if limit is not None else max(max(data.values), 1e-9)
        axes.set_xlim(0, top * 1.28)
        for row, (value, text) in enumerate(zip(data.values, data.texts, strict=True)):
            axes.annotate(text, (value, row), xytext=(6, 0), textcoords="offset points", va="center", color=_INK)
        _finish(axes)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        if limit is not None:
            axes.set_xticks([limit * quarter / 4 for quarter in range(5)])
        return _svg(figure)


def stacked_bars(labels: Sequence[str], parts: Mapping[str, Sequence[float]], texts: Sequence[str]) -> str:
    """Horizontal stacked bars with a legend above; `texts` are the totals at the bars' ends."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(10.4, 0.56 * len(labels) + 1.0))
        axes = figure.subplots()
        left = [0.0] * len(labels)
        for color, (name, values) in zip(SERIES, parts.items(), strict=False):
            # An edge in the colour of the page separates the parts.
            axes.barh(labels, values, left=left, height=0.56, color=color, edgecolor=_SURFACE, linewidth=1.5, label=name)
            left = [start + value for start, value in zip(left, values, strict=True)]
        axes.set_xlim(0, max(left) * 1.16)
        for row, (value, text) in enumerate(zip(left, texts, strict=True)):
            axes.annotate(text, (value, row), xytext=(6, 0), textcoords="offset points", va="center", color=_INK)
        _finish(axes)
        axes.legend(
            loc="lower left", bbox_to_anchor=(0, 1.0), ncols=len(parts), frameon=False, borderaxespad=0, handlelength=1, handleheight=1
        )
        return _svg(figure)


def _finish(axes: Axes) -> None:
    axes.invert_yaxis()
    axes.set_axisbelow(True)
    axes.xaxis.grid(True, color=_GRID, linewidth=0.8)
    axes.tick_params(length=0)
    axes.tick_params(axis="y", labelcolor=_INK, pad=8)
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, bbox_inches="tight", pad_inches=0.04, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for color, variable in _VARIABLES.items():
        text = text.replace(color, f"var({variable})")
    # The page sets font and size; the picture scales with its column.
    text = re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", text, count=1)
    text = re.sub(r'<svg ([^>]*?)height="[^"]*"', r"<svg \1", text, count=1)
    return re.sub(r"font: ([0-9.]+px) [^;\"]*", r"font: \1 var(--font)", text)

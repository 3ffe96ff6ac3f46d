"""Line charts as PNG files: hit rate against cache size, speed against memory."""

from __future__ import annotations

import itertools
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("agg")
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator, PercentFormatter

from cfmoe.errors import os_error

INK, MUTED, GRID = "#1d1f24", "#5d6470", "#e4e6ea"
# Told apart by people of every colour vision (Okabe and Ito), dark enough on white; bounds are grey and broken.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#56b4e9", "#6f4fb3", "#a23b3b")
BOUND_COLOR = "#7d828c"

_STYLE = {
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "xtick.color": MUTED,
    "ytick.color": MUTED,
}


@dataclass(frozen=True)
class Line:
    """One curve; `bound` draws it as something that no running system reaches."""

    x: Sequence[float]
    y: Sequence[float]
    bound: bool = False


@dataclass(frozen=True)
class Mark:
    """A point that is named in the picture."""

    x: float
    y: float
    text: str


def lines(
    path: Path,
    title: str,
    curves: Mapping[str, Line],
    x_label: str,
    y_label: str,
    *,
    x_percent: bool = False,
    y_share: bool = False,
    marks: Sequence[Mark] = (),
) -> None:
    """Draws `curves` into `path`, a PNG. x_percent: x is in percent; y_share: y lies between 0 and 1. Raises CFMoEError."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(8.2, 4.9), dpi=150, layout="constrained")
        axes = figure.subplots()
        colors, dashes = itertools.cycle(COLORS), itertools.cycle(("--", ":", "-."))
        ends = []
        for name, curve in curves.items():
            color = BOUND_COLOR if curve.bound else next(colors)
            axes.plot(
                curve.x,
                curve.y,
                color=color,
                label=name,
                lw=1.4 if curve.bound else 1.9,
                ls=next(dashes) if curve.bound else "-",
                marker="o",
                ms=3,
            )
            ends.append(max(curve.y, default=0.0))
        for mark in marks:
            axes.plot([mark.x], [mark.y], marker="o", ms=9, mfc="none", mec=INK, mew=1.3, ls="")
            axes.annotate(mark.text, (mark.x, mark.y), xytext=(10, -14), textcoords="offset points", color=INK, fontsize=9)
        axes.set_title(title, loc="left", pad=12)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        _finish(axes, x_percent, y_share, max(ends, default=1.0))
        if len(curves) > 1:
            axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9, labelcolor=INK)
        _save(figure, path)


def _finish(axes: Axes, x_percent: bool, y_share: bool, top: float) -> None:
    axes.grid(True, color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.set_ylim(0, 1.02 if y_share else (top * 1.08 or 1.0))
    if x_percent:
        axes.set_xlim(0, 102)
        axes.xaxis.set_major_locator(MultipleLocator(10))
        axes.xaxis.set_major_formatter(PercentFormatter(decimals=0))
    else:
        axes.set_xlim(left=0)
    if y_share:
        axes.yaxis.set_major_locator(MultipleLocator(0.1))


def _save(figure: Figure, path: Path) -> None:
    staged = path.with_name(f".{path.name}.cfmoe-new-{secrets.token_hex(4)}.png")
    try:
        figure.savefig(staged, metadata={"Software": None})
        os.replace(staged, path)
    except OSError as error:
        staged.unlink(missing_ok=True)
        raise os_error(error, path, "write") from error

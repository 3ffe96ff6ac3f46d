"""What the commands share: JSON on standard output, progress on standard error, tables, parsing of lists."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from cfmoe.errors import CFMoEError

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output and nothing else there.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace an existing output.")]

ProgressCallback = Callable[[str, int, int], None]

stderr = Console(stderr=True)
stdout = Console(width=None if sys.stdout.isatty() else 120)  # written to a file, tables need not be as narrow as a terminal


def print_json(value: dict[str, Any]) -> None:
    """One object, ASCII only so that no terminal's encoding can break it."""
    print(json.dumps(value, indent=2, allow_nan=False))


@contextmanager
def progress_bar() -> Iterator[ProgressCallback]:
    """A callback (stage, done, total) that draws a bar per stage on standard error; silent where that is not a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"), TimeElapsedColumn())
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as progress:
        tasks: dict[str, Any] = {}

        def advance(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total)
            progress.update(tasks[stage], completed=done, total=total)

        yield advance


def facts_table(title: str, rows: list[tuple[str, str]]) -> Table:
    """A table of names and values."""
    # Text, because rich would read [brackets] in a string as markup and swallow them.
    table = Table(title=Text(title), title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    return table


def split_list(values: list[str]) -> list[str]:
    """The items of a comma-separated or repeated option, in order."""
    return [item.strip() for value in values for item in value.split(",") if item.strip()]


def split_integers(values: list[str], option: str, low: int, high: int) -> list[int]:
    """The items of a list option as integers in [low, high]."""
    numbers = []
    for item in split_list(values):
        if not (item.isascii() and item.isdigit() and low <= int(item) <= high):
            raise CFMoEError(f"{option} {item} is not an integer between {low} and {high}")
        numbers.append(int(item))
    return numbers

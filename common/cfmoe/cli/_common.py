"""What the commands share: JSON on standard output, progress on standard error, tables, parsing of lists, the compiler's packages."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from cfmoe.errors import CFMoEError

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output and nothing else there.")]


class Device(StrEnum):
    """Where a phase runs."""

    cpu = "cpu"
    vulkan = "vulkan"
    opencl = "opencl"
    metal = "metal"


class AnyDevice(StrEnum):
    """Where both phases run; auto: a GPU if the artifact and this machine have one that works, else the CPU with a warning."""

    cpu = "cpu"
    vulkan = "vulkan"
    opencl = "opencl"
    metal = "metal"
    auto = "auto"


DeviceOption = Annotated[AnyDevice, typer.Option("--device", help="Where to run.")]
PrefillDeviceOption = Annotated[
    Device | None,
    typer.Option("--prefill-device", help="Where the prompt is read, if elsewhere; both phases share one copy of the experts."),
]
DecodeDeviceOption = Annotated[Device | None, typer.Option("--decode-device", help="Where tokens are generated, if elsewhere.")]

ForceOption = Annotated[bool, typer.Option("--force", help="Replace an existing output.")]

ProgressCallback = Callable[[str, int, int], None]
Result = TypeVar("Result")

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


@contextmanager
def compiler_packages() -> Iterator[None]:
    """Where imports of cfmoe.compile stand. Raises CFMoEError naming the extra to install where a package is missing."""
    try:
        yield
    except ImportError as error:
        raise CFMoEError(f"the compiler's packages are missing ({error}); install cfmoe[compile]") from error


def with_progress(work: Callable[[ProgressCallback], Result]) -> tuple[Result, float]:
    """What `work` returns, given a progress bar, and the seconds that it took."""
    start = time.monotonic()
    with progress_bar() as progress:
        result = work(progress)
    return result, round(time.monotonic() - start, 3)


def print_summary(facts: dict[str, Any], line: str, as_json: bool) -> None:
    """`facts` as one JSON object, or `line` for people."""
    if as_json:
        print_json(facts)
    else:
        print(line)


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

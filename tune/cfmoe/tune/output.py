"""Output directories: an existing one is replaced on --force alone, and only where it is one of ours."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cfmoe.errors import CFMoEError, os_error


def check_replaceable(out: Path, force: bool, mark: str) -> None:
    """Raises CFMoEError where `out` exists and is not to be replaced, or holds something and no file called `mark`."""
    if not os.path.lexists(out):
        return
    if not force:
        raise CFMoEError(f"{out} exists already; choose another --out, or replace it with --force")
    if out.is_symlink() or not out.is_dir() or (any(out.iterdir()) and not (out / mark).is_file()):
        raise CFMoEError(f"{out} is no earlier output (it has no {mark}), which --force alone replaces; choose another --out")


@contextmanager
def staged(out: Path, force: bool, mark: str) -> Iterator[Path]:
    """A directory that takes the name `out` when the block ends, and is removed where it fails."""
    check_replaceable(out, force, mark)
    beside = out.with_name(f".{out.name}.cfmoe-new-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        try:
            beside.mkdir(parents=True)
        except OSError as error:
            raise os_error(error, out, "write") from error
        yield beside
        try:
            if out.exists():
                shutil.rmtree(out)
            os.replace(beside, out)
        except OSError as error:
            raise os_error(error, out, "write") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)

"""A directory that appears under its name only when complete: staged beside it, renamed at the end, removed on failure."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from cfmoe.artifact.layout import FORMAT, MANIFEST
from cfmoe.errors import CFMoEError, os_error

# .<name>.cfmoe-new-<pid>-<random> while being written; .<name>.cfmoe-old-<pid>-<random> is what a forced write replaces.
_STAGED = re.compile(r"^\.(?P<name>.+)\.cfmoe-(?P<kind>new|old)-(?P<pid>\d+)-[^-/]+$")


class StagingDirectory:
    """Owns the temporary sibling of `out`. Exactly one of `commit` and `discard` ends it.

    As a context manager it is discarded where it was not committed, and an OSError inside becomes a CFMoEError that names `out`.
    Raises CFMoEError where `out` exists and may not be replaced, or where the staging directory cannot be made.
    """

    def __init__(
        self,
        out: Path,
        force: bool,
        *,
        resume: bool = False,
        recognise: Callable[[Path], bool] | None = None,
        kind: str = "artifacts",
    ) -> None:
        """With `force`, `out` may be a directory that `recognise` knows for one of `kind`; by default an artifact.

        With `resume` the directory has a fixed name, .<name>.cfmoe-part: `discard` leaves it, and the next one of that name finds it.
        """
        self.out = Path(os.path.abspath(out))
        self._resume = resume
        self._committed = False
        self._replaceable = functools.partial(_check_replaceable, self.out, force, recognise or _looks_like_artifact, kind)
        self._replaceable()
        self._made_parents = _make_parents(self.out.parent)
        try:
            _sweep(self.out.parent)
            name = f".{self.out.name}.cfmoe-part" if resume else f".{self.out.name}.cfmoe-new-{os.getpid()}-{secrets.token_hex(4)}"
            self.path = self.out.with_name(name)
            self.path.mkdir(exist_ok=resume)
        except OSError as error:
            self._remove_parents()
            raise os_error(error, self.out, "create") from error
        self._lock: int | None = _lock(self.path)
        if resume and self._lock is None:
            raise CFMoEError(f"{self.path} is in use: another process writes {self.out}; wait for it")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if not self._committed:
            self.discard()
        if isinstance(error, OSError):
            raise os_error(error, self.out, "write") from error

    def commit(self) -> None:
        """Puts the staged directory in the place of `out`, atomically if nothing is there."""
        self._replaceable()
        old: Path | None = None
        try:
            _sync(self.path)
            if os.path.lexists(self.out):
                old = self.out.with_name(f".{self.out.name}.cfmoe-old-{os.getpid()}-{secrets.token_hex(4)}")
                os.rename(self.out, old)
            os.rename(self.path, self.out)
            _sync(self.out.parent)
        except OSError as error:
            if old is not None and not os.path.lexists(self.out):
                os.rename(old, self.out)
            raise os_error(error, self.out, "create") from error
        self._made_parents = []
        self._committed = True
        self._unlock()
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)  # what stays behind is swept by the next write

    def discard(self) -> None:
        """Removes everything that was staged, unless it is to be resumed."""
        if self._resume:
            self._unlock()
            return
        shutil.rmtree(self.path, ignore_errors=True)
        self._unlock()
        self._remove_parents()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _remove_parents(self) -> None:
        for parent in reversed(self._made_parents):
            with contextlib.suppress(OSError):  # somebody else put something there meanwhile
                parent.rmdir()
        self._made_parents = []


def _check_replaceable(out: Path, force: bool, recognise: Callable[[Path], bool], kind: str) -> None:
    if not os.path.lexists(out):
        return
    if not force:
        raise CFMoEError(f"{out} exists; give --force to replace it, or another path")
    if out.is_symlink() or not out.is_dir():
        raise CFMoEError(f"{out} is not a directory; --force replaces {kind} only; give another path")
    if any(out.iterdir()) and not recognise(out):
        what = f"is not an artifact (no {MANIFEST} of ours)" if kind == "artifacts" else "is something else"
        raise CFMoEError(f"{out} {what}; --force replaces {kind} only; give another path")


def _looks_like_artifact(directory: Path) -> bool:
    try:
        manifest = json.loads((directory / MANIFEST).read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and manifest.get("format") == FORMAT


def _make_parents(parent: Path) -> list[Path]:
    """Makes `parent` and what is missing above it; returns what it made, outermost first."""
    missing: list[Path] = []
    while not parent.exists():
        missing.insert(0, parent)
        parent = parent.parent
    made: list[Path] = []
    for path in missing:
        try:
            path.mkdir()
        except OSError as error:
            if error.errno == errno.EEXIST and path.is_dir():
                continue
            for done in reversed(made):
                done.rmdir()
            raise os_error(error, path, "create") from error
        made.append(path)
    return made


def _sweep(parent: Path) -> None:
    """Clears what writers that died have left in `parent`; an artifact that was moved away and never replaced is put back."""
    for path in parent.iterdir():
        match = _STAGED.match(path.name)
        if match is None or path.is_symlink() or _is_alive(int(match["pid"])):
            continue
        lock = _lock(path)
        if lock is None:
            continue  # held by a process that is not visible from here, in another container for instance
        try:
            if match["kind"] == "old" and not os.path.lexists(parent / match["name"]):
                os.rename(path, parent / match["name"])
            else:
                shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(lock)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _lock(directory: Path) -> int | None:
    """An open descriptor that holds the directory's lock until closed; None where it is held or locks are not to be had."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems have no fsync for directories
            raise
    finally:
        os.close(descriptor)

"""The kernels of a phone's targets for an artifact, compiled once and kept."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cfmoe.artifact.reader import Artifact
from cfmoe.artifact.retarget import TargetFiles
from cfmoe.errors import os_error
from cfmoe.package import native
from cfmoe.package.native import Progress

if TYPE_CHECKING:
    from cfmoe.compile.further_target import FurtherTarget

# The engine takes the best that the CPU has, when it opens the model.
ARM64 = ("aarch64-i8mm", "aarch64-dotprod", "aarch64")


def phone_kernels(artifact: Artifact, triple: str | None = None, progress: Progress | None = None) -> list[FurtherTarget]:
    """The ARM64 targets of `artifact` for the platform `triple` (None: Linux and Android), from the cache where they are there."""
    from cfmoe.compile import further_target, targets

    built = []
    for number, name in enumerate(ARM64):
        target = targets.resolve(name)
        kept = native.cache_directory() / "kernels" / further_target.cache_key(artifact, target, triple)
        if not kept.is_dir():
            if progress is not None:
                progress("ARM64 kernels", number, len(ARM64))
            try:
                kept.parent.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryDirectory(dir=kept.parent) as temporary:
                    staged = Path(temporary) / "target"
                    staged.mkdir()
                    further_target.build(artifact, target, staged, triple)
                    if not kept.is_dir():
                        shutil.move(staged, kept)
            except OSError as error:
                raise os_error(error, error.filename or kept, "write") from error
        built.append(further_target.read(target, kept))
    if progress is not None:
        progress("ARM64 kernels", len(ARM64), len(ARM64))
    return built


def as_targets(kernels: Sequence[FurtherTarget]) -> dict[str, TargetFiles]:
    """What `retarget` wants of them."""
    return {
        k.name: TargetFiles(k.entry, {k.entry["plan"]: k.directory / "plan.json", k.entry["library"]: k.directory / "kernels.so"})
        for k in kernels
    }

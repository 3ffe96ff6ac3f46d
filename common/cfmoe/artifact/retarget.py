"""The same artifact with other targets: its big files linked or copied, its manifest sealed anew."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfmoe.artifact.digest import StreamDigest
from cfmoe.artifact.layout import MANIFEST
from cfmoe.artifact.reader import Artifact
from cfmoe.artifact.writer import seal
from cfmoe.errors import os_error

_PIECE = 1 << 20


@dataclass(frozen=True)
class TargetFiles:
    """`entry` is the manifest's of one target; `files` maps paths inside the artifact to what is copied there."""

    entry: dict[str, Any]
    files: Mapping[str, Path]


def retarget(artifact: Artifact, targets: Mapping[str, TargetFiles], out: Path, keep: Collection[str] = ()) -> Path:
    """Writes `artifact` with `targets` in place of its own, but for those that `keep` names, into the directory `out`; returns `out`.

    Files that stay are hard links where the file system allows, so neither side may be written to. Raises CFMoEError where a file
    cannot be read or written; `out` is then the caller's to remove.
    """
    manifest = json.loads((artifact.path / MANIFEST).read_bytes())
    gone = [target for name, target in artifact.manifest.targets.items() if name not in keep]
    dropped = {path for target in gone for path in (target.library, target.plan)}
    files = {name: row for name, row in manifest["files"].items() if name not in dropped}
    try:
        for name in files:
            place = out / name
            place.parent.mkdir(parents=True, exist_ok=True)
            _link(artifact.path / name, place)
        for target in targets.values():
            for name, source in target.files.items():
                place = out / name
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, place)
                files[name] = _row(place)
        kept = {name: entry for name, entry in manifest["targets"].items() if name in keep}
        manifest["targets"] = kept | {name: target.entry for name, target in targets.items()}
        manifest["files"] = dict(sorted(files.items()))
        del manifest["xxh3_64"]
        (out / MANIFEST).write_bytes(seal(manifest))
    except OSError as error:
        raise os_error(error, error.filename2 or error.filename or out, "write") from error
    return out


def _link(source: Path, place: Path) -> None:
    try:
        os.link(source, place)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, place)


def _row(path: Path) -> dict[str, int | str]:
    digest = StreamDigest()
    with open(path, "rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.entry()

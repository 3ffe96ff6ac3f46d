"""Kernels of a further CPU target for an artifact that exists, compiled from what its manifest says, without the checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfmoe.artifact.reader import Artifact
from cfmoe.compile import compiler, decoder_facts, targets
from cfmoe.compile.decoder_config import DecoderConfig, Quantisation
from cfmoe.errors import CFMoEError


@dataclass(frozen=True)
class FurtherTarget:
    """What one target adds: `directory` holds plan.json, kernels.so and kernels.o, the form that a static engine links.

    `entry` is the manifest's, `prefix` begins the names in kernels.o.
    """

    name: str
    entry: dict[str, Any]
    prefix: str
    directory: Path

    @property
    def object_file(self) -> Path:
        return self.directory / "kernels.o"


def _config(artifact: Artifact) -> tuple[DecoderConfig, Quantisation, int]:
    """What the kernels are made from. Raises CFMoEError where the manifest, of an older version, does not say it."""
    manifest = artifact.manifest
    if manifest.decoder is None:
        raise CFMoEError(
            f"{artifact.path}: its manifest has no decoder, from which kernels could be compiled; compile the model again with this version"
        )
    config = decoder_facts.restore(manifest.decoder, str(artifact.path / "manifest.json"))
    return config, Quantisation(manifest.quantisation_preset, manifest.quantisation_classes), manifest.prefill_chunk


def cache_key(artifact: Artifact, target: targets.CpuTarget, triple: str | None) -> str:
    """Everything that the files depend on, as a name for a directory. Raises CFMoEError as `build` does."""
    return f"{decoder_facts.kernel_set(*_config(artifact), target.name)[:32]}-{triple or 'linux'}"


def build(artifact: Artifact, target: targets.CpuTarget, directory: Path, triple: str | None = None) -> None:
    """Writes plan.json, kernels.so, kernels.o (for the platform `triple`, LLVM's name, where it is not Linux) and entry.json.

    Raises CFMoEError where the manifest does not say enough, being of an older version.
    """
    entry, kernels = compiler.build_target(target, *_config(artifact), directory)
    targets.build_static(kernels, target, entry["kernel_set"], directory / "kernels.o", triple)
    (directory / "entry.json").write_text(json.dumps(entry))


def read(target: targets.CpuTarget, directory: Path) -> FurtherTarget:
    """What `build` wrote."""
    entry = json.loads((directory / "entry.json").read_text())
    return FurtherTarget(target.name, entry, targets.static_prefix(entry["kernel_set"], target), directory)

"""Kernels of a further CPU target for an artifact that exists, compiled from what its manifest says, without the checkpoint."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from cfmoe.artifact.reader import Artifact
from cfmoe.compile import compiler, decoder_facts, targets
from cfmoe.compile.decoder_config import Quantisation
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


def cache_key(artifact: Artifact, target: targets.CpuTarget, triple: str | None) -> str:
    """Everything that the files depend on, as a hexadecimal digest."""
    digest = hashlib.sha256(f"{target.name} {triple} tvm {metadata.version('apache-tvm')}".encode())
    root = Path(__file__).parent
    for source in sorted(root.rglob("*.py")):
        if not source.is_relative_to(root / "codegen") and not source.is_relative_to(root / "kernels" / "gpu"):
            digest.update(source.read_bytes())
    manifest = artifact.manifest
    facts = [manifest.decoder, manifest.quantisation_preset, manifest.quantisation_classes, manifest.prefill_chunk]
    digest.update(json.dumps(facts, sort_keys=True).encode())
    return digest.hexdigest()


def build(artifact: Artifact, target: targets.CpuTarget, directory: Path, triple: str | None = None) -> None:
    """Writes plan.json, kernels.so, kernels.o (for the platform `triple`, LLVM's name, where it is not Linux) and entry.json.

    Raises CFMoEError where the manifest does not say enough, being of an older version.
    """
    manifest = artifact.manifest
    if manifest.decoder is None:
        raise CFMoEError(
            f"{artifact.path}: its manifest has no decoder, from which kernels for {target.name} could be compiled; "
            "compile the model again with this version"
        )
    config = decoder_facts.restore(manifest.decoder, str(artifact.path / "manifest.json"))
    quantisation = Quantisation(manifest.quantisation_preset, manifest.quantisation_classes)
    entry, kernels = compiler.build_target(target, config, quantisation, manifest.prefill_chunk, directory)
    targets.build_static(kernels, target, entry["kernel_set"], directory / "kernels.o", triple)
    (directory / "entry.json").write_text(json.dumps(entry))


def read(target: targets.CpuTarget, directory: Path) -> FurtherTarget:
    """What `build` wrote."""
    entry = json.loads((directory / "entry.json").read_text())
    return FurtherTarget(target.name, entry, targets.static_prefix(entry["kernel_set"], target), directory)

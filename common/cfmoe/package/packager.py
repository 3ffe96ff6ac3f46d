"""cfmoe package: from an artifact to an app with the model and the engine in it."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from cfmoe.artifact.reader import Artifact
from cfmoe.artifact.retarget import retarget
from cfmoe.artifact.staging import StagingDirectory
from cfmoe.errors import CFMoEError
from cfmoe.package import native
from cfmoe.package.kernels import as_targets, phone_kernels
from cfmoe.package.native import PRESETS, Progress

PLATFORMS = ("android", "ios")
SUMMARY = "package.json"
_ENGINE = "arm64-v8a/libcfmoe-engine.so"
_NO_GPU = "the engine runs on the CPU alone: for GPUs set ANDROID_NDK_HOME to Android's NDK (r27 or newer) and package again"
_NO_METAL = "the artifact has no metal target, so the app computes on the CPU alone: compile with --target llvm,metal and package again"
_OVERHEAD = 64 << 20  # app, engine and what tools write meanwhile


@dataclass(frozen=True)
class Package:
    """`product` is the APK or the Xcode project, `size` that of the directory in bytes; `notes` say what is left to do."""

    platform: str
    product: Path
    size: int
    targets: tuple[str, ...]
    notes: tuple[str, ...]


def package(
    path: Path, platform: str, out: Path, *, keystore: Path | None = None, force: bool = False, progress: Progress | None = None
) -> Package:
    """Writes the directory `out` for `platform` with the artifact at `path` inside; `keystore` signs an APK.

    Raises CFMoEError where the artifact is damaged, where tools, sources or space are missing, or where `out` exists and may not be
    replaced. `out` is written whole or not at all; what was compiled is kept for the next time.
    """
    if platform not in PLATFORMS:
        raise CFMoEError(f"--platform {platform} is unknown; known are {', '.join(PLATFORMS)}")
    if platform == "ios" and keystore is not None:
        raise CFMoEError("--keystore signs Android packages; leave it out, Xcode signs apps for iOS")
    if keystore is not None and not keystore.is_file():
        raise CFMoEError(f"--keystore {keystore} is no file; make one with keytool -genkeypair, or leave it out for a debug key")
    artifact = Artifact.open(path)
    root = native.source_directory()
    _check_tools(platform)
    with StagingDirectory(out, force, recognise=_is_package, kind="packages") as staging:
        _check_space(artifact, staging.path)
        artifact.verify(progress and (lambda _file, done, total: progress("artifact", done, total)))
        if platform == "android":
            product, targets, notes = _android(artifact, root, staging.path, keystore, progress)
        else:
            product, targets, notes = _ios(artifact, root, staging.path, progress)
        relative = product.relative_to(staging.path)
        size = sum(file.stat().st_size for file in staging.path.rglob("*") if file.is_file())
        summary = {
            "platform": platform,
            "model": artifact.manifest.model.name,
            "product": relative.as_posix(),
            "targets": targets,
            "created_by": f"cfmoe {metadata.version('cfmoe')}",
            "notes": notes,
        }
        (staging.path / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n")
        staging.commit()
    return Package(platform, out / relative, size, tuple(targets), tuple(notes))


def _is_package(directory: Path) -> bool:
    try:
        return json.loads((directory / SUMMARY).read_text("utf-8"))["platform"] in PLATFORMS
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _check_tools(platform: str) -> None:
    """Raises CFMoEError that names everything which is missing, not the first alone."""
    lacking = native.missing()
    if platform == "android" and not os.environ.get("ANDROID_HOME"):
        from cfmoe.package.android_tools import missing_tools

        lacking |= {tool.name: tool.remedy for tool in missing_tools()}
    native.ndk()
    if lacking:
        packages = sorted({remedy.rpartition(" ")[2] for remedy in lacking.values() if remedy.startswith("sudo apt-get")})
        others = sorted({remedy for remedy in lacking.values() if not remedy.startswith("sudo apt-get")})
        steps = [*([f"sudo apt-get install {' '.join(packages)}"] if packages else []), *others]
        raise CFMoEError(f"missing for --platform {platform}: {', '.join(lacking)}; run {', then '.join(steps)}")


def _check_space(artifact: Artifact, place: Path) -> None:
    """An APK is written twice, unsigned and signed."""
    total = sum(entry.size for entry in artifact.manifest.files.values())
    needed, free = 3 * total + _OVERHEAD, shutil.disk_usage(place).free
    if free < needed:
        raise CFMoEError(
            f"{place.parent} has {free >> 20} MiB free and a package of this artifact takes {needed >> 20} MiB; free some space"
        )


def _name(artifact: Artifact) -> str:
    """The model's name as a name of files."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", artifact.manifest.model.name).strip(".-") or "model"


def _gpu_targets(artifact: Artifact, devices: tuple[str, ...]) -> list[str]:
    return [name for name, target in artifact.manifest.targets.items() if target.device in devices]


def _android(
    artifact: Artifact, root: Path, staging: Path, keystore: Path | None, progress: Progress | None
) -> tuple[Path, list[str], list[str]]:
    from cfmoe.package.apk import build_apk, build_with_gradle

    kernels = phone_kernels(artifact, None, progress)
    if native.ndk() is not None:
        engine, notes = native.build(PRESETS["android-arm64"], progress=progress), []
    else:
        objects, prefixes = [k.object_file for k in kernels], [k.prefix for k in kernels]
        engine, notes = native.build(PRESETS["linux-arm64"], objects, prefixes, progress), [_NO_GPU]
    gpus = _gpu_targets(artifact, ("vulkan", "opencl")) if native.ndk() else []
    product = staging / f"{_name(artifact)}.apk"
    with tempfile.TemporaryDirectory(prefix=".assets-", dir=staging) as temporary:
        model = Path(temporary) / "models" / _name(artifact)
        model.mkdir(parents=True)
        retarget(artifact, as_targets(kernels), model, keep=gpus)
        if os.environ.get("ANDROID_HOME"):
            build_with_gradle(root / "android_app", {_ENGINE: engine}, Path(temporary), product, keystore=keystore)
        else:
            build_apk(root / "android_app", {_ENGINE: engine}, Path(temporary), product, keystore=keystore, progress=progress)
    return product, [*(k.name for k in kernels), *gpus], notes


def _ios(artifact: Artifact, root: Path, staging: Path, progress: Progress | None) -> tuple[Path, list[str], list[str]]:
    from cfmoe.package.xcode import assemble

    libraries = {}
    for preset in (PRESETS["ios-arm64"], PRESETS["ios-arm64-simulator"]):
        kernels = phone_kernels(artifact, preset.triple, progress)
        libraries[preset.name] = native.build(preset, [k.object_file for k in kernels], [k.prefix for k in kernels], progress)
    with tempfile.TemporaryDirectory(prefix=".model-", dir=staging) as temporary:
        model = Path(temporary) / _name(artifact)
        model.mkdir()
        metal = _gpu_targets(artifact, ("metal",))
        retarget(artifact, as_targets(kernels), model, keep=metal)
        project = assemble(root / "ios_app", libraries, model, staging / "CFMoE", progress=progress)
    notes = ["open it with Xcode on a Mac and choose your team", *([] if metal else [_NO_METAL])]
    return project, [*(k.name for k in kernels), *metal], notes

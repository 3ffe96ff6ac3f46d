"""The iOS app as a directory that Xcode opens: the project, the engine's static libraries as an XCFramework, the model."""

from __future__ import annotations

import plistlib
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfmoe.artifact.layout import MANIFEST
from cfmoe.artifact.reader import Artifact
from cfmoe.artifact.staging import StagingDirectory
from cfmoe.errors import CFMoEError, os_error

Progress = Callable[[str, int, int], None]  # stage, done, total

PROJECT = "ios_app/CFMoE.xcodeproj"
_LIBRARY = "libcfmoe.a"
_XCFRAMEWORK = "ios_app/Libraries/CFMoE.xcframework"
_MODELS = "ios_app/Model"
# Parts of the checkout that the project refers to, beside the app itself.
_RUNTIME_PARTS = ("include/cfmoe/cfmoe.h", "src/device/device.h", "src/device/metal", "src/error.h", "src/store/aligned_buffer.h")
_APP_PARTS = ("CFMoE", "CFMoE.xcodeproj", "CFMoEKit", "README.md")
_IGNORED = shutil.ignore_patterns(".*", "xcuserdata", "Package.resolved")  # what Xcode and Swift leave behind
_COPY_BYTES = 1 << 20

_ARCHIVE_MAGIC, _MEMBER_BYTES = b"!<arch>\n", 60
_MACH_O_64, _ARM64, _BUILD_VERSION = 0xFEEDFACF, 0x0100000C, 0x32


@dataclass(frozen=True)
class _Slice:
    """One row of an XCFramework; `platform` is the number in LC_BUILD_VERSION."""

    platform: int
    variant: str | None


_SLICES = {"ios-arm64": _Slice(2, None), "ios-arm64-simulator": _Slice(7, "simulator")}


def assemble(
    app_dir: Path, libraries: dict[str, Path], artifact: Path, out: Path, *, force: bool = False, progress: Progress | None = None
) -> Path:
    """Writes `out` and returns the path of the Xcode project in it; `out` mirrors the checkout: ios_app/ and what it uses of runtime_ext/.

    app_dir: the checkout's ios_app, with runtime_ext beside it. libraries: static archives for `ios-arm64` and, if at hand,
    `ios-arm64-simulator`, each with everything that the engine needs. artifact: the model, put into the app's bundle.
    `out` appears only when complete. Raises CFMoEError where a part is missing or is for another platform, and where `out` exists
    (unless `force` and it is such a directory).
    """
    _check_sources(app_dir)
    for name in libraries.keys() - _SLICES.keys():
        raise CFMoEError(f"there is no platform {name} for the iOS app; give libraries for {' and '.join(_SLICES)}")
    if "ios-arm64" not in libraries:
        raise CFMoEError("the iOS app needs a static library for ios-arm64; build the engine for it first")
    for name, path in libraries.items():
        _check_library(path, name)
    opened = Artifact.open(artifact)
    staging = StagingDirectory(out, force, recognise=lambda path: (path / PROJECT).is_dir(), kind="packaged iOS apps")
    try:
        _copy_sources(app_dir, staging.path)
        _write_xcframework(libraries, staging.path / _XCFRAMEWORK)
        _copy_model(opened, staging.path / _MODELS, progress)
        staging.commit()
    except OSError as error:
        staging.discard()
        raise os_error(error, out, "write") from error
    except BaseException:
        staging.discard()
        raise
    return staging.out / PROJECT


def _check_sources(app_dir: Path) -> None:
    runtime = app_dir.parent / "runtime_ext"
    for path in [*(app_dir / part for part in _APP_PARTS), *(runtime / part for part in _RUNTIME_PARTS)]:
        if not path.exists():
            raise CFMoEError(f"{path} is missing; package iOS apps from a checkout of the project, with ios_app and runtime_ext")


def _copy_sources(app_dir: Path, out: Path) -> None:
    runtime = app_dir.parent / "runtime_ext"
    parts = [(app_dir / part, out / "ios_app" / part) for part in _APP_PARTS]
    parts += [(runtime / part, out / "runtime_ext" / part) for part in _RUNTIME_PARTS]
    for source, target in parts:
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            _copy_directory(source, target)
        else:
            shutil.copyfile(source, target)


def _copy_directory(source: Path, target: Path) -> None:
    """Not shutil.copytree, which goes on after an error and then says no more of it than its text."""
    target.mkdir()
    names = [path.name for path in source.iterdir()]
    for name in sorted(set(names) - _IGNORED(source, names)):
        # Links stay links: what they point to is copied to the same place.
        if (source / name).is_dir() and not (source / name).is_symlink():
            _copy_directory(source / name, target / name)
        else:
            shutil.copyfile(source / name, target / name, follow_symlinks=False)


def _write_xcframework(libraries: dict[str, Path], out: Path) -> None:
    rows: list[dict[str, Any]] = []
    for name, path in sorted(libraries.items()):
        (out / name).mkdir(parents=True)
        shutil.copyfile(path, out / name / _LIBRARY)
        row = {
            "BinaryPath": _LIBRARY,
            "LibraryIdentifier": name,
            "LibraryPath": _LIBRARY,
            "SupportedArchitectures": ["arm64"],
            "SupportedPlatform": "ios",
        }
        if variant := _SLICES[name].variant:
            row["SupportedPlatformVariant"] = variant
        rows.append(row)
    document = {"AvailableLibraries": rows, "CFBundlePackageType": "XFWK", "XCFrameworkFormatVersion": "1.0"}
    (out / "Info.plist").write_bytes(plistlib.dumps(document))


def _copy_model(artifact: Artifact, models: Path, progress: Progress | None) -> None:
    target = models / artifact.path.resolve().name
    sizes = {name: entry.size for name, entry in artifact.manifest.files.items()}
    total, done = sum(sizes.values()), 0
    for name in [*sizes, MANIFEST]:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        with open(artifact.path / name, "rb") as source, open(target / name, "wb") as copy:
            while piece := source.read(_COPY_BYTES):
                copy.write(piece)
                done += len(piece)
                if progress is not None:
                    progress("model", min(done, total), total)


def _check_library(path: Path, name: str) -> None:
    """A static archive whose objects are Mach-O for ARM64 and the platform."""
    try:
        with open(path, "rb") as file:
            data = file.read(len(_ARCHIVE_MAGIC))
            if data != _ARCHIVE_MAGIC:
                raise CFMoEError(f"{path} is no static library; build the engine for {name} again")
            for member in _members(path, file):
                if len(member) >= 32 and struct.unpack_from("<I", member)[0] == _MACH_O_64:
                    _check_object(path, name, member)
                    return
    except OSError as error:
        raise os_error(error, path, "read") from error
    raise CFMoEError(f"{path} holds no Mach-O objects; build the engine for {name} again")


def _members(path: Path, file: Any) -> Iterator[bytes]:
    """What the archive's members hold, without the long names that some begin with."""
    while len(header := file.read(_MEMBER_BYTES)) == _MEMBER_BYTES:
        try:
            size = int(header[48:58])
            long_name = int(header[3:16]) if header.startswith(b"#1/") else 0
        except ValueError as error:
            raise CFMoEError(f"{path} is a damaged static library; build it again") from error
        data = file.read(size)
        if len(data) != size or not 0 <= long_name <= size:
            raise CFMoEError(f"{path} is a damaged static library; build it again")
        if size % 2:
            file.read(1)
        yield data[long_name:]


def _check_object(path: Path, name: str, data: bytes) -> None:
    cpu, commands = struct.unpack_from("<I", data, 4)[0], struct.unpack_from("<I", data, 16)[0]
    if cpu != _ARM64:
        raise CFMoEError(f"{path} is not for ARM64; build the engine for {name}")
    offset = 32
    for _ in range(commands):
        if offset + 16 > len(data):
            break
        kind, size, platform = struct.unpack_from("<III", data, offset)
        if kind == _BUILD_VERSION:
            if platform != _SLICES[name].platform:
                raise CFMoEError(f"{path} is for platform {platform}, {name} is {_SLICES[name].platform}; build the engine for {name}")
            return
        if size < 8:
            break
        offset += size
    raise CFMoEError(f"{path} does not say for which platform it is; build the engine for {name} again")

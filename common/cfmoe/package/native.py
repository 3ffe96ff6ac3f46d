"""Native code for phones: the CMake presets, driven from here, with what they make kept for the next package."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from cfmoe.errors import CFMoEError, os_error

Progress = Callable[[str, int, int], None]

_CACHE_VARIABLE = "CFMOE_NATIVE_CACHE"
_NDK_VARIABLE = "ANDROID_NDK_HOME"
_SOURCES = ("CMakeLists.txt", "CMakePresets.json", "cmake", "runtime_ext/include", "runtime_ext/src", "runtime_ext/tools", "third_party")
_BUILD_BYTES = 512 << 20  # what a first build writes into the cache, nearly twice over
_STEP = re.compile(r"^\[(\d+)/(\d+)\]")


@dataclass(frozen=True)
class Preset:
    """A configure preset of CMakePresets.json. `target` is what CMake builds, `product` the file that comes of it.

    `triple`: LLVM's name of the platform, for kernels; None is Linux, whose kernels serve Android too.
    """

    name: str
    target: str
    product: str
    triple: str | None = None
    static: bool = True


PRESETS = {
    preset.name: preset
    for preset in (
        Preset("linux-x86_64", "cfmoe_engine", "cfmoe-engine"),
        Preset("linux-arm64", "cfmoe_engine", "cfmoe-engine"),
        Preset("android-arm64", "cfmoe_engine", "cfmoe-engine", static=False),
        Preset("ios-arm64", "cfmoe_archive", "libcfmoe.a", "arm64-apple-ios15.0"),
        Preset("ios-arm64-simulator", "cfmoe_archive", "libcfmoe.a", "arm64-apple-ios15.0-simulator"),
    )
}


def cache_directory() -> Path:
    """Where builds are kept: $CFMOE_NATIVE_CACHE, or a place in the user's cache."""
    if given := os.environ.get(_CACHE_VARIABLE):
        return Path(given).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cfmoe" / "native"


def source_directory() -> Path:
    """The checkout with the C++ sources and the apps. Raises CFMoEError where this is an installation without them."""
    root = Path(__file__).resolve().parents[3]
    if not all((root / name).exists() for name in _SOURCES):
        raise CFMoEError("the sources of the runtime and the apps are not in this installation; run cfmoe package from a checkout of CFMoE")
    return root


def ndk() -> Path | None:
    """The Android NDK that $ANDROID_NDK_HOME names. Raises CFMoEError where it names something else."""
    given = os.environ.get(_NDK_VARIABLE)
    if not given:
        return None
    if not (Path(given) / "build" / "cmake" / "android.toolchain.cmake").is_file():
        raise CFMoEError(f"${_NDK_VARIABLE} is {given}, where no NDK is; name its directory, or unset it to build without the GPU")
    return Path(given)


def missing() -> dict[str, str]:
    """What a build lacks here: name -> how to get it."""
    lacking = {name: f"pip install {name}" for name in ("cmake", "ninja") if _tool(name) is None}
    zig = importlib.util.find_spec("ziglang")
    if zig is None:
        lacking["zig"] = "pip install 'cfmoe[cross]'"
    elif not (zig.origin and Path(zig.origin).with_name("zig").is_file()):
        lacking["zig"] = "pip install --force-reinstall ziglang"
    if importlib.util.find_spec("tvm") is None:
        lacking["the kernel compiler"] = "pip install 'cfmoe[compile]'"
    return lacking


def build(preset: Preset, objects: Sequence[Path] = (), prefixes: Sequence[str] = (), progress: Progress | None = None) -> Path:
    """The preset's product with the kernels in `objects` linked in, whose names begin with `prefixes`; from the cache where it is there.

    The product is the caller's to copy, not to change. Raises CFMoEError with the compiler's last words where it fails; an
    interrupted build goes on where it stopped.
    """
    root, cache = source_directory(), cache_directory()
    kept = cache / "products" / _digest(root, preset, objects, prefixes) / preset.product
    if kept.is_file():
        return kept
    try:
        with _lock(cache / f"{preset.name}.lock") as lock:
            if not kept.is_file():
                _check_space(cache)
                directory = cache / f"build-{preset.name}"
                _remove_if_of_another(root, directory)
                _run_cmake(root, preset, directory, objects, prefixes, lock, progress)
                _keep(directory / preset.product, kept)
    except OSError as error:
        raise os_error(error, error.filename or cache, "write") from error
    return kept


def _check_space(cache: Path) -> None:
    free = shutil.disk_usage(cache).free
    if free < _BUILD_BYTES:
        raise CFMoEError(
            f"{cache} has {free >> 20} MiB free and building native code takes {_BUILD_BYTES >> 20} MiB; "
            f"free some space, or name another place with ${_CACHE_VARIABLE}"
        )


def _digest(root: Path, preset: Preset, objects: Sequence[Path], prefixes: Sequence[str]) -> str:
    tools = [f"{package} {metadata.version(package)}" for package in ("apache-tvm-ffi", "ziglang")]
    digest = hashlib.sha256("\n".join([preset.name, str(ndk()), *tools, *prefixes]).encode())
    for name in _SOURCES:
        path = root / name
        for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
            digest.update(f"{file.relative_to(root)} {file.stat().st_size}\n".encode() + file.read_bytes())
    for file in objects:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:32]


def _remove_if_of_another(root: Path, directory: Path) -> None:
    """A build directory serves one checkout, and cannot be moved."""
    cached = directory / "CMakeCache.txt"
    if cached.is_file():
        lines = set(cached.read_text().splitlines())
        if not {f"CMAKE_HOME_DIRECTORY:INTERNAL={root}", f"CMAKE_CACHEFILE_DIR:INTERNAL={directory}"} <= lines:
            shutil.rmtree(directory)


def _run_cmake(
    root: Path, preset: Preset, directory: Path, objects: Sequence[Path], prefixes: Sequence[str], lock: int, progress: Progress | None
) -> None:
    cmake, ninja = _tool("cmake"), _tool("ninja")
    if cmake is None or ninja is None:
        raise CFMoEError("cmake and ninja are needed to build native code; pip install cmake ninja")
    options = [f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    if preset.static:
        options += [f"-DCFMOE_KERNEL_OBJECTS={';'.join(map(str, objects))}", f"-DCFMOE_KERNEL_PREFIXES={','.join(prefixes)}"]
    environment = os.environ | {
        "ZIG_GLOBAL_CACHE_DIR": str(cache_directory() / "zig"),
        "ZIG_LOCAL_CACHE_DIR": str(cache_directory() / "zig"),
    }
    environment = {name: value for name, value in environment.items() if name not in ("CC", "CXX", "CFLAGS", "CXXFLAGS", "LDFLAGS")}
    _run([str(cmake), "--preset", preset.name, "-B", str(directory), *options], root, environment, preset, lock, None)
    # Where others are at work one compiler is enough; each takes a gigabyte.
    cpus = os.cpu_count() or 1
    jobs = max(1, cpus - round(os.getloadavg()[0]))
    command = [str(cmake), "--build", str(directory), "--target", preset.target, "--parallel", str(jobs)]
    _run(["nice", *command] if shutil.which("nice") else command, root, environment, preset, lock, progress)


def _run(command: list[str], root: Path, environment: dict[str, str], preset: Preset, lock: int, progress: Progress | None) -> None:
    """`lock` goes along: should this process be killed, compilers that live on keep others away from their directory."""
    lines: list[str] = []
    process = subprocess.Popen(
        command,
        cwd=root,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        pass_fds=(lock,),
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.strip())
            step = _STEP.match(line)
            if step and progress is not None:
                progress(f"native code for {preset.name}", int(step[1]), int(step[2]))
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)  # compilers and all
        process.wait()
        raise
    if process.wait() != 0:
        raise CFMoEError(f"the native code for {preset.name} cannot be built: {' '.join(_reason(lines).split())[:600]}")


def _reason(lines: list[str]) -> str:
    """What a failed build said of it: CMake in the lines after its word, compilers in the line itself."""
    cmake = [i for i, line in enumerate(lines) if line.startswith("CMake Error")]
    if cmake:
        return " ".join(line for line in lines[cmake[0] : cmake[0] + 12] if not line.startswith(("Call Stack", "-- ")))
    return " ".join(([line for line in lines if "error" in line.lower()] or lines)[-3:])


def _keep(product: Path, kept: Path) -> None:
    kept.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=kept.parent)
    os.close(handle)
    shutil.copyfile(product, name)
    shutil.copymode(product, name)
    os.replace(name, kept)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[int]:
    """The open file that holds the lock, until it is closed here and in all processes that have it of us."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def _tool(name: str) -> Path | None:
    """A program beside this Python, or on PATH."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    return Path(found) if found else None

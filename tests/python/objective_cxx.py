"""Compiles the Metal device for Apple's platforms, against declarations of Metal and Foundation of our own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import ziglang

from support import ROOT

METAL = ROOT / "runtime_ext" / "src" / "device" / "metal"

# libc++ as zig builds it, with a C library for Darwin; Foundation and Metal are declared by the tests.
_SITE = {"ABI_VERSION": "1", "ABI_NAMESPACE": "__1", "HARDENING_MODE": "_LIBCPP_HARDENING_MODE_NONE", "HARDENING_MODE_DEFAULT": "2"}
_SITE |= dict.fromkeys(("HAS_THREADS", "HAS_THREAD_API_PTHREAD", "HAS_MONOTONIC_CLOCK", "HAS_LOCALIZATION", "HAS_UNICODE"), "1")
_SITE |= dict.fromkeys(("HAS_WIDE_CHARACTERS", "HAS_FILESYSTEM", "HAS_RANDOM_DEVICE", "HAS_TERMINAL"), "1")
_SITE |= dict.fromkeys(("HAS_TIME_ZONE_DATABASE", "HAS_MUSL_LIBC"), "0")
_SITE |= dict.fromkeys(("HAS_THREAD_API_EXTERNAL", "HAS_THREAD_API_WIN32", "LIBC_PICOLIBC", "LIBC_NEWLIB"), "0")
# What the oldest system lacks is refused, or done without.
_SITE |= {"HAS_VENDOR_AVAILABILITY_ANNOTATIONS": "1", "ASSERTION_SEMANTIC_DEFAULT": "8", "PSTL_BACKEND_SERIAL": "1"}


def _compile(source: Path, target: str, options: list[str]) -> subprocess.CompletedProcess[str]:
    zig = Path(ziglang.__file__).parent / "lib"
    defines = [f"-D_LIBCPP_{name}={value}" for name, value in _SITE.items()]
    system = [zig / "libcxx" / "include", zig / "include", zig / "libc" / "include" / "any-darwin-any", ROOT / "tests" / "metal_stubs"]
    includes = [flag for path in system for flag in ("-isystem", str(path))] + [f"-I{ROOT / 'runtime_ext' / 'src'}"]
    language = ["-x", "objective-c++", "-fobjc-arc", "-fblocks", "-fexceptions", "-std=c++20", "-nostdinc", "-nostdinc++"]
    strict = ["-Wall", "-Wextra", "-Werror", *options]
    command = [sys.executable, "-m", "ziglang", "clang", f"--target={target}", *language, *strict, *defines, *includes, str(source)]
    return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=300, check=False)


def check_metal(source: Path, target: str) -> subprocess.CompletedProcess[str]:
    """Syntax and types of `source`."""
    return _compile(source, target, ["-fsyntax-only"])


def compile_metal(source: str, target: str, out: Path) -> Path:
    """The object file of one of the Metal device's sources, in the directory `out`."""
    made = out / f"{source}.o"
    result = _compile(METAL / source, target, ["-O2", "-c", "-o", str(made)])
    assert result.returncode == 0, result.stderr
    return made

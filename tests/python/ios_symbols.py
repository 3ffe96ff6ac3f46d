"""What the libraries of iOS export, as far as lists at hand say: what a program may want of them."""

from __future__ import annotations

import re
from pathlib import Path

import ziglang

from support import ROOT

STANDARD_LIBRARY = ROOT / "tests" / "ios_symbols" / "libcxx.txt"


def c_library() -> set[str]:
    """What Apple's C library exports, by the SDK's list that zig brings: macOS's, of which iOS has what is used here as well."""
    text = (Path(ziglang.__file__).parent / "lib" / "libc" / "darwin" / "libSystem.tbd").read_text()
    names = {name.strip().strip("'") for part in re.findall(r"symbols:\s+\[(.*?)\]", text, re.S) for name in part.split(",")}
    assert {"_malloc", "_pthread_create", "_open"} <= names
    return {name for name in names if re.fullmatch(r"[\w$.]+", name)}


def standard_library() -> set[str]:
    """What the engine may want of libc++ and libc++abi: the file says where that is from."""
    return {line for line in STANDARD_LIBRARY.read_text().splitlines() if line and not line.startswith("#")}

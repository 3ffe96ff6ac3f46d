"""The C program of runtime_ext/examples: built as C99 and C11 against the header and the library, it says what `cfmoe run` says."""

from __future__ import annotations

import importlib.resources
import importlib.util
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from support import ROOT, Cli

SOURCE = ROOT / "runtime_ext" / "examples" / "complete.c"
COMPILER = shutil.which("cc") or "gcc"
PROMPT = "The proposal adds"


@pytest.mark.parametrize("standard", ["c99", "c11"])
def test_the_c_program_completes_as_the_command_does(standard: str, demo_artifact: Path, cli: Cli, tmp_path: Path) -> None:
    with importlib.resources.as_file(importlib.resources.files("cfmoe.runtime").joinpath("libcfmoe.so")) as library:
        folder = library.parent
    tvm_ffi = importlib.util.find_spec("tvm_ffi")
    assert tvm_ffi is not None and tvm_ffi.submodule_search_locations
    search = os.pathsep.join([str(folder), str(Path(tvm_ffi.submodule_search_locations[0]) / "lib")])
    program = tmp_path / "complete"
    strict = ("-Wall", "-Wextra", "-Werror", "-pedantic")
    include = f"-I{ROOT / 'runtime_ext' / 'include'}"
    link = (f"-L{folder}", "-lcfmoe", "-Wl,--allow-shlib-undefined")
    subprocess.run([COMPILER, f"-std={standard}", *strict, str(SOURCE), include, *link, "-o", str(program)], check=True)
    environment = os.environ | {"LD_LIBRARY_PATH": search}

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run([program, *arguments], env=environment, capture_output=True, encoding="utf-8", timeout=60, check=False)

    result = run(demo_artifact, PROMPT, "30000000")
    assert result.returncode == 0, result.stderr
    assert "experts in memory" in result.stderr
    expected = cli("run", demo_artifact, "--prompt", PROMPT, "--max-new-tokens", "48", "--json")
    assert result.stdout == PROMPT + json.loads(expected.stdout)["text"] + "\n"
    refused = run(demo_artifact, PROMPT, "1000")
    assert refused.returncode == 2 and "smallest that works" in refused.stderr


def test_the_program_fits_a_page() -> None:
    assert len(SOURCE.read_text().splitlines()) <= 90

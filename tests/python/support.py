"""What the tests share beside fixtures."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]

Cli = Callable[..., subprocess.CompletedProcess[str]]


def error_line(result: subprocess.CompletedProcess[str]) -> str:
    """The one line that a command printed about what the user can mend."""
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


def load_script(path: Path) -> ModuleType:
    """A Python file outside of the packages, as a module of its own name."""
    specification = importlib.util.spec_from_file_location(path.stem, path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[path.stem] = module
    specification.loader.exec_module(module)
    return module


def load_alignments(path: Path) -> list[int]:
    """Alignments of the segments of an ELF file, in bytes; phones have pages of up to 16 KiB."""
    listing = subprocess.run(["readelf", "-lW", str(path)], capture_output=True, text=True, check=True).stdout
    return [int(line.split()[-1], 16) for line in listing.splitlines() if line.strip().startswith("LOAD")]

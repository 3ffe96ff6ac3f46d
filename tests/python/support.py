"""What the tests share beside fixtures."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

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


def load_alignments(path: Path) -> list[int]:
    """Alignments of the segments of an ELF file, in bytes; phones have pages of up to 16 KiB."""
    listing = subprocess.run(["readelf", "-lW", str(path)], capture_output=True, text=True, check=True).stdout
    return [int(line.split()[-1], 16) for line in listing.splitlines() if line.strip().startswith("LOAD")]

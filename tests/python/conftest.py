"""Fixtures: the embedded model, artifacts compiled once and kept, shared models and data where a checkout has them."""

from __future__ import annotations

import fcntl
import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from support import ROOT, Cli

CACHE = ROOT / "build" / "test-artifacts"
SHARED = ROOT.parent / "shared"

# A shell's background jobs ignore Ctrl-C, and so do their children unless they say otherwise: tests interrupt theirs.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def user_paths(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test writes for the user goes to a temporary directory."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(home))
    for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME"):
        monkeypatch.setenv(name, str(home / name.lower()))
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Models of a few layers only lose time by sharing their work."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The embedded checkpoint."""
    return ROOT / "assets" / "demo-moe-13m"


@pytest.fixture(scope="session")
def moe_63m() -> Path:
    """The larger shared checkpoint; skips where the checkout has none."""
    return _shared("models/moe-63m")


@pytest.fixture(scope="session")
def corpus_eval() -> Path:
    """Held-out documents; skips where the checkout has none."""
    return _shared("data/corpus_eval.jsonl.xz")


def _shared(relative: str) -> Path:
    path = SHARED / relative
    if not path.exists():
        pytest.skip(f"shared/{relative} is not beside this checkout")
    return path


@pytest.fixture(scope="session")
def compiled() -> Callable[[Path, str], Path]:
    """Compiles (checkpoint, quantisation preset) unless an artifact of the same checkpoint and compiler is there already.

    Kept under build/test-artifacts over runs; shared by parallel workers. Do not write into what it returns.
    """
    return _compiled


def _compiled(model: Path, quant: str = "mixed") -> Path:
    out = CACHE / f"{model.name}-{quant}-{_key(model)}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / f"{model.name}-{quant}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (out / "manifest.json").exists():
            from cfmoe.compile import compile_model

            compile_model(model, out, quant=quant)
    return out


def _key(model: Path) -> str:
    """Changes whenever the compiler, the writer or the checkpoint does."""
    digest = hashlib.sha256()
    sources = [*(ROOT / "compile").rglob("*.py"), *(ROOT / "common" / "cfmoe" / "artifact").rglob("*.py")]
    for path in sorted(sources):
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    for path in sorted(model.iterdir()):
        digest.update(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


@pytest.fixture(scope="session")
def demo_artifact(demo_model: Path) -> Path:
    """The embedded model, preset mixed."""
    return _compiled(demo_model)


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[Cli]:
    """Runs `cfmoe ARGUMENTS` in a process of its own, in an empty directory."""
    directory = tmp_path / "cwd"
    directory.mkdir()

    def call(*arguments: str | bytes | Path, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        command: Sequence[str | bytes | Path] = [sys.executable, "-m", "cfmoe.cli", *arguments]
        return subprocess.run(
            [os.fsencode(part) for part in command],
            cwd=directory,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            timeout=timeout,
            check=False,
        )

    yield call

"""The wheel in an environment of its own: the base install runs artifacts without torch and without the compiler."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from support import ROOT, Cli, error_line

Installed = Callable[..., subprocess.CompletedProcess[str]]


def pip(python: Path | str, *arguments: str | Path) -> None:
    subprocess.run([python, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments], check=True, timeout=300)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """Runs `cfmoe ARGUMENTS` as the wheel with its own dependencies, and nothing else, provides it."""
    directory = tmp_path_factory.mktemp("wheel")
    options = ("--no-deps", "--no-build-isolation", f"--config-settings=build-dir={directory / 'build'}")
    pip(sys.executable, "wheel", ROOT, *options, "--wheel-dir", directory)
    (wheel,) = directory.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", directory / "venv"], check=True, timeout=120)
    binaries = directory / "venv" / "bin"
    pip(binaries / "python", "install", wheel)

    def call(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        command = [binaries / "cfmoe", *arguments]
        return subprocess.run(command, cwd=directory, env=environment, capture_output=True, encoding="utf-8", timeout=120, check=False)

    return call


@pytest.mark.slow
def test_base_install_runs_artifacts(installed: Installed, cli: Cli, demo_artifact: Path, demo_model: Path, tmp_path: Path) -> None:
    packages = json.loads(installed("doctor", "--json").stdout)["packages"]
    assert [name for name in ("torch", "transformers", "apache-tvm", "safetensors") if packages[name] is not None] == []
    artifact = shutil.copytree(demo_artifact, tmp_path / "demo.cfmoe")
    assert installed("inspect", artifact, "--verify").returncode == 0
    arguments = ("run", artifact, "--prompt", "The proposal adds", "--max-new-tokens", "24", "--memory-budget", "50%", "--json")
    result, expected = installed(*arguments), cli(*arguments)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["token_ids"] == json.loads(expected.stdout)["token_ids"]
    assert "install cfmoe[compile]" in error_line(installed("compile", demo_model, "--out", tmp_path / "out"))
    assert "install cfmoe[compile]" in installed("doctor").stdout

"""The source distribution, the wheel made of it, and an environment with that alone: it runs artifacts without torch and the compiler."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from support import ROOT, Cli, error_line

Installed = Callable[..., subprocess.CompletedProcess[str]]


def pip(python: Path | str, *arguments: str | Path) -> None:
    subprocess.run([python, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments], check=True, timeout=300)


@pytest.fixture(scope="module")
def source_distribution(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sdist")
    hook = "import sys; from scikit_build_core.build import build_sdist; build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", hook, directory], cwd=ROOT, check=True, timeout=120, stdout=subprocess.DEVNULL)
    (archive,) = directory.iterdir()
    return archive


@pytest.fixture(scope="module")
def installed(source_distribution: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """Runs `cfmoe ARGUMENTS` as the wheel with its own dependencies, and nothing else, provides it."""
    directory = tmp_path_factory.mktemp("wheel")
    options = ("--no-deps", "--no-build-isolation", f"--config-settings=build-dir={directory / 'build'}")
    pip(sys.executable, "wheel", source_distribution, *options, "--wheel-dir", directory)
    (wheel,) = directory.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", directory / "venv"], check=True, timeout=120)
    binaries = directory / "venv" / "bin"
    pip(binaries / "python", "install", wheel)

    def call(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        command = [binaries / "cfmoe", *arguments]
        return subprocess.run(command, cwd=directory, env=environment, capture_output=True, encoding="utf-8", timeout=120, check=False)

    return call


def test_the_source_distribution_is_the_checkout_without_what_was_built(source_distribution: Path) -> None:
    with tarfile.open(source_distribution) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    folders = ("assets", "cmake", "common", "compile", "runtime_ext", "third_party", "tune")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert {str(path.relative_to(ROOT)) for path in files} <= names
    built = [name for name in names if name.startswith(("build/", "out/", ".venv/")) or name.endswith((".so", ".o", ".pyc"))]
    assert not built and {"CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE", "PKG-INFO"} <= names


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

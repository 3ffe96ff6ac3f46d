"""What the user can mend: one line on standard error, exit code 2, nothing on standard output."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

import artifacts
from cfmoe.errors import os_error
from support import ROOT, Cli, error_line, load_script

DEMO_MODEL = ROOT / "assets" / "demo-moe-13m"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["frob"], "No such command 'frob'"),
        (["run", "a", "--prompt", "x", "--budget", "1"], "No such option: --budget"),
        (["run", "a"], "Missing option '--prompt'"),
        (["run"], "Missing argument"),
        (["run", "a", "--prompt", "x", "--io", "fast"], "'fast' is not one of"),
        (["run", "a", "--prompt", "x", "--threads", "0"], "Input should be greater than or equal to 1; given '0'"),
        (
            ["run", "a", "--prompt", "x", "--threads", "two"],
            "unable to parse string as an integer; given 'two'",
        ),
        (["run", "a", "--prompt", "x", "--top-k", "5"], "--top-k 5 does nothing without --temperature"),
        (["run", "a", "--prompt", "x", "--top-p", "0.5", "--temperature", "0"], "--top-p 0.5 does nothing without --temperature"),
        (["run", "a", "--prompt", "x", "--seed", "1"], "--seed 1 does nothing without --temperature"),
        (["run", "nowhere", "--prompt", "x"], "nowhere does not exist; give an artifact directory"),
        (["run", "nowhere", "--prompt", "@missing.txt"], "cannot read missing.txt: no such file or directory; check the path"),
        (["inspect", "nowhere"], "nowhere does not exist; give an artifact directory"),
        (["score", "nowhere", "--data", "x.txt"], "nowhere does not exist; give an artifact directory"),
        (["bench", "nowhere"], "nowhere does not exist; give an artifact directory"),
        (["inspect", "."], ". is no artifact, it has no manifest.json; give a directory that `cfmoe compile` wrote"),
        (["run", DEMO_MODEL, "--prompt", "x"], "is no artifact, it has no manifest.json; it is a checkpoint: compile it"),
        (["compile", "nowhere", "--out", "a"], "nowhere: is not a directory; give the directory of a Hugging Face checkpoint"),
        (["compile", ".", "--out", "a"], ".: has no config.json; give the directory of a Hugging Face checkpoint"),
        (["compile", "nowhere", "--out", "a", "--quant", "q2"], "'q2' is not one of"),
    ],
)
def test_one_line(cli: Cli, arguments: list[str | Path], expected: str) -> None:
    assert expected in error_line(cli(*arguments))


def test_prompt_that_is_not_utf8(cli: Cli, tmp_path: Path) -> None:
    assert "--prompt is not UTF-8: byte 0xff at offset 2" in error_line(cli("run", "a", "--prompt", b"ab\xffcd"))
    path = tmp_path / "prompt.txt"
    path.write_bytes(b"caf\xe9 latin")
    assert f"{path} is not UTF-8: byte 0xe9 at offset 3; convert it" in error_line(cli("run", "a", "--prompt", f"@{path}"))


def test_existing_output_is_refused(cli: Cli, tmp_path: Path, demo_model: Path) -> None:
    out = artifacts.write(tmp_path / "a")
    assert "exists; give --force" in error_line(cli("compile", demo_model, "--out", out))


def test_inspect_json_of_a_damaged_file(cli: Cli, tmp_path: Path) -> None:
    out = artifacts.write(tmp_path / "a")
    result = cli("inspect", out, "--verify", "--json")
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout)
    assert facts["bytes"]["total"] == facts["verified_bytes"]
    data = bytearray((out / "experts.bin").read_bytes())
    data[7] ^= 1
    (out / "experts.bin").write_bytes(data)
    assert re.search(r"experts\.bin is damaged: its SHA-256", error_line(cli("inspect", out, "--verify", "--json")))


def test_doctor_json(cli: Cli) -> None:
    result = cli("doctor", "--json")
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout)
    assert facts["cpu"]["usable_cpus"] >= 1
    assert facts["missing"]["run"] == []


def test_reader_that_goes_away(demo_model: Path) -> None:
    """`cfmoe doctor | head -0` is no reason for a traceback."""
    import subprocess
    import sys

    process = subprocess.Popen([sys.executable, "-m", "cfmoe.cli", "doctor"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    process.wait(timeout=60)


def test_cli_document_is_current() -> None:
    cli_docs = load_script(ROOT / "scripts" / "cli_docs.py")
    assert cli_docs.DOCUMENT.read_text("utf-8") == cli_docs.render(), "run `make docs`"


def test_compile_on_a_full_file_system(tmp_path: Path, demo_model: Path) -> None:
    """With a limit on the size of files in the place of a full disk; see test_artifact_writer for ENOSPC itself."""
    import subprocess
    import sys

    code = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
from cfmoe.cli.app import main
main(["compile", sys.argv[1], "--out", sys.argv[2], "--json"])
"""
    out = tmp_path / "out" / "a"
    result = subprocess.run(
        [sys.executable, "-c", code, str(demo_model), str(out)], capture_output=True, text=True, timeout=300, check=False
    )
    line = error_line(result)
    assert re.search(r"cannot write .*/out/a/\w+\.bin: file too large; raise the file size limit", line)
    assert list(tmp_path.iterdir()) == []


def test_a_partial_write_that_numpy_reports() -> None:
    error = os_error(OSError("557056 requested and 522720 written"), "m.gguf", "write")
    assert str(error) == "cannot write m.gguf: 557056 requested and 522720 written; free some space there if it is full, and try again"


def test_damaged_checkpoint(cli: Cli, tmp_path: Path, demo_model: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(demo_model, model)
    data = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(data[: len(data) // 2])
    assert "model.safetensors" in error_line(cli("compile", model, "--out", tmp_path / "a"))
    assert not (tmp_path / "a").exists()

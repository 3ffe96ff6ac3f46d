"""The artifact writer: what it writes is what is read, and it leaves all or nothing."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

import artifacts
from cfmoe.artifact import Artifact
from cfmoe.artifact.digest import xxh3_64
from cfmoe.artifact.writer import ArtifactWriter
from cfmoe.errors import CFMoEError

HERE = Path(__file__).parent


def test_roundtrip(tmp_path: Path) -> None:
    artifact = Artifact.open(artifacts.write(tmp_path / "a"))
    assert artifact.manifest.model.name == "tiny"
    assert artifact.manifest.model.moe_layers == (0, 1)
    embedding, norm = artifact.index.weights
    assert (embedding.offset, embedding.size, embedding.dtype, embedding.shape) == (0, 132, "float32", (33,))
    assert (norm.offset, norm.size, norm.dtype, norm.shape) == (192, 40, "float16", (4, 5))
    weights = (artifact.path / "weights.bin").read_bytes()
    assert len(weights) == 4096
    assert weights[:132] == np.arange(33, dtype=np.float32).tobytes()
    assert weights[132:192] == bytes(60)
    experts = artifact.index.experts
    assert (experts.record_bytes, experts.record_stride) == (160, 16384)
    data = (artifact.path / "experts.bin").read_bytes()
    assert len(data) == 6 * 16384
    for layer in range(artifacts.LAYERS):
        for expert in range(artifacts.EXPERTS):
            offset = (layer * artifacts.EXPERTS + expert) * 16384
            assert data[offset : offset + 160] == artifacts.record(layer, expert).tobytes()
            assert data[offset + 160 : offset + 16384] == bytes(16384 - 160)
            assert experts.xxh3_64[layer][expert] == xxh3_64(data[offset : offset + 160])
    sizes = {name: entry.size for name, entry in artifact.manifest.files.items()}
    assert sizes == {
        path.relative_to(artifact.path).as_posix(): path.stat().st_size
        for path in artifact.path.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }
    assert artifact.verify() == sum(sizes.values())


def test_manifest_ends_in_its_seal(tmp_path: Path) -> None:
    text = (artifacts.write(tmp_path / "a") / "manifest.json").read_bytes()
    body, seal = text.rsplit(b",", 1)
    assert seal == b'\n  "xxh3_64": "' + xxh3_64(body).encode() + b'"\n}\n'
    assert json.loads(text)["format_version"] == 1


def test_two_writes_are_equal(tmp_path: Path) -> None:
    first, second = artifacts.write(tmp_path / "a"), artifacts.write(tmp_path / "b")
    for path in first.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (second / path.relative_to(first)).read_bytes()


def test_existing_output_is_refused_and_replaced_by_force(tmp_path: Path) -> None:
    out = artifacts.write(tmp_path / "a")
    (out / "extra").write_text("old")
    with pytest.raises(CFMoEError, match=r"a exists; give --force"):
        ArtifactWriter(out)
    artifacts.write(out, force=True)
    assert not (out / "extra").exists()
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("kind", ["directory", "file", "symlink"])
def test_force_replaces_artifacts_only(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "precious"
    if kind == "directory":
        out.mkdir()
        (out / "thesis.txt").write_text("years of work")
    elif kind == "file":
        out.write_text("years of work")
    else:
        (tmp_path / "elsewhere").mkdir()
        out.symlink_to(tmp_path / "elsewhere")
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(CFMoEError, match="--force replaces artifacts only"):
        artifacts.write(out, force=True)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_failure_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), ArtifactWriter(tmp_path / "new" / "parents" / "a") as writer:
        artifacts.fill(writer)
        raise error
    assert list(tmp_path.iterdir()) == []


def test_failure_keeps_the_old_artifact(tmp_path: Path) -> None:
    out = artifacts.write(tmp_path / "a")
    with pytest.raises(RuntimeError), ArtifactWriter(out, force=True) as writer:
        artifacts.fill(writer)
        raise RuntimeError
    assert os.listdir(tmp_path) == ["a"]
    Artifact.open(out).verify()


def test_leaving_without_finish_is_a_fault(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="without finish"), ArtifactWriter(tmp_path / "a"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_wrong_calls(tmp_path: Path) -> None:
    def attempt(call: str) -> None:
        with pytest.raises(ValueError), ArtifactWriter(tmp_path / "a") as writer:
            layout = ("f32", 1, 2, 128, {"gate_up": (0, 64), "down": (64, 64)})
            steps = {
                "weight twice": lambda: [writer.add_weight("w", np.ones(1, np.float32)) for _ in range(2)],
                "empty weight": lambda: writer.add_weight("w", np.ones(0, np.float32)),
                "weight of float64": lambda: writer.add_weight("w", np.ones(1)),
                "record before layout": lambda: writer.add_expert(0, 0, np.ones(32, np.int32)),
                "record out of order": lambda: [writer.set_expert_layout(*layout), writer.add_expert(0, 1, np.ones(32, np.int32))],
                "record of another size": lambda: [writer.set_expert_layout(*layout), writer.add_expert(0, 0, np.ones(31, np.int32))],
                "path outside": lambda: writer.add_file("../x", b""),
                "absolute path": lambda: writer.add_file("/tmp/x", b""),
                "own file": lambda: writer.add_file("manifest.json", b""),
                "incomplete": lambda: [writer.set_expert_layout(*layout), writer.finish({})],
            }
            steps[call]()

    for call in (
        "weight twice",
        "empty weight",
        "weight of float64",
        "record before layout",
        "record out of order",
        "record of another size",
        "path outside",
        "absolute path",
        "own file",
        "incomplete",
    ):
        attempt(call)
    assert list(tmp_path.iterdir()) == []


def _python(code: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        cwd=HERE,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_file_too_large_is_one_line(tmp_path: Path) -> None:
    """The same path through write() as a full disk, without needing one."""
    result = _python(
        """
        import resource, signal, sys
        from pathlib import Path
        import artifacts
        from cfmoe.errors import CFMoEError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        try:
            artifacts.write(Path(sys.argv[1]))
        except CFMoEError as error:
            print(error)
        """,
        tmp_path / "a",
    )
    assert result.stdout == f"cannot write {tmp_path}/a/experts.bin: file too large; {_FILE_LIMIT}\n", result.stderr
    assert list(tmp_path.iterdir()) == []


_FILE_LIMIT = "raise the file size limit (ulimit -f) or choose a file system that takes larger files"


def test_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """/dev/full answers every write as a full disk does."""
    import builtins

    real_open = builtins.open

    def open_full(path: object, mode: str = "r", *arguments: object, **options: object) -> object:
        if str(path).endswith("experts.bin") and "x" in mode:
            return real_open("/dev/full", "wb", buffering=0)
        return real_open(path, mode, *arguments, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(builtins, "open", open_full)
    with pytest.raises(CFMoEError) as caught:
        artifacts.write(tmp_path / "a")
    assert str(caught.value) == (
        f"cannot write {tmp_path}/a/experts.bin: no space left on device; free some space there or choose another place"
    )
    assert list(tmp_path.iterdir()) == []


def test_missing_source_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CFMoEError, match=r"cannot read .*/nowhere: no such file or directory"), ArtifactWriter(tmp_path / "a") as writer:
        writer.copy_file(tmp_path / "nowhere", "tokenizer.json")
    assert list(tmp_path.iterdir()) == []


def test_read_only_directory_is_one_line(tmp_path: Path) -> None:
    """In a process of its own, from which root takes the right to write anywhere."""
    code = "import sys, artifacts; from pathlib import Path; artifacts.write(Path(sys.argv[1]))"
    as_owner = ["setpriv", "--bounding-set", "-dac_override"] if os.geteuid() == 0 else []
    tmp_path.chmod(0o555)
    try:
        result = subprocess.run([*as_owner, sys.executable, "-c", code, str(tmp_path / "a")], cwd=HERE, capture_output=True, text=True)
    finally:
        tmp_path.chmod(0o755)
    assert result.returncode == 1
    assert re.search(r"CFMoEError: cannot create .*: permission denied; .+$", result.stderr.strip()), result.stderr
    assert list(tmp_path.iterdir()) == []


def _start_writer(out: Path) -> subprocess.Popen[str]:
    """A process in the midst of writing `out`."""
    code = """
    import sys, time
    from pathlib import Path
    import artifacts
    from cfmoe.artifact.writer import ArtifactWriter
    with ArtifactWriter(Path(sys.argv[1]), force=True) as writer:
        artifacts.fill(writer)
        print("ready", flush=True)
        time.sleep(60)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(out)], cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_interruption_leaves_nothing(tmp_path: Path) -> None:
    process = _start_writer(tmp_path / "a")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode != 0
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_writer_left_is_swept(tmp_path: Path) -> None:
    process = _start_writer(tmp_path / "a")
    process.kill()
    process.communicate(timeout=30)
    assert len(os.listdir(tmp_path)) == 1
    artifacts.write(tmp_path / "b")
    assert os.listdir(tmp_path) == ["b"]


def test_a_live_writer_is_left_alone(tmp_path: Path) -> None:
    process = _start_writer(tmp_path / "a")
    try:
        artifacts.write(tmp_path / "b")
        assert len(os.listdir(tmp_path)) == 2
    finally:
        process.kill()
        process.communicate(timeout=30)


def test_an_artifact_moved_away_by_a_killed_writer_is_put_back(tmp_path: Path) -> None:
    """The one moment in which the old artifact is not under its name."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    time.sleep(0.01)
    artifacts.write(tmp_path / "a").rename(tmp_path / f".a.cfmoe-old-{dead.pid}-0123abcd")
    artifacts.write(tmp_path / "b")
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]
    Artifact.open(tmp_path / "a").verify()

"""A conversion that is interrupted, and resumed: the same bytes as one that was not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import artifacts
from cfmoe.artifact.writer import ArtifactWriter
from cfmoe.compile import compile_model
from cfmoe.errors import CFMoEError
from tiny_families import tiny_checkpoint

RECORDS = artifacts.LAYERS * artifacts.EXPERTS


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


class Stop(Exception):
    pass


def write(out: Path, stop: int | None = None, fingerprint: str = "one", limit: int = RECORDS) -> int:
    """Writes the hand-made artifact, but raises Stop before record `stop`; returns how many records were there already."""
    with ArtifactWriter(out, resume=fingerprint) as writer:
        writer.add_weight("embedding", np.arange(33, dtype=np.float32))
        writer.add_weight("norm", np.ones((4, 5), np.float16))
        writer.set_expert_layout("f32", 2, 3, artifacts.RECORD_WORDS * 4, {"gate_up": (0, 64), "down": (64, 96)})
        found = writer.records_done
        for number in range(found, limit):
            if number == stop:
                raise Stop
            writer.add_expert(*divmod(number, artifacts.EXPERTS), artifacts.record(*divmod(number, artifacts.EXPERTS)))
        writer.add_file("lib/x/plan.json", b"{}\n")
        writer.add_file("lib/x/kernels.so", bytes(range(256)))
        writer.add_file("tokenizer.json", b"{}\n")
        if stop == RECORDS:
            raise Stop
        writer.finish(artifacts.manifest())
    return found


@pytest.fixture
def expected(tmp_path: Path) -> dict[str, bytes]:
    return contents(artifacts.write(tmp_path / "expected"))


@pytest.mark.parametrize("stop", range(RECORDS + 1))
def test_every_place_to_stop(stop: int, tmp_path: Path, expected: dict[str, bytes]) -> None:
    out = tmp_path / "a"
    with pytest.raises(Stop):
        write(out, stop)
    assert not out.exists()
    assert write(out) == stop
    assert contents(out) == expected
    assert sorted(os.listdir(tmp_path)) == ["a", "expected"]


@pytest.mark.parametrize(
    ("damage", "kept"),
    [
        (lambda part: os.truncate(part / "experts.bin", 2 * 16384 + 100), 2),  # a torn record
        (lambda part: os.truncate(part / "records.journal", 4 + 17 + 5), 1),  # a torn line
        (lambda part: (part / "experts.bin").write_bytes(bytes(5 * 16384)), 0),  # lost pages
        (lambda part: (part / "experts.bin").unlink(), 0),
        (lambda part: (part / "records.journal").unlink(), 0),
        (lambda part: (part / "records.journal").write_bytes(b"\xff\x00\n\n\n"), 0),
    ],
    ids=["torn record", "torn line", "lost pages", "no records", "no journal", "noise"],
)
def test_what_is_not_whole_is_written_again(damage: object, kept: int, tmp_path: Path, expected: dict[str, bytes]) -> None:
    out = tmp_path / "a"
    with pytest.raises(Stop):
        write(out, 5)
    damage(tmp_path / ".a.cfmoe-part")  # type: ignore[operator]
    assert write(out) == kept
    assert contents(out) == expected


def test_work_on_something_else_is_not_taken_up(tmp_path: Path, expected: dict[str, bytes]) -> None:
    with pytest.raises(Stop):
        write(tmp_path / "a", 5)
    assert write(tmp_path / "a", fingerprint="two") == 0
    assert contents(tmp_path / "a") == expected


def test_two_at_a_time_are_refused(tmp_path: Path) -> None:
    with ArtifactWriter(tmp_path / "a", resume="one") as writer:
        with pytest.raises(CFMoEError, match="is in use: another process writes"):
            ArtifactWriter(tmp_path / "a", resume="one")
        artifacts.fill(writer)
        writer.finish(artifacts.manifest())
    assert os.listdir(tmp_path) == ["a"]


COMPILE = """
import sys, time
from pathlib import Path
from cfmoe.compile import compile_model
def progress(what, done, total):
    if what.startswith("experts"):
        print(done, flush=True)
        time.sleep(0.02)
compile_model(Path(sys.argv[1]), Path(sys.argv[2]), quant="f16", resume=True, progress=progress)
"""


def test_a_killed_compilation_goes_on(tmp_path: Path, demo_model: Path) -> None:
    model = tiny_checkpoint("olmoe", tmp_path / "model", demo_model / "tokenizer.json")
    whole = compile_model(model, tmp_path / "whole", quant="f16")
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", COMPILE, str(model), str(out)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= 8:
            process.send_signal(signal.SIGKILL)
            break
    process.wait(timeout=60)
    process.stdout.close()
    assert not out.exists()
    records: list[str] = []
    compile_model(model, out, quant="f16", resume=True, progress=lambda what, _done, _total: records.append(what))
    assert 0 < sum(what.startswith("experts") for what in records) <= 16 - 6  # two dense layers were counted among the eight
    assert contents(out) == contents(whole)


KILLED = """
import json, os, signal, sys
from pathlib import Path
from cfmoe.artifact import journal, staging, writer
from cfmoe.compile import compile_model, compiler

model, out, whole, place, count = *map(Path, sys.argv[1:4]), sys.argv[4], int(sys.argv[5])
seen = 0

def ready_made(to, target, *_):
    # Compiling the kernels is most of the time, and the same in every run.
    manifest = json.loads((whole / "manifest.json").read_text())
    entry = manifest["targets"][target.name]
    for name in (entry["plan"], entry["library"]):
        to.copy_file(whole / name, name)
    return entry, manifest["kernel_set"]
compiler._write_target = ready_made

def is_the_place(here):
    global seen
    seen += here == place
    return here == place and seen == count

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def before(owner, name, here):
    real = getattr(owner, name)
    def patched(*arguments, **options):
        if is_the_place(here):
            die()
        return real(*arguments, **options)
    setattr(owner, name, patched)

write = writer._Stream.write
def torn(stream, data):
    if stream._shown.name == "experts.bin" and is_the_place("half a record"):
        write(stream, memoryview(data)[: len(data) // 2])
        die()
    write(stream, data)
writer._Stream.write = torn
before(journal.Journal, "note", "record before its line")
before(writer.ArtifactWriter, "copy_file", "copied file")
before(staging.StagingDirectory, "commit", "rename")

def progress(what, done, total):
    if is_the_place(what.split()[0]):
        die()
compile_model(model, out, quant="f16", resume=True, progress=progress)
"""


@pytest.mark.slow
def test_killed_at_one_place_after_the_other(tmp_path: Path, demo_model: Path) -> None:
    """SIGKILL leaves nothing to clean up in: what each run finds is what the last one had on its way to the disk."""
    model = tiny_checkpoint("olmoe", tmp_path / "model", demo_model / "tokenizer.json")
    whole = compile_model(model, tmp_path / "whole", quant="f16")
    out = tmp_path / "out"

    def run(place: str, count: int) -> int:
        command = [sys.executable, "-c", KILLED, str(model), str(out), str(whole), place, str(count)]
        return subprocess.run(command, timeout=120, check=False).returncode

    # (where, at which time that it comes by, records that are whole then). Padding is a write of its own: the third is the second record.
    places = [
        ("kernels", 1, 0),
        ("dense", 2, 0),
        ("half a record", 3, 1),
        ("record before its line", 4, 4),
        ("experts", 3, 7),
        ("half a record", 5, 9),
        ("copied file", 2, 9),
        ("experts", 7, 16),
        ("copied file", 3, 16),
        ("rename", 1, 0),  # the journal is gone by then
    ]
    for place, count, records in places:
        assert run(place, count) == -signal.SIGKILL, place
        assert not out.exists()
        journal = tmp_path / ".out.cfmoe-part" / "records.journal"
        noted = len(journal.read_text().splitlines()) - 1 if journal.exists() else 0
        assert noted == records, place
    assert run("nowhere", 1) == 0
    assert contents(out) == contents(whole)
    assert sorted(os.listdir(tmp_path)) == ["model", "out", "whole"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_goes_on(number: signal.Signals, tmp_path: Path, demo_model: Path) -> None:
    model = tiny_checkpoint("olmoe", tmp_path / "model", demo_model / "tokenizer.json")
    out, part = tmp_path / "out", tmp_path / ".out.cfmoe-part"
    command = [sys.executable, "-m", "cfmoe.cli", "compile", str(model), "--out", str(out), "--quant", "f16", "--resume"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (part / "lib").exists() and time.monotonic() < deadline:  # the kernels take seconds more
        time.sleep(0.001)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and "Traceback" not in errors
    assert part.exists() and not out.exists()
    assert subprocess.run(command, stdout=subprocess.DEVNULL, timeout=120, check=False).returncode == 0
    assert contents(out) == contents(compile_model(model, tmp_path / "whole", quant="f16"))
    assert not part.exists()

"""The artifact reader: what is missing, damaged, cut short or of another version is one line with file, value and remedy."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import artifacts
from cfmoe.artifact import Artifact
from cfmoe.artifact.writer import seal
from cfmoe.errors import CFMoEError


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return artifacts.write(tmp_path / "a")


def message(path: Path) -> str:
    with pytest.raises(CFMoEError) as caught:
        Artifact.open(path).verify()
    text = str(caught.value)
    assert "\n" not in text
    return text


def edit_manifest(artifact: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the manifest and seals it again, so that only the change is wrong."""
    path = artifact / "manifest.json"
    value = json.loads(path.read_text())
    del value["xxh3_64"]
    change(value)
    path.write_bytes(seal(value))


def edit_index(artifact: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = artifact / "index.json"
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))
    edit_manifest(artifact, lambda manifest: manifest["files"]["index.json"].update(size=path.stat().st_size))


def test_no_directory(tmp_path: Path) -> None:
    assert "does not exist; give an artifact directory" in message(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    assert "is a file; give an artifact directory" in message(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert "no artifact, it has no manifest.json" in message(tmp_path / "empty")


@pytest.mark.parametrize("name", ["manifest.json", "index.json", "weights.bin", "experts.bin", "lib/x/plan.json", "tokenizer.json"])
def test_missing_and_cut_short(artifact: Path, name: str) -> None:
    data = (artifact / name).read_bytes()
    (artifact / name).write_bytes(data[:-1])
    assert f"{artifact / name} " in message(artifact)
    (artifact / name).write_bytes(data + b" ")
    assert f"{artifact / name} " in message(artifact)
    (artifact / name).unlink()
    expected = "no artifact, it has no manifest.json" if name == "manifest.json" else f"{artifact / name}: no such file"
    assert expected in message(artifact)


@pytest.mark.parametrize("name", ["manifest.json", "index.json", "weights.bin", "experts.bin", "lib/x/kernels.so"])
def test_flipped_bit(artifact: Path, name: str) -> None:
    data = bytearray((artifact / name).read_bytes())
    data[len(data) // 2] ^= 0x10
    (artifact / name).write_bytes(data)
    assert str(artifact / name) in message(artifact)


def test_another_version(artifact: Path) -> None:
    edit_manifest(artifact, lambda manifest: manifest.update(format_version=2))
    assert re.search(r"manifest\.json has format version 2, this cfmoe reads version 1; compile the model again", message(artifact))


def test_another_format(artifact: Path) -> None:
    edit_manifest(artifact, lambda manifest: manifest.update(format="zip"))
    assert "is not the manifest of a CFMoE artifact: format is 'zip'" in message(artifact)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("num_layers", 0, "model.num_layers is 0, not between 1 and"),
        ("num_layers", True, "model.num_layers is True, not an integer"),
        ("top_k", 4, "model.top_k is 4, not between 1 and 3"),
        ("moe_layers", [0, 2], "model.moe_layers[1] is 2, not between 0 and 1"),
        ("name", None, "model.name is None, not a text"),
        ("eos_token_ids", 0, "model.eos_token_ids is int, not a list"),
        ("router", [], "model.router is not a JSON object"),
    ],
)
def test_wrong_field(artifact: Path, field: str, value: object, expected: str) -> None:
    edit_manifest(artifact, lambda manifest: manifest["model"].update({field: value}))
    assert expected in message(artifact)


def test_file_outside(artifact: Path) -> None:
    edit_manifest(artifact, lambda manifest: manifest["files"].update({"../x": manifest["files"]["weights.bin"]}))
    assert "files names '../x', which is not inside the artifact" in message(artifact)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda index: index["weights"][0].update(offset=5000), "weights[0].offset is 5000, not between 0 and 4096"),
        (lambda index: index["weights"][1].update(size=4096), "weights[1].size is 4096, not between 1 and 3904"),
        (lambda index: index["weights"][1].update(offset=100), "weights[1].offset is 100, not a multiple of 64"),
        (lambda index: index["experts"].update(experts=4), "experts.experts is 4, not 3"),
        (lambda index: index["experts"].update(record_stride=32768), "experts.record_stride makes 196608 bytes, experts.bin has 98304"),
        (lambda index: index["experts"]["xxh3_64"][1].pop(), "experts.xxh3_64 is not a table of 2 x 3 digests"),
        (lambda index: index["experts"]["sections"]["down"].update(size=97), "experts.sections.down.size is 97, not between 1 and 96"),
        (lambda index: index.pop("weights"), "weights is missing"),
    ],
)
def test_wrong_index(artifact: Path, change: Callable[[dict[str, Any]], object], expected: str) -> None:
    edit_index(artifact, change)
    assert expected in message(artifact)


def test_edited_manifest_breaks_its_seal(artifact: Path) -> None:
    path = artifact / "manifest.json"
    path.write_text(path.read_text().replace('"tiny"', '"huge"'))
    assert "does not match its seal" in message(artifact)


def test_deep_json_is_refused(artifact: Path) -> None:
    (artifact / "manifest.json").write_text("[" * 100_000)
    assert "is damaged or cut short" in message(artifact)

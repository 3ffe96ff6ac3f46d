"""Random checkpoints: the tensors that transformers would save, read back whole; routing that is as local as asked for."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from cfmoe.compile import named_configs, random_checkpoint
from cfmoe.compile.checkpoint import Checkpoint
from cfmoe.compile.convert import Converter
from cfmoe.compile.decoder_config import Quantisation
from cfmoe.compile.families import resolve
from cfmoe.compile.random_checkpoint import Tensor, make_random, pieces, tensors
from cfmoe.errors import CFMoEError
from support import Cli, error_line
from tiny_families import TINY, tiny_checkpoint

SMALL: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "vocab_size": 300,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "intermediate_size": 96,
    "mlp_only_layers": [1],
    "max_position_embeddings": 512,
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    gpt_oss = {
        "model_type": "gpt_oss",
        "num_local_experts": 8,
        "sliding_window": 40,
        "quantization_config": {"quant_method": "mxfp4"},
    }
    monkeypatch.setitem(named_configs.CONFIGS, "small", SMALL)
    monkeypatch.setitem(named_configs.CONFIGS, "small-oss", SMALL | gpt_oss)


@pytest.mark.parametrize("case", sorted(TINY))
def test_the_tensors_are_those_that_transformers_saves(case: str, tmp_path: Path, demo_model: Path) -> None:
    model = tiny_checkpoint(case, tmp_path / "model", demo_model / "tokenizer.json")
    with safe_open(model / "model.safetensors", "numpy") as reader:
        saved = {name: tuple(reader.get_slice(name).get_shape()) for name in reader.keys()}  # noqa: SIM118 (not a mapping)
    config, names = resolve(json.loads((model / "config.json").read_text()), "config.json")
    assert {tensor.name: tensor.shape for tensor in tensors(config, names, packed=False)} == saved


@pytest.mark.parametrize("name", sorted(named_configs.CONFIGS))
def test_public_configurations_resolve(name: str) -> None:
    config, names = resolve(random_checkpoint.configuration(name, None), name)
    every = list(tensors(config, names, packed=False))
    billions = {
        "olmoe-1b-7b": 6.92,
        "deepseek-moe-16b": 16.4,
        "deepseek-v2-lite": 15.7,
        "qwen1.5-moe-a2.7b": 14.3,
        "qwen3-30b-a3b": 30.5,
        "mixtral-8x7b": 46.7,
        "gpt-oss-20b": 20.9,
    }[name]
    assert sum(tensor.count for tensor in every) / 1e9 == pytest.approx(billions, rel=0.01)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", ["small", "small-oss"])
def test_a_checkpoint_converts_whole(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_checkpoint, "_SHARD_BYTES", 100_000)
    facts = make_random(name, tmp_path / "model", seed=3)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    checkpoint = Checkpoint(tmp_path / "model")
    config, names = resolve(checkpoint.config, "config.json")
    converter = Converter(checkpoint, config, names, Quantisation.named("f32"))
    dense = dict(converter.dense_weights())
    assert dense["embedding"].std() == pytest.approx(1.0, rel=0.15)  # 300 columns of 320
    record = converter.expert_record(config.moe_layers[0], 7).view(np.float32)
    weights = record[record != 0]
    assert weights.std() == pytest.approx(0.02, rel=0.25)
    again = make_random(name, tmp_path / "again", seed=3)
    assert again == facts
    for path in (tmp_path / "model").iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
    make_random(name, tmp_path / "again", layers=1, seed=4, force=True)
    assert Checkpoint(tmp_path / "again").config["num_hidden_layers"] == 1


@pytest.mark.usefixtures("small")
def test_the_tokenizer_has_a_text_for_every_id(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    make_random("small", tmp_path / "model")
    tokenizer = Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json"))
    text = "Zwölf naïve Boxkämpfer\n\t🙂"
    ids = tokenizer.encode(text).ids
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([299]) == "<299>"


def test_locality_is_what_embeddings_have_in_common() -> None:
    def similarity(locality: float) -> float:
        tensor = Tensor("e", (400, 256), fill="embedding")
        rows = np.concatenate(list(pieces(tensor, locality, (1,)))).astype(np.float32).reshape(tensor.shape)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        return float((rows[1:] * rows[:-1]).sum(1).mean())

    for locality in (0.0, 0.5, 0.9):
        assert similarity(locality) == pytest.approx(locality, abs=0.05)


def test_values_do_not_depend_on_the_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = Tensor("w", (70, 64))
    whole = np.concatenate(list(pieces(tensor, 0.0, (1,))))
    monkeypatch.setattr(random_checkpoint, "_PIECE", 64 * 9)
    parts = list(pieces(tensor, 0.0, (1,)))
    assert len(parts) == 8
    assert whole.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(np.concatenate(parts), whole)


@pytest.mark.usefixtures("small")
def test_what_goes_wrong_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_what: str, done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_random("small", tmp_path / "model", progress=interrupt)
    with monkeypatch.context() as patch:
        patch.setattr(random_checkpoint.shutil, "disk_usage", lambda _path: SimpleNamespace(free=1 << 20))
        with pytest.raises(CFMoEError, match=r"0.0 GB are free; use --layers, or another place"):
            make_random("small", tmp_path / "model")
    for options, message in (
        ({"layers": 4}, "--layers 4 is out of range; small has 3"),
        ({"locality": 1.0}, "--locality 1 is out of range"),
    ):
        with pytest.raises(CFMoEError, match=message):
            make_random("small", tmp_path / "model", **options)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    with pytest.raises(CFMoEError, match="is something else; --force replaces random checkpoints only"):
        make_random("small", tmp_path / "mine", force=True)


def test_an_unknown_name_lists_those_that_are_known(cli: Cli) -> None:
    message = error_line(cli("make-random", "gpt-5", "--out", "x"))
    assert "gpt-5 is not known; known are deepseek-moe-16b, deepseek-v2-lite, gpt-oss-20b, mixtral-8x7b, olmoe-1b-7b, qwen" in message

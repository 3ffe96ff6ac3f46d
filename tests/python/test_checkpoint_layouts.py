"""Checkpoints in the layouts that families use: the same artifact from each, and clear errors for what is wrong with one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cfmoe.compile import compile_model
from cfmoe.compile.checkpoint import Checkpoint
from cfmoe.compile.convert import Converter
from cfmoe.compile.decoder_config import Quantisation
from cfmoe.compile.expert_weights import mxfp4
from cfmoe.compile.families import resolve
from cfmoe.compile.footprint import footprint_of_checkpoint
from cfmoe.errors import CFMoEError
from tiny_families import TINY, tiny_checkpoint

Tensors = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory, demo_model: Path) -> Path:
    return tiny_checkpoint("qwen3_moe", tmp_path_factory.mktemp("qwen3") / "model", demo_model / "tokenizer.json")


def converted(model: Path) -> Tensors:
    """Every tensor and record that an artifact of `model` would hold, preset f16."""
    checkpoint = Checkpoint(model)
    config, names = resolve(checkpoint.config, str(model / "config.json"))
    converter = Converter(checkpoint, config, names, Quantisation.named("f16"))
    tensors = dict(converter.dense_weights())
    for layer in config.moe_layers:
        tensors |= {f"expert {layer} {e}": converter.expert_record(layer, e) for e in range(config.num_experts)}
    return tensors


def assert_same(model: Path, other: Path) -> None:
    expected, found = converted(model), converted(other)
    assert list(found) == list(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def rewritten(model: Path, out: Path, change: Callable[[Tensors], Tensors]) -> Path:
    shutil.copytree(model, out)
    save_file({k: np.ascontiguousarray(v) for k, v in change(load_file(out / "model.safetensors")).items()}, out / "model.safetensors")
    return out


def fused(tensors: Tensors) -> Tensors:
    """Stacks over the experts, as transformers holds them in memory."""
    out = {name: value for name, value in tensors.items() if ".experts." not in name}
    for layer in (0, 1):
        base = f"model.layers.{layer}.mlp.experts"
        if f"{base}.0.up_proj.weight" not in tensors:
            continue

        def part(name: str, base: str = base) -> list[np.ndarray]:
            return [tensors[f"{base}.{e}.{name}_proj.weight"] for e in range(8)]

        out[f"{base}.gate_up_proj"] = np.stack([np.concatenate(pair) for pair in zip(part("gate"), part("up"), strict=True)])
        out[f"{base}.down_proj"] = np.stack(part("down"))
    return out


def test_fused_and_separate_experts_are_the_same_model(qwen3: Path, tmp_path: Path) -> None:
    other = rewritten(qwen3, tmp_path / "fused", fused)
    assert "model.layers.0.mlp.experts.gate_up_proj" in Checkpoint(other)
    assert_same(qwen3, other)


def test_shards_are_one_checkpoint(qwen3: Path, tmp_path: Path) -> None:
    other = tmp_path / "sharded"
    shutil.copytree(qwen3, other)
    tensors = load_file(other / "model.safetensors")
    (other / "model.safetensors").unlink()
    weight_map = {name: f"model-{i % 3}.safetensors" for i, name in enumerate(sorted(tensors))}
    for shard in set(weight_map.values()):
        save_file({name: tensors[name] for name, file in weight_map.items() if file == shard}, other / shard)
    assert_same(qwen3, other)  # without an index
    (other / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_same(qwen3, other)


FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def test_mxfp4_is_read_as_transformers_reads_it() -> None:
    import torch
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    rng = np.random.default_rng(1)
    blocks = rng.integers(0, 256, (2, 6, 3, 16), np.uint8)
    scales = rng.integers(110, 140, (2, 6, 3), np.uint8)
    expected = convert_moe_packed_tensors(torch.from_numpy(blocks), torch.from_numpy(scales), dtype=torch.float32)
    for expert in range(2):
        np.testing.assert_array_equal(mxfp4(blocks[expert], scales[expert]), expected[expert].numpy().T)


def test_experts_in_mxfp4_are_those_they_stand_for(tmp_path: Path, demo_model: Path) -> None:
    model = tiny_checkpoint("gpt_oss", tmp_path / "model", demo_model / "tokenizer.json")
    rng = np.random.default_rng(2)

    def packed(tensors: Tensors, plain: bool) -> Tensors:
        out = dict(tensors)
        for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
            experts, inputs, outputs = tensors[name].shape
            codes = rng.integers(0, 16, (experts, outputs, inputs), np.uint8)
            scales = rng.integers(120, 126, (experts, outputs, inputs // 32), np.uint8)
            del out[name]
            if plain:
                values = FP4[codes] * np.exp2(scales.astype(np.float32) - 127).repeat(32, axis=2)
                out[name] = values.transpose(0, 2, 1)
            else:
                pairs = codes.reshape(experts, outputs, -1, 16, 2)
                out |= {f"{name}_blocks": pairs[..., 0] | pairs[..., 1] << 4, f"{name}_scales": scales}
        return out

    plain = rewritten(model, tmp_path / "plain", lambda t: packed(t, True))
    rng = np.random.default_rng(2)
    other = rewritten(model, tmp_path / "mxfp4", lambda t: packed(t, False))
    assert "model.layers.1.mlp.experts.down_proj" not in Checkpoint(other)
    assert_same(plain, other)


@pytest.mark.parametrize("case", sorted(TINY))
def test_the_planner_knows_the_sizes_of_every_family(case: str, tmp_path: Path, demo_model: Path) -> None:
    model = tiny_checkpoint(case, tmp_path / "model", demo_model / "tokenizer.json")
    checkpoint = Checkpoint(model)
    config, names = resolve(checkpoint.config, str(model / "config.json"))
    converter = Converter(checkpoint, config, names, Quantisation.named("f32"))
    estimate = footprint_of_checkpoint(model, "f32", context_size=512)
    assert estimate.record_bytes == converter.expert_record(config.moe_layers[0], 0).nbytes
    assert estimate.weights_bytes == pytest.approx(sum(array.nbytes for _, array in converter.dense_weights()), rel=0.05)
    key_and_value = {"deepseek_v2": 96 + 32, "olmoe": 32 + 32}.get(TINY[case][0], 2 * config.head_dim)
    assert estimate.kv_bytes == 2 * config.num_kv_heads * key_and_value * 512 * 4


def drop(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {k: v for k, v in tensors.items() if k != name}


def replace(name: str, value: np.ndarray) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: value}


EXPERT = "model.layers.0.mlp.experts.3.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop(EXPERT), f"tensor {EXPERT} is missing; the checkpoint is incomplete or of another family"),
        (drop("model.norm.weight"), "tensor model.norm.weight is missing"),
        (replace(EXPERT, np.zeros((32, 96), np.float32)), f"tensor {EXPERT} has shape [32, 96], but config.json implies [32, 64]"),
        (replace("model.norm.weight", np.zeros(64, np.int32)), "tensor model.norm.weight has type I32; supported here: F32, F16, BF16"),
    ],
    ids=["no expert", "no norm", "shape", "type"],
)
def test_a_tensor_that_is_wrong_is_one_line(qwen3: Path, tmp_path: Path, change: Callable[[Tensors], Tensors], message: str) -> None:
    with pytest.raises(CFMoEError) as refused:
        converted(rewritten(qwen3, tmp_path / "model", change))
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_damaged_and_pickled_checkpoints_are_refused(qwen3: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(qwen3, damaged)
    data = (damaged / "model.safetensors").read_bytes()
    (damaged / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(CFMoEError, match="is damaged or not a safetensors file"):
        converted(damaged)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    shutil.copy(qwen3 / "config.json", pickled)
    (pickled / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    with pytest.raises(CFMoEError, match=r"pytorch_model\.bin is a pickle, which is never read: convert it to safetensors"):
        compile_model(pickled, tmp_path / "artifact")
    assert not (tmp_path / "artifact").exists()
    index = tmp_path / "index"
    shutil.copytree(qwen3, index)
    for place in ("../model.safetensors", 7):
        (index / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": place}}))
        with pytest.raises(CFMoEError, match="weight_map must map tensor names to file names of the same directory"):
            converted(index)

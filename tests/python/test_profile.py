"""Profiling: what is recorded of padded batches is what each window alone gives; checkpoints that cannot be used; the command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cfmoe.errors import CFMoEError
from cfmoe.trace import Trace, window_segments
from cfmoe.trace.metrics import locality
from cfmoe.tune.checkpoint import load_model, load_tokenizer, pick_device
from cfmoe.tune.profile import profile, read_tokens
from cfmoe.tune.routers import find_moe_layers
from moe_models import EXPERTS, TOP_K, VOCABULARY, random_tokens, tiny_model
from support import Cli, error_line

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_thread")


def tokens(count: int) -> list[int]:
    return random_tokens(1, count)[0].tolist()


def by_hand(model: Any, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Chosen experts as sets and scores of one window, computed from what the model itself gives out."""
    with torch.no_grad():
        output = model(torch.tensor([ids]), output_router_logits=True)
    logits = torch.stack([layer.reshape(len(ids), EXPERTS) for layer in output.router_logits], dim=1)
    scores = logits.sigmoid() if find_moe_layers(model)[0].score == "sigmoid" else logits.softmax(-1)
    return logits.topk(TOP_K).indices.numpy(), scores.numpy()


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_padding_is_no_token(family: str, batch_size: int) -> None:
    """23 tokens in windows of 9: the last has 5 and is padded where it runs beside another."""
    changes = {"n_group": 1, "topk_group": 1} if family == "deepseek_v3" else {}
    model = tiny_model(family, **changes)
    ids = tokens(23)
    trace = profile(model, ids, window=9, prompt_tokens=4, batch_size=batch_size, scores=True)
    assert trace.segments == window_segments(9, 4) * 2 + window_segments(5, 4)
    assert (trace.tokens, trace.experts, trace.top_k, trace.layers) == (23, EXPERTS, TOP_K, len(find_moe_layers(model)))
    assert trace.scores is not None
    for start in range(0, 23, 9):
        chosen, scores = by_hand(model, ids[start : start + 9])
        part = slice(start, start + len(chosen))
        np.testing.assert_array_equal(trace.ids[part], chosen)
        np.testing.assert_allclose(trace.scores[part] / 65535, scores, atol=2e-5)
    assert (trace.chunk_size, trace.slots, trace.policy) == (0, 0, "")


def test_best_expert_comes_first() -> None:
    """DeepSeek's routers do not sort what they choose; the trace does."""
    trace = profile(tiny_model("deepseek_v2", num_experts_per_tok=4), tokens(40), window=40, prompt_tokens=0, scores=True)
    assert trace.scores is not None
    ordered = np.take_along_axis(trace.scores, trace.ids.astype(np.intp), axis=-1).astype(int)
    assert (np.diff(ordered, axis=-1) <= 0).all()


def test_only_ids_without_scores() -> None:
    model = tiny_model("mixtral")
    bare = profile(model, tokens(12), 6, 3)
    assert bare.scores is None
    np.testing.assert_array_equal(bare.ids, profile(model, tokens(12), 6, 3, scores=True).ids)


def test_models_that_no_trace_holds() -> None:
    model = tiny_model("mixtral")
    with pytest.raises(CFMoEError, match=rf"gives token {VOCABULARY}, but the model knows {VOCABULARY}; use the tokenizer"):
        profile(model, [3, VOCABULARY], 6, 3)
    with pytest.raises(CFMoEError, match="a --window of 65 tokens is longer than the model's context of 64; use at most 64"):
        profile(model, tokens(5), 65, 3)
    model.model.layers[0].mlp.gate.top_k = 3
    with pytest.raises(CFMoEError, match=r"layers differ \(top-2 of 8, top-3 of 8\)"):
        profile(model, tokens(5), 6, 3)


def test_tokens_of_a_long_text_are_those_of_its_beginning(tmp_path: Path, demo_model: Path) -> None:
    """The text is read as far as needed only, but cut where that changes no wanted token."""
    tokenizer = load_tokenizer(demo_model)
    text = "Wörter – " + "the standard library has a module of its own. " * 400 + "a" * 3000
    path = tmp_path / "a.txt"
    path.write_text(text)
    whole = tokenizer.encode(text, add_special_tokens=False).ids
    for limit in (1, 50, 2000, len(whole) - 1, len(whole), len(whole) + 1000):
        assert read_tokens(path, tokenizer, limit) == whole[:limit]
    spaces = tmp_path / "b.txt"
    spaces.write_text(" " * 5000 + "end")  # few tokens for many bytes
    assert read_tokens(spaces, tokenizer, 100) == tokenizer.encode(spaces.read_text(), add_special_tokens=False).ids[:100]
    (tmp_path / "c.txt").write_text("")
    with pytest.raises(CFMoEError, match=r"c\.txt has no text; give a file with some"):
        read_tokens(tmp_path / "c.txt", tokenizer, 5)


def test_ecr_of_the_embedded_model(demo_model: Path, corpus_eval: Path) -> None:
    """Its card says .21 .20 .23 .41 .38 .43, of far more tokens."""
    ids = read_tokens(corpus_eval, load_tokenizer(demo_model), 3000)
    result = locality(profile(load_model(demo_model, CPU), ids, 512, 256, batch_size=2))
    assert result.ecr_per_layer == pytest.approx((0.21, 0.20, 0.23, 0.41, 0.38, 0.43), abs=0.05)


def edit_config(model: Path, **changes: Any) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | changes))


def test_checkpoints_that_cannot_be_used(tmp_path: Path, demo_model: Path) -> None:
    with pytest.raises(CFMoEError, match=r"nowhere has no config\.json; give the directory of a Hugging Face checkpoint"):
        load_model(tmp_path / "nowhere", CPU)
    with pytest.raises(CFMoEError, match=r"nowhere has no config\.json"):
        load_tokenizer(tmp_path / "nowhere")

    model = tmp_path / "model"
    shutil.copytree(demo_model, model)
    (model / "tokenizer.json").write_text("{}")
    with pytest.raises(CFMoEError, match=r"tokenizer\.json cannot be used: .*; fetch the checkpoint again"):
        load_tokenizer(model)

    edit_config(model, num_hidden_layers=7)
    with pytest.raises(CFMoEError, match=r"model: \d+ tensors are missing, model\.layers\.6\..* for one; fetch the checkpoint again"):
        load_model(model, CPU)

    edit_config(model, num_hidden_layers=6)
    data = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(CFMoEError, match="model cannot be opened"):
        load_model(model, CPU)

    (model / "model.safetensors").unlink()
    torch.save({"model.norm.weight": torch.ones(256)}, model / "pytorch_model.bin")
    with pytest.raises(CFMoEError, match="code and pickles of a checkpoint are never run"):
        load_model(model, CPU)


def test_code_of_a_checkpoint_is_not_run(tmp_path: Path, demo_model: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(demo_model, model)
    (model / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    edit_config(model, model_type="evil", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    with pytest.raises(CFMoEError) as caught:
        load_model(model, CPU)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_devices() -> None:
    assert pick_device("cpu") == CPU
    assert pick_device("auto").type in ("cpu", "cuda")
    for name in ("abacus", "cuda:99"):
        with pytest.raises(CFMoEError, match=f"device {name} cannot be used: .*; choose auto, cpu or a cuda device"):
            pick_device(name)


def test_command(cli: Cli, tmp_path: Path, demo_model: Path) -> None:
    data = tmp_path / "a.jsonl"
    data.write_text("\n".join(json.dumps({"text": f"Proposal {i}: add a statement to the language."}) for i in range(40)))
    out = tmp_path / "a.trace"
    arguments = ["--data", data, "--out", out, "--tokens", "100", "--window", "32", "--json"]
    result = cli("profile", demo_model, *arguments, "--prompt-tokens", "8")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    value = json.loads(result.stdout)
    trace = Trace.read(out)
    assert trace.segments == window_segments(32, 8) * 3 + window_segments(4, 8)
    assert (trace.tokens, trace.layers, trace.experts, trace.top_k) == (100, 6, 32, 4)
    facts = {"trace": str(out), "tokens": 100, "samples": 4, "layers": 6, "experts": 32, "top_k": 4, "window": 32, "prompt_tokens": 8}
    assert {name: value[name] for name in facts} == facts
    assert value["locality"]["all"]["ecr_per_layer"] == pytest.approx(locality(trace).ecr_per_layer)
    assert value["locality"]["decode"]["pairs"] == 3 * 24
    assert "exists; give --force to replace it" in error_line(cli("profile", demo_model, *arguments))


def test_command_refuses_what_it_cannot_do(cli: Cli, tmp_path: Path, demo_model: Path) -> None:
    data = tmp_path / "a.txt"
    data.write_text("text")
    out = tmp_path / "a.trace"

    def fail(model: Path, *arguments: str) -> str:
        line = error_line(cli("profile", model, "--data", data, "--out", out, *arguments))
        assert not out.exists()
        return line

    assert "--prompt-tokens 9 is more than the window of 8 tokens; use at most 8" in fail(
        demo_model, "--window", "8", "--prompt-tokens", "9"
    )
    dense = tmp_path / "dense"
    tiny_model("llama").save_pretrained(dense)
    shutil.copy(demo_model / "tokenizer.json", dense)
    assert "LlamaForCausalLM has no MoE layer" in fail(dense, "--window", "8")

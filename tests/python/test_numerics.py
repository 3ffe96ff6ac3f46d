"""Logits and perplexity of the engine against transformers, for the shipped models and for a small instance of every family."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cfmoe.compile import compile_model
from cfmoe.measure.perplexity import perplexity
from cfmoe.measure.text import read_text
from cfmoe.runtime import Engine, Tokenizer
from reference import reference_logits

Compiled = Callable[[Path, str], Path]


@pytest.fixture(params=["demo", "moe-63m"])
def model(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue("demo_model" if request.param == "demo" else "moe_63m")


def feed(artifact: Path, tokens: list[int], **options: Any) -> np.ndarray:
    with Engine(artifact, **options) as engine, engine.session() as session:
        return np.array(session.feed(tokens))


def text_tokens(artifact: Path, count: int) -> list[int]:
    text = "The committee adopted the proposal to add generic types, and the function now returns its old value. "
    return Tokenizer(artifact).encode(text * 40)[:count]


def test_f32_artifact_matches_transformers(model: Path, compiled: Compiled) -> None:
    artifact = compiled(model, "f32")
    tokens = text_tokens(artifact, 300)  # two prefill chunks
    expected = reference_logits(model, tokens)
    logits = feed(artifact, tokens)
    assert np.abs(logits - expected).max() <= 1e-3
    assert (logits.argmax(-1) == expected.argmax(-1))[:256].all()


def test_decode_program_gives_the_bits_of_prefill(demo_model: Path, compiled: Compiled) -> None:
    artifact = compiled(demo_model, "mixed")
    tokens = text_tokens(artifact, 40)
    with Engine(artifact) as engine, engine.session() as session:
        prefill = np.array(session.feed(tokens))
        session.reset()
        decode = np.array(session.feed(tokens, decode=True))
    np.testing.assert_array_equal(prefill, decode)


@pytest.mark.parametrize(("quant", "limit"), [("mixed", 1.01), ("q4", 1.022)])
def test_perplexity_of_quantised_artifacts(model: Path, quant: str, limit: float, compiled: Compiled, corpus_eval: Path) -> None:
    text = read_text(corpus_eval, 65536)

    def score(preset: str) -> float:
        artifact = compiled(model, preset)
        with Engine(artifact, context_size=512) as engine, engine.session() as session:
            return perplexity(session, Tokenizer(artifact).encode(text), 512, engine.model.prefill_chunk).perplexity

    assert score(quant) <= score("f32") * limit


TINY: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"moe_intermediate_size": 32, "num_experts": 8, "head_dim": 32, "norm_topk_prob": True, "mlp_only_layers": [1]},
    "qwen2_moe": {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 64, "num_experts": 8, "mlp_only_layers": []},
    "olmoe": {"num_experts": 8},
}


def tiny_checkpoint(family: str, directory: Path, tokenizer: Path) -> Path:
    """A random instance of `family`, made by transformers."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(7)
    config = AutoConfig.for_model(
        family,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_experts_per_tok=3,
        vocab_size=200,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        **TINY[family],
    )
    network = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif "gate" in name:
                parameter.mul_(20)  # routers that choose decisively: near ties would make the comparison a matter of rounding
    network.save_pretrained(directory)
    shutil.copy(tokenizer, directory / "tokenizer.json")
    return directory


@pytest.mark.parametrize("family", sorted(TINY))
def test_every_family_matches_transformers(family: str, tmp_path: Path, demo_model: Path) -> None:
    model = tiny_checkpoint(family, tmp_path / family, demo_model / "tokenizer.json")
    artifact = compile_model(model, tmp_path / "artifact", quant="f32", prefill_chunk=64)
    tokens = np.random.default_rng(3).integers(0, 200, 300).tolist()
    expected = reference_logits(model, tokens)
    assert np.abs(feed(artifact, tokens) - expected).max() <= 1e-3
    with Engine(artifact, memory_budget="25%") as engine, engine.session() as session:
        session.feed(tokens[:200])
        decoded = np.array(session.feed(tokens[200:], decode=True))
    assert np.abs(decoded - expected[200:]).max() <= 1e-3

"""Logits and perplexity of the engine against transformers, for the shipped models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cfmoe.measure.perplexity import perplexity
from cfmoe.measure.text import read_text
from cfmoe.runtime import Engine, Tokenizer
from reference import reference_logits

Compiled = Callable[[Path, str], Path]


@pytest.fixture(params=["demo", pytest.param("moe-63m", marks=pytest.mark.slow)])
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

"""Logits of the engine against transformers, for a small random instance of every family."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cfmoe.compile import compile_model
from cfmoe.runtime import Engine
from tiny_families import TINY, network_logits, random_tokens, tiny_checkpoint, tiny_network


@pytest.mark.parametrize("case", sorted(TINY))
def test_every_family_matches_transformers(case: str, tmp_path: Path, demo_model: Path) -> None:
    model = tiny_checkpoint(case, tmp_path / "model", demo_model / "tokenizer.json")
    artifact = compile_model(model, tmp_path / "artifact", quant="f32", prefill_chunk=64)
    tokens = random_tokens(300)
    expected = network_logits(tiny_network(case), tokens)
    assert expected.std() > 0.05  # something to be wrong about
    with Engine(artifact, memory_budget="50%") as engine, engine.session() as session:
        prefill = np.array(session.feed(tokens))  # five chunks
        session.reset()
        session.feed(tokens[:200])
        decode = np.array(session.feed(tokens[200:], decode=True))
    assert np.abs(prefill - expected).max() <= 1e-3
    np.testing.assert_array_equal(decode, prefill[200:])

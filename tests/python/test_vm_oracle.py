"""The engine against TVM's Relax VM, bit by bit.

Both run the same kernels, but the VM knows nothing of plan.json, its memory plan or the runtime's own steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from cfmoe.compile import compile_model
from cfmoe.runtime import Engine
from tiny_families import random_tokens, tiny_checkpoint
from vm_oracle import VmOracle

Compiled = Callable[[Path, str], Path]
FUSIONS = ("fuse_norm_quantise", "fuse_linear_residual")


def assert_same_bits(model: Path, artifact: Path, tokens: list[int], prompt: int, skip: Sequence[str] = ()) -> None:
    """Compares logits behind every token, the first `prompt` of them through prefill, the others through decode."""
    oracle = VmOracle(model, artifact, skip)
    assert prompt > oracle.chunk  # several chunks, the last of them partly filled
    with Engine(artifact, memory_budget="50%") as engine, engine.session() as session:
        prefill = np.array(session.feed(tokens[:prompt]))
        decode = np.array(session.feed(tokens[prompt:], decode=True))
    np.testing.assert_array_equal(prefill, oracle.prefill(tokens[:prompt]))
    np.testing.assert_array_equal(decode, oracle.decode(tokens[prompt:]))


@pytest.mark.parametrize(("quant", "skip"), [("mixed", ()), ("mixed", FUSIONS), ("f32", ())], ids=["mixed", "unfused", "f32"])
def test_engine_has_the_bits_of_the_vm(quant: str, skip: Sequence[str], demo_model: Path, compiled: Compiled) -> None:
    tokens = [(31 * i + 7) % 8000 + 10 for i in range(316)]
    assert_same_bits(demo_model, compiled(demo_model, quant), tokens, 300, skip)


# Together they call every kernel and every option of the router.
@pytest.mark.parametrize("case", ["deepseek_v2", pytest.param("gpt_oss", marks=pytest.mark.slow), "qwen2_moe"])
def test_families_have_the_bits_of_the_vm(case: str, tmp_path: Path, demo_model: Path) -> None:
    model = tiny_checkpoint(case, tmp_path / "model", demo_model / "tokenizer.json")
    artifact = compile_model(model, tmp_path / "artifact", quant="q4", prefill_chunk=64)
    assert_same_bits(model, artifact, random_tokens(108), 100)

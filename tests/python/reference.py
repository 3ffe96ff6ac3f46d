"""What transformers computes for a checkpoint: the reference of the numerical tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def reference_logits(model: Path, tokens: list[int]) -> np.ndarray:
    """fp32 logits [tokens, vocab]."""
    import torch
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        return network(torch.tensor([tokens])).logits[0].numpy()

"""Training text that the model writes itself: it is like what the model knows, and none of it is known by heart.

Distilled on documents that it was trained on, a model spends much of the quality term on words that the base knows by heart and that
matter nowhere else. On its own text the same locality costs less (docs/locality.md). Text of the
teacher for the student: Kim and Rush, Sequence-level knowledge distillation (arXiv:1606.07947); here it is sampled, not searched for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

OPENING = 16  # tokens of the data that a text begins with, so that it stays with the data's subjects

ProgressCallback = Callable[[str, int, int], None]


@torch.no_grad()
def own_text(
    model: Any,
    openings: Sequence[Sequence[int]],
    length: int,
    pad: int,
    batch: int,
    seconds: float | None = None,
    progress: ProgressCallback | None = None,
) -> list[list[int]]:
    """What `model` writes after `openings`, all of one number of tokens: as many texts of `length` tokens, drawn at temperature 1.

    It writes on over the end of a text. With `seconds`, no further batch is begun when they are over.
    """
    start, written = time.monotonic(), []
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "eos_token_id": None, "pad_token_id": pad}
    for first in range(0, len(openings), batch):
        part = torch.tensor([list(one) for one in openings[first : first + batch]], device=model.device)
        rest = length - part.shape[1]
        mask = torch.ones_like(part)
        out = model.generate(part, attention_mask=mask, min_new_tokens=rest, max_new_tokens=rest, use_cache=True, **options)
        written += out.tolist()
        if progress is not None:
            progress("writing", len(written), len(openings))
        if seconds is not None and time.monotonic() - start > seconds:
            break
    return written

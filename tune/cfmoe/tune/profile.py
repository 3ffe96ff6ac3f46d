"""Records a routing trace: runs a checkpoint over a text, window by window, and notes which experts each token goes to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch

from cfmoe.errors import CFMoEError
from cfmoe.measure.text import read_text
from cfmoe.trace import Trace, window_segments
from cfmoe.trace.trace import SCORE_ONE, id_type
from cfmoe.tune.routers import MoELayer, RouterRecorder, find_moe_layers

_BYTES_PER_TOKEN = 16  # the text read per wanted token at first; ordinary text has three to five
_LOOSE_TOKENS = 64  # so many at the end of a text that was cut may be other tokens than in the whole text


def read_tokens(path: Path, tokenizer: tokenizers.Tokenizer, limit: int) -> list[int]:
    """The first `limit` tokens of the text in `path`, or all where there are fewer. Raises CFMoEError where there is none."""
    size = limit * _BYTES_PER_TOKEN
    while True:
        text = read_text(path, size)
        ids = list(tokenizer.encode(text, add_special_tokens=False).ids)
        whole = len(text.encode()) < size - 4  # a character that did not fit was left out
        if whole or len(ids) >= limit + _LOOSE_TOKENS:
            break
        size *= 2
    if not ids:
        raise CFMoEError(f"{path} has no text; give a file with some")
    return ids[:limit]


def profile(
    model: Any,
    ids: Sequence[int],
    window: int,
    prompt_tokens: int,
    batch_size: int = 1,
    scores: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> Trace:
    """The trace of `model`, a causal language model of transformers, over `ids` cut into windows of `window` tokens, each a sample.

    The last window may be shorter. Of each window the first `prompt_tokens` tokens are prefill, the others decode: they are fed as they
    stand in the text, as if the model had written them. A batch of windows is padded on the right and its padding left out. The ids of
    a token are sorted by the router's score, best first, also where the family's router does not sort them. With `scores` the trace
    holds the scores of all experts.
    Raises CFMoEError where the model has no MoE layers, layers of different kinds, which no trace can hold, or a shorter context.
    """
    layers = _uniform(find_moe_layers(model))
    _check_context(model, window)
    _check_vocabulary(model, ids)
    windows = [ids[start : start + window] for start in range(0, len(ids), window)]
    chosen = np.empty((len(ids), len(layers), layers[0].top_k), id_type(layers[0].num_experts))
    probabilities = np.empty((len(ids), len(layers), layers[0].num_experts), np.uint16) if scores else None
    done = 0
    with torch.inference_mode(), RouterRecorder(layers) as recorder:
        for start in range(0, len(windows), batch_size):
            if progress is not None:
                progress("profiling", done, len(ids))
            batch = windows[start : start + batch_size]
            valid = _run(model, batch)
            count = int(valid.sum())
            for number, (layer, logits, routed) in enumerate(zip(layers, recorder.logits, recorder.ids, strict=True)):
                logits, routed = logits[valid].float(), routed[valid]
                order = logits.gather(1, routed).argsort(dim=1, descending=True, stable=True)
                chosen[done : done + count, number] = routed.gather(1, order).cpu().numpy()
                if probabilities is not None:
                    fixed = (_probabilities(layer, logits) * SCORE_ONE).round().to(torch.int32)
                    probabilities[done : done + count, number] = fixed.cpu().numpy()
            done += count
    if progress is not None:
        progress("profiling", done, len(ids))
    segments = tuple(segment for part in windows for segment in window_segments(len(part), prompt_tokens))
    return Trace(chosen, segments, layers[0].num_experts, probabilities)


def _uniform(layers: list[MoELayer]) -> list[MoELayer]:
    kinds = {(layer.num_experts, layer.top_k) for layer in layers}
    if len(kinds) > 1:
        listed = ", ".join(f"top-{top_k} of {experts}" for experts, top_k in sorted(kinds))
        raise CFMoEError(f"the model's MoE layers differ ({listed}), but a trace holds layers of one kind; profile another model")
    return layers


def _check_context(model: Any, window: int) -> None:
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(context, int) and window > context:
        raise CFMoEError(f"a --window of {window} tokens is longer than the model's context of {context}; use at most {context}")


def _check_vocabulary(model: Any, ids: Sequence[int]) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    if max(ids) >= rows:
        raise CFMoEError(f"tokenizer.json gives token {max(ids)}, but the model knows {rows}; use the tokenizer that belongs to it")


def _run(model: Any, batch: Sequence[Sequence[int]]) -> torch.Tensor:
    """Feeds the windows side by side; returns which of (window, position), in that order, are no padding."""
    longest = max(map(len, batch))
    tokens = torch.zeros((len(batch), longest), dtype=torch.int64)
    mask = torch.zeros((len(batch), longest), dtype=torch.int64)
    for row, part in enumerate(batch):
        tokens[row, : len(part)] = torch.tensor(part)
        mask[row, : len(part)] = 1
    tokens, mask = tokens.to(model.device), mask.to(model.device)
    try:
        model.base_model(input_ids=tokens, attention_mask=mask, use_cache=False)  # without the head: nobody wants its logits
    except torch.OutOfMemoryError as error:
        raise CFMoEError(f"{len(batch)} windows of {longest} tokens do not fit the device's memory; use a smaller --batch-size") from error
    return mask.reshape(-1).bool()


def _probabilities(layer: MoELayer, logits: torch.Tensor) -> torch.Tensor:
    if layer.score == "softmax":
        return logits.softmax(-1)
    if layer.score == "sigmoid":
        return logits.sigmoid()
    raise CFMoEError(f"{layer.router_name} scores its experts by {layer.score}, which no trace can hold; profile without scores")

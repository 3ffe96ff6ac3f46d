"""Evaluates a checkpoint, and beside it an adapter: answers, perplexity of the reference answers, locality and cache hit rates.

Routing is recorded over prompt and reference answer, so that base and adapter are compared on the same tokens; the prompt counts as
prefill, the answer as decode. The ECR of a model's own answers is reported beside each of them. Perplexity is that of the reference and
never of what the model wrote, which it always finds likely.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tokenizers
import torch
from torch import Tensor
from torch.nn import functional

from cfmoe.errors import CFMoEError
from cfmoe.trace import Trace, window_segments
from cfmoe.trace.metrics import locality
from cfmoe.trace.trace import SCORE_ONE, id_type
from cfmoe.tune.data import Tokens, collate
from cfmoe.tune.hits import hit_rates
from cfmoe.tune.locality import has_predecessor
from cfmoe.tune.routers import MoELayer, RouterRecorder, find_moe_layers
from cfmoe.tune.tasks import Example
from cfmoe.tune.trainer import shared_experts, wanted_positions

ProgressCallback = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Scored:
    """One sequence under one model."""

    index: int
    nats: float  # of its predicted tokens, summed
    predicted: int
    ids: np.ndarray  # (tokens, layers, top_k), best first
    scores: np.ndarray  # (tokens, layers, experts) uint16, as in a trace
    written: str | None = None  # the model's own answer
    written_ecr: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """What one model did with all sequences. `chr` has a row per policy, size and phase."""

    metrics: dict[str, float]
    ecr_per_layer: tuple[float, ...]
    chr: list[dict[str, Any]]
    scored: list[Scored]
    right: list[bool | None]


def evaluate(
    model: Any,
    sequences: Sequence[Tokens],
    examples: Sequence[Example] | None,
    tokenizer: tokenizers.Tokenizer,
    *,
    end: int | None,
    pad: int,
    new_tokens: int,
    batch_size: int,
    policies: Sequence[str] = (),
    sizes: Sequence[str] = ("25%", "50%", "75%"),
    shard: tuple[int, int] = (0, 1),
    gather: Callable[[list[Scored]], list[Scored]] | None = None,
    progress: ProgressCallback | None = None,
) -> Evaluation | None:
    """Runs `model` over `sequences`, and lets it answer the prompts of `examples` where given (one per sequence, new_tokens > 0).

    shard: (this process, processes); `gather` brings what all of them scored together, to the first one: the others get None.
    """
    layers = find_moe_layers(model)
    process, processes = shard
    mine = list(range(process, len(sequences), processes))
    scored = score(model, layers, sequences, mine, pad, batch_size, progress)
    if examples is not None and new_tokens:
        answers = write_answers(model, layers, sequences, mine, tokenizer, end, pad, new_tokens, batch_size, progress)
        scored = [
            Scored(one.index, one.nats, one.predicted, one.ids, one.scores, *answer) for one, answer in zip(scored, answers, strict=True)
        ]
    if gather is not None:
        scored = gather(scored)
    if process:
        return None
    scored.sort(key=lambda one: one.index)
    return summarise(scored, sequences, examples, layers[0].num_experts, policies, sizes, progress)


@torch.inference_mode()
def score(
    model: Any,
    layers: Sequence[MoELayer],
    sequences: Sequence[Tokens],
    indices: Sequence[int],
    pad: int,
    batch_size: int,
    progress: ProgressCallback | None = None,
) -> list[Scored]:
    """Nats of the tokens to be predicted, and the routing of all, for the sequences at `indices`."""
    result: list[Scored] = []
    with RouterRecorder(layers) as recorder:
        for start in range(0, len(indices), batch_size):
            part = indices[start : start + batch_size]
            batch = {key: value.to(model.device) for key, value in collate([[sequences[i]] for i in part], pad).items()}
            logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
            where = wanted_positions(batch["labels"])
            nats = torch.zeros(where.shape, dtype=torch.float64, device=logits.device)
            target = batch["labels"][:, 1:][where]
            nats[where] = functional.cross_entropy(logits[:, :-1][where].float(), target, reduction="none").double()
            ids, scores = _routing(layers, recorder, len(part))
            for row, index in enumerate(part):
                length = len(sequences[index].ids)
                routed = ids[:, row, :length].transpose(0, 1).cpu().numpy().astype(id_type(layers[0].num_experts))
                fixed = (scores[:, row, :length] * SCORE_ONE).round().to(torch.int32).transpose(0, 1).cpu().numpy().astype(np.uint16)
                result.append(Scored(index, nats[row].sum().item(), int(where[row].sum()), routed, fixed))
            if progress is not None:
                progress("scoring", len(result), len(indices))
    return result


def _routing(layers: Sequence[MoELayer], recorder: RouterRecorder, rows: int) -> tuple[Tensor, Tensor]:
    """(layers, rows, seq, top_k) best first, and (layers, rows, seq, experts) scores in [0, 1]."""
    ids, scores = [], []
    for layer, logits, routed in zip(layers, recorder.logits, recorder.ids, strict=True):
        order = logits.gather(1, routed).argsort(dim=1, descending=True, stable=True)
        ids.append(routed.gather(1, order))
        scores.append(logits.float().softmax(-1) if layer.score == "softmax" else logits.float().sigmoid())
    return torch.stack(ids).unflatten(1, (rows, -1)), torch.stack(scores).unflatten(1, (rows, -1))


@torch.inference_mode()
def write_answers(
    model: Any,
    layers: Sequence[MoELayer],
    sequences: Sequence[Tokens],
    indices: Sequence[int],
    tokenizer: tokenizers.Tokenizer,
    end: int | None,
    pad: int,
    new_tokens: int,
    batch_size: int,
    progress: ProgressCallback | None = None,
) -> list[tuple[str, float]]:
    """The model's own greedy answer to every prompt, and the ECR over prompt and answer; prompts of like length side by side."""
    answers: dict[int, tuple[str, float]] = {}
    by_length = sorted(indices, key=lambda i: sequences[i].answer)
    for start in range(0, len(by_length), batch_size):
        part = by_length[start : start + batch_size]
        prompts = [sequences[i].ids[: sequences[i].answer] for i in part]
        width = max(map(len, prompts))
        tokens = torch.tensor([[pad] * (width - len(one)) + one for one in prompts], device=model.device)
        mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in prompts], device=model.device)
        options = {"do_sample": False, "num_beams": 1, "pad_token_id": pad, "eos_token_id": end, "temperature": None, "top_p": None}
        out = model.generate(tokens, attention_mask=mask, max_new_tokens=new_tokens, use_cache=True, top_k=None, **options)
        written = [_until(row, end) for row in out[:, width:].tolist()]
        texts = tokenizer.decode_batch(written, skip_special_tokens=True)
        rates = _consistency(model, layers, [[*p, *w] for p, w in zip(prompts, written, strict=True)], pad)
        answers.update({i: (text.strip(), rate) for i, text, rate in zip(part, texts, rates, strict=True)})
        if progress is not None:
            progress("answering", len(answers), len(indices))
    return [answers[i] for i in indices]


def _until(tokens: list[int], end: int | None) -> list[int]:
    return tokens[: tokens.index(end)] if end is not None and end in tokens else tokens


def _consistency(model: Any, layers: Sequence[MoELayer], texts: Sequence[list[int]], pad: int) -> list[float]:
    """The ECR over each of `texts`; 0 where a text is one token."""
    batch = {key: value.to(model.device) for key, value in collate([[Tokens(ids, 1)] for ids in texts], pad).items()}
    with RouterRecorder(layers) as recorder:
        model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
        routed = [one.unflatten(0, (len(texts), -1)) for one in recorder.ids]
    pairs = has_predecessor(batch["segments"]).sum(1).clamp_min(1)
    sums = [
        shared_experts([one[row : row + 1].flatten(0, 1) for one in routed], batch["segments"][row : row + 1]) for row in range(len(texts))
    ]
    return (torch.stack(sums).mean(1) / pairs).tolist()


def summarise(
    scored: Sequence[Scored],
    sequences: Sequence[Tokens],
    examples: Sequence[Example] | None,
    experts: int,
    policies: Sequence[str],
    sizes: Sequence[str],
    progress: ProgressCallback | None = None,
) -> Evaluation:
    """The numbers over all sequences."""
    trace = Trace(
        np.concatenate([one.ids for one in scored]),
        tuple(segment for one in scored for segment in window_segments(len(one.ids), sequences[one.index].answer)),
        experts,
        np.concatenate([one.scores for one in scored]),
    )
    predicted = sum(one.predicted for one in scored)
    if not predicted:
        raise CFMoEError("no token of the data is to be predicted; give longer texts")
    nats = sum(one.nats for one in scored) / predicted
    found = locality(trace)
    metrics: dict[str, float] = {"nats_per_token": nats, "perplexity": math.exp(nats), "predicted_tokens": predicted}
    metrics |= {name: value for name, value in (("ecr", found.ecr), ("gds", found.gds), ("lal", found.lal)) if value is not None}
    metrics |= _by_domain(scored, sequences)
    right: list[bool | None] = [None] * len(scored)
    if examples is not None and scored[0].written is not None:
        right = [examples[one.index].is_right(one.written or "") for one in scored]
        if all(one is not None for one in right):
            metrics["accuracy"] = sum(map(bool, right)) / len(right)
        else:
            metrics |= rouge([(examples[one.index].answer, one.written or "") for one in scored])
        metrics["ecr_written"] = sum(one.written_ecr or 0.0 for one in scored) / len(scored)
    rates = hit_rates(trace, policies, sizes, progress)
    return Evaluation(metrics, found.ecr_per_layer or (), rates, list(scored), right)


def _by_domain(scored: Sequence[Scored], sequences: Sequence[Tokens]) -> dict[str, float]:
    domains = sorted({sequences[one.index].domain for one in scored})
    if domains == [""]:
        return {}
    result = {}
    for domain in domains:
        own = [one for one in scored if sequences[one.index].domain == domain and one.predicted]
        if own:
            result[f"nats_per_token {domain}"] = sum(one.nats for one in own) / sum(one.predicted for one in own)
    return result


def rouge(pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Mean F-measures of ROUGE-1, ROUGE-2 and ROUGE-L over (reference, written), with stemming: Lin, ROUGE (2004)."""
    from rouge_score.rouge_scorer import RougeScorer

    kinds = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(kinds, use_stemmer=True)
    found = [scorer.score(reference, written) for reference, written in pairs]
    return {kind: sum(one[kind].fmeasure for one in found) / len(found) for kind in kinds}

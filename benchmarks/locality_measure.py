"""What benchmarks/locality.py trains and measures on: rows of tokens, exact LRU curves, and the sizes of cache that hit alike."""

from __future__ import annotations

import json
import lzma
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from cfmoe.tune.routers import RouterRecorder

UNTOUCHED = ("proposals", "literature")
VALIDATION = " (validation)"  # behind a domain's name: the documents that choices are made by


# --- data -------------------------------------------------------------------------------------------------------------------------


def tokenise(path: Path, model: Path, kept: Path) -> dict[str, np.ndarray]:
    """The tokens of every domain, documents ended by token 0, as one stream each; kept as an .npz for the next process."""
    if not kept.exists():
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        texts: dict[str, list[str]] = {}
        with lzma.open(path, "rt", encoding="utf-8") as file:
            for line in file:
                row = json.loads(line)
                texts.setdefault(row["domain"], []).append(row["text"])
        streams = {}
        for domain, documents in texts.items():
            encoded = tokenizer.encode_batch_fast(documents, add_special_tokens=False)
            streams[domain] = np.concatenate([np.array([*one.ids, 0], np.uint16) for one in encoded])
        beside = kept.with_suffix(f".{os.getpid()}.tmp.npz")
        np.savez(beside, **streams)
        os.replace(beside, kept)
    with np.load(kept) as data:
        return {name: data[name] for name in data.files}


def halves(stream: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of every second document, from the first and from the second; a document ends with token 0."""
    documents = np.split(stream, np.flatnonzero(stream == 0)[:-1] + 1)
    empty = stream[:0]
    return np.concatenate([empty, *documents[::2]]), np.concatenate([empty, *documents[1::2]])


@dataclass
class Rows:
    """Sequences of one length: tokens, which of them are to be predicted, and which are no padding; padding comes last."""

    tokens: Tensor  # (rows, length) int32
    wanted: Tensor  # (rows, length) bool
    real: Tensor  # (rows, length) bool

    def __len__(self) -> int:
        return len(self.tokens)

    def take(self, which: slice | Tensor, device: str) -> tuple[Tensor, Tensor, Tensor]:
        return self.tokens[which].to(device, torch.int64), self.wanted[which].to(device), self.real[which].to(device)

    def to(self, device: str) -> Rows:
        return Rows(self.tokens.to(device), self.wanted.to(device), self.real.to(device))


def text_rows(streams: Sequence[np.ndarray], length: int, limit: int | None = None) -> Rows:
    """Whole rows cut from token streams; what does not fill a row is left out."""
    cut = [stream[: len(stream) // length * length].astype(np.int32).reshape(-1, length)[:limit] for stream in streams]
    tokens = torch.from_numpy(np.concatenate(cut))
    everything = torch.ones(tokens.shape, dtype=torch.bool)
    return Rows(tokens, everything, everything)


def question_rows(path: Path, model: Path, length: int) -> Rows:
    """A question and its answer per row, of which the answer is to be predicted; longer ones are left out."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    tokens, wanted, real = [], [], []
    for line in lines:
        prompt = tokenizer.encode(f"Question: {line['question']}\nAnswer:", add_special_tokens=False).ids
        answer = [*tokenizer.encode(" " + line["answer"], add_special_tokens=False).ids, 0]
        rest = length - len(prompt) - len(answer)
        if rest >= 0:
            tokens.append([*prompt, *answer, *[0] * rest])
            wanted.append([False] * len(prompt) + [True] * len(answer) + [False] * rest)
            real.append([True] * (length - rest) + [False] * rest)
    return Rows(torch.tensor(tokens, dtype=torch.int32), torch.tensor(wanted), torch.tensor(real))


# --- measuring --------------------------------------------------------------------------------------------------------------------


def lru_hits(
    ids: Tensor,  # (layers, batch, seq, top_k)
    real: Tensor,  # (batch, seq) bool, False for padding after the end
    experts: int,
) -> Tensor:  # (layers * experts + 1,) hits at every cache size, summed over the batch
    """Exact hits of one LRU cache of all layers at every size, cold at the start of a row, by stack distances (Mattson et al., 1970).

    A (token, layer) is a group: what is resident at its start hits, as in the engine.
    """
    layers, batch, seq, top_k = ids.shape
    order = torch.arange(seq * layers * top_k, device=ids.device).view(seq, layers, top_k).transpose(0, 1) + 1
    used = torch.zeros(layers, batch, seq, experts, dtype=torch.int32, device=ids.device)
    used.scatter_(-1, ids, order[:, None].expand(-1, batch, -1, -1).int())
    after = used.cummax(2).values
    before = functional.pad(after[:, :, :-1], (0, 0, 1, 0))
    histogram = torch.zeros(layers * experts + 1, dtype=torch.int64, device=ids.device)
    for layer in range(layers):
        state = torch.cat([after[:layer], before[layer:]]).permute(1, 2, 0, 3).reshape(batch, seq, layers * experts)
        last = before[layer].gather(-1, ids[layer])  # (batch, seq, top_k)
        for slot in range(top_k):
            rank = (state > last[..., slot : slot + 1]).sum(-1)
            histogram += torch.bincount(rank[real & (last[..., slot] > 0)], minlength=layers * experts + 1)
    return functional.pad(histogram.cumsum(0)[:-1], (1, 0))


def consistency(ids: Tensor, real: Tensor) -> Tensor:  # (layers,)
    """Of every layer the sum over consecutive tokens of |E ∩ E'| / k."""
    same = (ids[:, :, 1:, :, None] == ids[:, :, :-1, None, :]).any(-1).double().mean(-1)
    return (same * real[:, 1:]).sum((1, 2))


@torch.no_grad()
def evaluate(model: Any, data: dict[str, Rows], device: str, batch: int = 16) -> dict[str, Any]:
    """Per domain: nats per token, tokens, ECR per layer and the LRU curve; in the precision of the model, without autocast."""
    with RouterRecorder(model.eval()) as recorder:
        return {domain: _evaluate_rows(model, recorder, one, device, batch) for domain, one in data.items()}


def _evaluate_rows(model: Any, recorder: RouterRecorder, data: Rows, device: str, batch: int) -> dict[str, Any]:
    loss, count, pairs, accesses, hits, ecr = 0.0, 0, 0, 0, torch.zeros(()), torch.zeros(())
    for start in range(0, len(data), batch):
        tokens, wanted, real = data.take(slice(start, start + batch), device)
        logits = model(input_ids=tokens, use_cache=False).logits
        nats = functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
        loss += nats[wanted[:, 1:].flatten()].sum().item()
        count += int(wanted[:, 1:].sum())
        ids = torch.stack(recorder.ids).view(len(recorder.layers), *tokens.shape, -1)
        hits = hits + lru_hits(ids, real, recorder.layers[0].num_experts).cpu()
        ecr = ecr + consistency(ids, real).cpu()
        pairs += int(real[:, 1:].sum())
        accesses += int(real.sum()) * ids.shape[0] * ids.shape[-1]
    return {"loss": loss / count, "tokens": count, "ecr": (ecr / pairs).tolist(), "hits": hits.long().tolist(), "accesses": accesses}


def pooled(domains: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """One row of several domains' measurements, weighted by tokens."""
    chosen = [domains[name] for name in names]
    tokens = [one["tokens"] for one in chosen]
    accesses = sum(one["accesses"] for one in chosen)
    return {
        "loss": float(np.average([one["loss"] for one in chosen], weights=tokens)),
        "ecr": np.average([one["ecr"] for one in chosen], axis=0, weights=tokens).tolist(),
        "chr": (np.sum([one["hits"] for one in chosen], axis=0) / accesses).tolist(),
    }


def equal_hit_size(base: Sequence[float], tuned: Sequence[float], share: float = 0.5) -> float:
    """The cache, as a share of all experts, at which `tuned` reaches the base model's hit rate at `share`, between sizes by line."""
    wanted = base[round(share * (len(base) - 1))]
    size = next((size for size, rate in enumerate(tuned) if rate >= wanted), len(tuned) - 1)
    low, high = tuned[max(0, size - 1)], tuned[size]
    exact = size if high <= low else size - 1 + min(1.0, (wanted - low) / (high - low))
    return exact / (len(base) - 1)

"""From examples and documents to batches: tokenise, split, pack, collate.

A batch has no attention mask. Its rows hold whole sequences side by side, each with positions from 0, and padding is one more sequence
at the end; transformers tells sequences apart by their positions and lets none see another. `segments` says the same to the losses,
with locality.PADDING for padding.
"""

from __future__ import annotations

import bisect
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import tokenizers
import torch
from torch import Tensor

from cfmoe.errors import CFMoEError
from cfmoe.measure.text import read_text
from cfmoe.tune.locality import PADDING
from cfmoe.tune.tasks import Example, read_rows

IGNORED = -100  # transformers' label of a token that is not to be predicted
_MULTIPLE = 8  # rows are padded to it

Item = TypeVar("Item")


@dataclass(frozen=True)
class Document:
    domain: str  # empty where a file has none
    text: str


@dataclass(frozen=True)
class Tokens:
    """One sequence. The tokens from `answer` on are to be predicted; the first one never is, nothing precedes it."""

    ids: list[int]
    answer: int
    domain: str = ""


Row = list[Tokens]


def read_documents(path: Path, limit: int | None = None) -> list[Document]:
    """The documents of a file: a .txt is one; of .jsonl each line's fields "text" and, where it has it, "domain". Also .xz of these."""
    kind = Path(path.stem).suffix if path.suffix == ".xz" else path.suffix
    if kind == ".txt":
        return [Document("", read_text(path))]
    documents = []
    for number, row in enumerate(read_rows(path, limit), 1):
        text, domain = row.get("text"), row.get("domain", "")
        if not isinstance(text, str) or not isinstance(domain, str):
            raise CFMoEError(f'{path}: row {number} has no field "text" (and optionally "domain") that is a text; mend the row')
        documents.append(Document(domain, text))
    return documents


def split(items: Sequence[Item], share: float, seed: int, domain: Callable[[Item], str] = lambda _: "") -> tuple[list[Item], list[Item]]:
    """(training, held out): of every domain `share` of its items, at least one where it has two, drawn by `seed`; orders are kept."""
    by_domain: dict[str, list[int]] = {}
    for index, item in enumerate(items):
        by_domain.setdefault(domain(item), []).append(index)
    held: set[int] = set()
    for name in sorted(by_domain):
        members = by_domain[name]
        count = min(len(members) - 1, max(1, round(share * len(members)))) if share else 0
        held.update(random.Random(f"{seed} {name}").sample(members, count))
    return [one for i, one in enumerate(items) if i not in held], [one for i, one in enumerate(items) if i in held]


def fitting(examples: Sequence[Example], tokenizer: tokenizers.Tokenizer, max_length: int) -> list[Example]:
    """The examples whose prompt leaves room for at least a token of an answer. Raises CFMoEError where none does."""
    prompts = tokenizer.encode_batch([one.prompt for one in examples], add_special_tokens=False)
    result = [one for one, prompt in zip(examples, prompts, strict=True) if len(prompt.ids) < max_length]
    if not result:
        raise CFMoEError(f"--max-length {max_length} leaves no room for an answer behind any prompt; use a higher one")
    return result


def encode_examples(
    examples: Sequence[Example], tokenizer: tokenizers.Tokenizer, end: int | None, max_length: int, domain: str = ""
) -> list[Tokens]:
    """Prompt and answer of every example, answers ended by `end`; only the answer is to be predicted. What does not fit is cut."""
    prompts = tokenizer.encode_batch([one.prompt for one in examples], add_special_tokens=False)
    answers = tokenizer.encode_batch([" " + one.answer for one in examples], add_special_tokens=False)
    result = []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = [*prompt.ids, *answer.ids, *([] if end is None else [end])]
        result.append(Tokens(ids[:max_length], max(1, len(prompt.ids)), domain))
    return result


def encode_documents(documents: Sequence[Document], tokenizer: tokenizers.Tokenizer, end: int | None, max_length: int) -> list[Tokens]:
    """Every document, ended by `end` and cut into pieces of `max_length` tokens; pieces of one token predict nothing and are dropped."""
    result = []
    for start in range(0, len(documents), 256):
        part = documents[start : start + 256]
        for document, encoded in zip(part, tokenizer.encode_batch([one.text for one in part], add_special_tokens=False), strict=True):
            ids = [*encoded.ids, *([] if end is None else [end])]
            pieces = [ids[at : at + max_length] for at in range(0, len(ids), max_length)]
            result += [Tokens(piece, 1, document.domain) for piece in pieces if len(piece) > 1]
    if not result:
        raise CFMoEError("the data has no text; give a file with some")
    return result


def pack(sequences: Sequence[Tokens], length: int, seed: int) -> list[Row]:
    """Rows of at most `length` tokens, filled by best fit from the longest sequence down, in an order drawn by `seed`."""
    rows: list[Row] = []
    free: list[tuple[int, int]] = []  # (room, row), sorted
    for one in sorted(sequences, key=lambda tokens: -len(tokens.ids)):
        at = bisect.bisect_left(free, (len(one.ids), 0))
        if at < len(free):
            room, row = free.pop(at)
            rows[row].append(one)
        else:
            room, row = length, len(rows)
            rows.append([one])
        bisect.insort(free, (room - len(one.ids), row))
    random.Random(seed).shuffle(rows)
    return rows


def collate(rows: Sequence[Row], pad: int, length: int | None = None) -> dict[str, Tensor]:
    """input_ids, labels, position_ids and segments, each (rows, length) int64; the longest row decides the length where None is given."""
    longest = max(sum(len(one.ids) for one in row) for row in rows)
    width = -(-longest // _MULTIPLE) * _MULTIPLE if length is None else length
    batch = {name: torch.full((len(rows), width), fill) for name, fill in (("input_ids", pad), ("labels", IGNORED), ("segments", PADDING))}
    batch["position_ids"] = torch.zeros((len(rows), width), dtype=torch.int64)
    for r, row in enumerate(rows):
        at = 0
        for number, one in enumerate(row):
            end = at + len(one.ids)
            batch["input_ids"][r, at:end] = torch.tensor(one.ids)
            batch["labels"][r, at + one.answer : end] = torch.tensor(one.ids[one.answer :])
            batch["position_ids"][r, at:end] = torch.arange(len(one.ids))
            batch["segments"][r, at:end] = number
            at = end
        batch["position_ids"][r, at:] = torch.arange(width - at)
    return batch


def end_token(config: Any, tokenizer: tokenizers.Tokenizer) -> int | None:
    """The token that ends a text, as the model's configuration says; None where it says none that the tokenizer has."""
    end = config.get_text_config().eos_token_id
    end = end[0] if isinstance(end, list) and end else end
    return end if isinstance(end, int) and 0 <= end < tokenizer.get_vocab_size() else None

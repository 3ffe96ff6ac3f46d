"""From documents and examples to batches: what is predicted, what is held out, and that packing changes no loss."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import pytest
import torch

from cfmoe.errors import CFMoEError
from cfmoe.tune.checkpoint import load_model, load_tokenizer
from cfmoe.tune.data import (
    IGNORED,
    Document,
    Tokens,
    collate,
    encode_documents,
    encode_examples,
    end_token,
    fitting,
    pack,
    read_documents,
    split,
)
from cfmoe.tune.locality import PADDING, Locality, locality_loss, segment_ids
from cfmoe.tune.routers import RouterRecorder
from cfmoe.tune.tasks import Example


def test_only_the_answer_is_predicted(demo_model: Path) -> None:
    tokenizer = load_tokenizer(demo_model)
    (one,) = encode_examples([Example("Question: 1 + 1?\nAnswer:", "It is 2.", "q")], tokenizer, 0, 64)
    assert tokenizer.decode(one.ids[: one.answer]) == "Question: 1 + 1?\nAnswer:"
    assert tokenizer.decode(one.ids[one.answer :], skip_special_tokens=False) == " It is 2.<|endoftext|>"
    batch = collate([[one]], pad=1)
    wanted = batch["labels"][0] != IGNORED
    assert batch["input_ids"][0][wanted].tolist() == one.ids[one.answer :] == batch["labels"][0][wanted].tolist()


def test_what_does_not_fit_is_cut_or_left_out(demo_model: Path) -> None:
    tokenizer = load_tokenizer(demo_model)
    short, long = Example("Why?", "because " * 40, "q"), Example("why " * 40, "so", "q")
    assert fitting([short, long], tokenizer, 16) == [short]
    (one,) = encode_examples([short], tokenizer, 0, 16)
    assert len(one.ids) == 16 and one.ids[-1] != 0
    with pytest.raises(CFMoEError, match="--max-length 16 leaves no room"):
        fitting([long], tokenizer, 16)


def test_documents_are_cut_into_pieces(demo_model: Path) -> None:
    tokenizer = load_tokenizer(demo_model)
    text = "A document of some words. " * 20
    pieces = encode_documents([Document("web", text), Document("", "x")], tokenizer, 0, 32)
    whole = tokenizer.encode(text, add_special_tokens=False).ids
    assert [token for piece in pieces if piece.domain == "web" for token in piece.ids] == [*whole, 0]
    assert all(len(piece.ids) == 32 for piece in pieces[:-2]) and pieces[-1] == Tokens([*tokenizer.encode("x").ids, 0], 1, "")


def test_documents_of_every_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    assert read_documents(tmp_path / "a.txt") == [Document("", "one\n\ntwo")]
    with lzma.open(tmp_path / "b.jsonl.xz", "wt") as file:
        file.write('{"domain": "web", "text": "one"}\n{"text": "two"}\n')
    assert read_documents(tmp_path / "b.jsonl.xz") == [Document("web", "one"), Document("", "two")]
    (tmp_path / "c.jsonl").write_text(json.dumps({"txt": "x"}))
    with pytest.raises(CFMoEError, match='row 1 has no field "text"'):
        read_documents(tmp_path / "c.jsonl")


def test_split_holds_out_a_share_of_every_domain() -> None:
    items = [Document("a", str(i)) for i in range(100)] + [Document("b", str(i)) for i in range(5)] + [Document("c", "only")]
    train, held = split(items, 0.1, seed=1, domain=lambda one: one.domain)
    assert sorted(map(id, train + held)) == sorted(map(id, items))
    assert [one.domain for one in held] == ["a"] * 10 + ["b"]
    assert split(items, 0.1, 1, lambda one: one.domain) == (train, held)
    assert split(items, 0.1, 2, lambda one: one.domain)[1] != held
    assert split(items, 0.0, 1) == (items, [])


def test_packing_keeps_every_sequence_whole() -> None:
    sequences = [Tokens([i] * (1 + i * 7 % 50), 1) for i in range(200)]
    rows = pack(sequences, 64, seed=0)
    assert sorted(one.ids for row in rows for one in row) == sorted(one.ids for one in sequences)
    assert all(sum(len(one.ids) for one in row) <= 64 for row in rows)
    assert len(rows) <= 1.02 * sum(len(one.ids) for one in sequences) / 64 + 1
    assert rows == pack(sequences, 64, seed=0) != pack(sequences, 64, seed=1)


def test_collate_numbers_sequences_and_positions() -> None:
    batch = collate([[Tokens([5, 6, 7], 1), Tokens([8, 9], 1)], [Tokens([4], 1)]], pad=1)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 1, 1, 1], [4, 1, 1, 1, 1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7, IGNORED, 9, *[IGNORED] * 3], [IGNORED] * 8]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2], [0, 0, 1, 2, 3, 4, 5, 6]]
    assert batch["segments"].tolist() == [[0, 0, 0, 1, 1, *[PADDING] * 3], [0, *[PADDING] * 7]]
    assert segment_ids(batch["segments"] != PADDING, batch["position_ids"])[0].tolist() == batch["segments"][0].tolist()


@pytest.mark.parametrize("kind", ["js", "cache"])
def test_packed_rows_give_the_losses_of_single_ones(demo_model: Path, kind: str) -> None:
    model = load_model(demo_model, torch.device("cpu"))
    tokenizer = load_tokenizer(demo_model)
    end = end_token(model.config, tokenizer)
    assert end == 0
    texts = ["The proposal adds a statement.", "A cat: a small animal that is kept in houses.", "def f(x): return x + 1  # twice"]
    sequences = encode_documents([Document("", text) for text in texts], tokenizer, end, 64)

    def losses(rows: list[list[Tokens]]) -> tuple[float, float]:
        batch = collate(rows, pad=1, length=64)
        with torch.no_grad(), RouterRecorder(model) as recorder:
            logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
            local = locality_loss(Locality(kind, recorder.layers[0].top_k), recorder.logits, batch["segments"], recorder.ids)
        quality = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORED)
        return quality.item(), local.item()

    assert losses([sequences]) == pytest.approx(losses([[one] for one in sequences]), rel=1e-5)

"""Perplexity: the arithmetic against a plain computation, the reading of texts, and cfmoe score on the embedded model."""

from __future__ import annotations

import itertools
import json
import lzma
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from cfmoe.errors import CFMoEError
from cfmoe.measure.perplexity import negative_log_likelihood, perplexity
from cfmoe.measure.text import read_text
from support import Cli, error_line


class FakeSession:
    """Logits that depend on the token and on its position, so that a wrong shift or a missing reset shows."""

    vocabulary = 11

    def __init__(self) -> None:
        self.position = 0
        self.longest = 0

    def reset(self) -> None:
        self.position = 0

    def feed(self, ids: Sequence[int], decode: bool = False, logits: bool = True) -> np.ndarray:
        self.longest = max(self.longest, len(ids))
        rows = [self.row(token, self.position + index) for index, token in enumerate(ids)]
        self.position += len(ids)
        return np.array(rows, np.float32)

    def row(self, token: int, position: int) -> np.ndarray:
        return np.random.default_rng([token, position]).normal(size=self.vocabulary).astype(np.float32)


@pytest.mark.parametrize(("length", "windows", "predicted"), [(20, 3, 17), (17, 2, 14), (16, 2, 14), (2, 1, 1)])
def test_perplexity_against_a_plain_computation(length: int, windows: int, predicted: int) -> None:
    session = FakeSession()
    ids = [int(token) for token in np.random.default_rng(3).integers(0, session.vocabulary, length)]
    total, count = 0.0, 0
    for start in range(0, length, 8):
        window = ids[start : start + 8]
        for position, (token, following) in enumerate(itertools.pairwise(window)):
            row = session.row(token, position).astype(np.float64)
            total -= row[following] - math.log(sum(math.exp(value) for value in row))
            count += 1
    result = perplexity(session, ids, window=8, chunk=3)
    assert (result.windows, result.tokens) == (windows, predicted) == (result.windows, count)
    assert result.nll == pytest.approx(total / count, rel=1e-12)
    assert result.perplexity == pytest.approx(math.exp(total / count))
    assert session.longest <= 3


def test_large_logits_do_not_overflow() -> None:
    logits = np.array([[3e38, 0.0], [-3e38, -3e38]], np.float32)
    assert negative_log_likelihood(logits, np.array([0, 1])) == pytest.approx(math.log(2))


def test_logits_that_are_not_finite_are_refused() -> None:
    with pytest.raises(CFMoEError, match="not finite"):
        negative_log_likelihood(np.array([[np.nan, 0.0]], np.float32), np.array([0]))


def test_too_short_a_text() -> None:
    with pytest.raises(CFMoEError, match="has 1 tokens; at least 2"):
        perplexity(FakeSession(), [1], 8, 8)


def test_read_text(tmp_path: Path) -> None:
    plain = tmp_path / "a.txt"
    plain.write_text("héllo wörld")
    assert read_text(plain) == "héllo wörld"
    assert read_text(plain, 1) == "h"
    assert read_text(plain, 2) == "h"  # the second character has two bytes
    assert read_text(plain, 3) == "hé"
    assert read_text(plain, 100) == "héllo wörld"
    rows = b'{"text": "one", "domain": "x"}\n\n{"text": "two"}\n'
    (tmp_path / "b.jsonl").write_bytes(rows)
    (tmp_path / "b.jsonl.xz").write_bytes(lzma.compress(rows))
    for name in ("b.jsonl", "b.jsonl.xz"):
        assert read_text(tmp_path / name) == "one\n\ntwo"
        assert read_text(tmp_path / name, 4) == "one\n"


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("a.csv", b"", "is neither .txt, .jsonl nor .xz"),
        ("a.txt", b"ok\xff", "is not UTF-8: byte 0xff at offset 2"),
        ("a.jsonl", b'{"text": "a"}\n{"text": 1}\n', 'line 2 has no field "text" that is a text'),
        ("a.jsonl", b'{"text": "a"}\n{"te\n', "line 2 is not JSON"),
        ("a.jsonl", b'{"text": "\xff"}\n', "line 1 is not UTF-8: byte 0xff at offset 10"),
        ("a.txt.xz", b"no xz at all", "is not a whole xz file"),
        ("a.txt.xz", lzma.compress(b"abc" * 1000)[:-8], "is not a whole xz file"),
    ],
)
def test_unreadable_texts(tmp_path: Path, name: str, data: bytes, expected: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CFMoEError) as caught:
        read_text(tmp_path / name)
    assert expected in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)


def test_score(cli: Cli, demo_artifact: Path, tmp_path: Path) -> None:
    """Plain English scores far better than a uniform guess, and the budget does not matter."""
    data = tmp_path / "text.txt"
    data.write_text("The proposal adds a new statement to the language. It has been discussed on the mailing list. " * 3)
    results = []
    for budget in ("100%", "25%"):
        result = cli("score", demo_artifact, "--data", data, "--window", "32", "--memory-budget", budget, "--json")
        assert result.returncode == 0, result.stderr
        results.append(json.loads(result.stdout))
    for value in results:
        del value["seconds"]
    assert results[0] == results[1]
    assert results[0]["perplexity"] < 200
    assert results[0]["tokens"] == results[0]["text_tokens"] - results[0]["windows"]


def test_score_refuses_a_window_beyond_the_context(cli: Cli, demo_artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    line = error_line(cli("score", demo_artifact, "--data", tmp_path / "a.txt", "--window", "4096"))
    assert "--window 4096 is longer than the artifact's context of 2048 tokens; use at most 2048" in line

"""Sizes, streaming of text, and memory measurement: what the binding does without an artifact's kernels."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from cfmoe.runtime import tokenizer as tokenizer_module
from cfmoe.runtime.errors import CFMoEError
from cfmoe.runtime.memory import PeakGrowth, peak_resident_bytes, resident_bytes
from cfmoe.runtime.size import Budget, format_size, parse_budget, parse_size
from cfmoe.runtime.tokenizer import Tokenizer


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4096", 4096),
        (4096, 4096),
        ("1KiB", 1024),
        ("800MiB", 800 << 20),
        (" 800 MiB ", 800 << 20),
        ("800mib", 800 << 20),
        ("1.5GiB", 3 << 29),
        ("1.5 GB", 1_500_000_000),
        ("2g", 2 << 30),
        (".5m", 1 << 19),
        ("7.b", 7),
        ("5.21 MiB", 5463080),  # 5463080.96
    ],
)
def test_parse_size(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "MiB", "-1", "0", 0, -5, "1e9", "1,5GiB", "12 XB", "0x10", "1 MiB 2", "0.2", "9999999TiB", "٣", "nan", "50%"]
)
def test_parse_size_refuses(text: str | int) -> None:
    with pytest.raises(CFMoEError, match="size"):
        parse_size(text)


def test_parse_budget() -> None:
    assert parse_budget(None) == Budget(0, 0.0)
    assert parse_budget("1MiB") == Budget(1 << 20, 0.0)
    assert parse_budget(12345) == Budget(12345, 0.0)
    assert parse_budget("50%") == Budget(0, 50.0)
    assert parse_budget(" 12.5 % ") == Budget(0, 12.5)
    for bad in ("0%", "-1%", "101%", "%", "x%", "1e1%", "nan%"):
        with pytest.raises(CFMoEError, match="%"):
            parse_budget(bad)


def test_format_size() -> None:
    assert format_size(0) == "0 B"
    assert format_size(1023) == "1023 B"
    assert format_size(1024) == "1.00 KiB"
    assert format_size((1 << 20) - 1) == "1.00 MiB"
    assert format_size(3 << 29) == "1.50 GiB"
    assert format_size(5 << 50) == "5120.00 TiB"


@given(st.integers(1, 1 << 50))
def test_a_formatted_size_is_read_back_nearly(size: int) -> None:
    assert parse_size(format_size(size)) == pytest.approx(size, rel=0.006)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """One token per byte, and some merges that end inside characters."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    emoji = _byte_letters("🙂".encode())
    merges = [(emoji[0], emoji[1]), (emoji[2], emoji[3])]
    tokens = ["<end>", *alphabet, *("".join(merge) for merge in merges)]
    model = tokenizers.Tokenizer(tokenizers.models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    model.add_special_tokens(["<end>"])
    return _open(tmp_path_factory.mktemp("tokenizer"), model.to_str().encode())


def _byte_letters(data: bytes) -> list[str]:
    """The letters that stand for bytes in byte-level vocabularies."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [letters[byte] for byte in data]


def _open(directory: Path, data: bytes, digest: str | None = None) -> Tokenizer:
    (directory / "tokenizer.json").write_bytes(data)
    entry = SimpleNamespace(sha256=digest or hashlib.sha256(data).hexdigest())
    opened = SimpleNamespace(path=directory, manifest=SimpleNamespace(files={"tokenizer.json": entry}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_module, "Artifact", SimpleNamespace(open=lambda _path: opened))
        return Tokenizer(directory)


def _pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = tokenizer.stream()
    return [*(stream.push(token) for token in ids), stream.flush()]


@pytest.mark.parametrize(
    "text", ["plain words", "naïve café — 🙂🙂 done", "日本語のテキスト", "a\u0301 e\u0308", " leading and trailing ", ""]
)
def test_streamed_text_is_the_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    pieces = _pieces(tokenizer, ids)
    assert "".join(pieces) == text == tokenizer.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)


def test_pieces_come_as_soon_as_a_character_is_whole(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("x🙂y")
    assert len(ids) == 4
    assert _pieces(tokenizer, ids) == ["x", "", "🙂", "y", ""]


def test_broken_bytes_stream_as_they_decode(tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    for _ in range(200):
        ids = [rng.randrange(1, tokenizer.vocab_size) for _ in range(rng.randrange(12))]
        assert "".join(_pieces(tokenizer, ids)) == tokenizer.decode(ids)


def test_an_unfinished_character_appears_only_at_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a🙂")[:-1]
    assert _pieces(tokenizer, ids) == ["a", "", "\ufffd"]


def test_special_tokens_are_left_out_of_streams(tokenizer: Tokenizer) -> None:
    end = tokenizer.encode("<end>")
    assert len(end) == 1
    assert _pieces(tokenizer, [*tokenizer.encode("ab"), *end, *tokenizer.encode("c")]) == ["a", "b", "", "c", ""]


def test_text_with_lone_surrogates_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(CFMoEError, match="not UTF-8 at character 2"):
        tokenizer.encode("ab\udcff")


def test_a_damaged_or_unusable_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CFMoEError, match=r"tokenizer\.json is damaged"):
        _open(tmp_path, b"{}", digest="0" * 64)
    with pytest.raises(CFMoEError, match=r"tokenizer\.json cannot be used"):
        _open(tmp_path, json.dumps({"version": "1.0"}).encode())


def test_growth_of_memory_is_seen_after_it_is_given_back() -> None:
    size = 64 << 20
    with PeakGrowth() as growth:
        block = bytearray(size)
        block[::4096] = b"x" * (size // 4096)
        del block
    assert 0.9 * size < growth.bytes < 2 * size
    assert 0 < resident_bytes() <= peak_resident_bytes() + (1 << 20)

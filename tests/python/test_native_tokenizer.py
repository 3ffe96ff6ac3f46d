"""The runtime's own byte-level BPE gives the ids of the package `tokenizers`, and streams the same text back."""

from __future__ import annotations

import ctypes
import itertools
import json
import lzma
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import pytest
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

import artifacts
from cfmoe.errors import CFMoEError
from cfmoe.runtime import _capi

QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class Native:
    """cfmoe_tokenizer_* of an artifact."""

    def __init__(self, artifact: Path) -> None:
        self.lib = _capi.library()
        self.handle = ctypes.c_void_p()
        error = _capi.ErrorText()
        error.check(self.lib.cfmoe_tokenizer_open(bytes(artifact), ctypes.byref(self.handle), *error.arguments))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.lib.cfmoe_tokenizer_close(self.handle)

    def encode(self, text: str | bytes) -> list[int]:
        data = text if isinstance(text, bytes) else text.encode()
        count = ctypes.c_size_t()
        out = (ctypes.c_int32 * (len(data) + 1))()
        error = _capi.ErrorText()
        error.check(self.lib.cfmoe_tokenizer_encode(self.handle, data, len(data), out, len(out), ctypes.byref(count), *error.arguments))
        return list(out[: count.value])

    def encode_typed(self, text: str, plain: Sequence[tuple[int, int]]) -> list[int]:
        """`plain` counts bytes."""
        data, count = text.encode(), ctypes.c_size_t()
        out, ranges = (ctypes.c_int32 * (len(data) + 1))(), (ctypes.c_size_t * (2 * len(plain)))(*itertools.chain.from_iterable(plain))
        error = _capi.ErrorText()
        arguments = (self.handle, data, len(data), ranges, len(plain), out, len(out), ctypes.byref(count), *error.arguments)
        error.check(self.lib.cfmoe_tokenizer_encode_typed(*arguments))
        return list(out[: count.value])

    def push(self, token: int) -> str:
        size = ctypes.c_size_t()
        out = ctypes.create_string_buffer(4096)
        error = _capi.ErrorText()
        error.check(self.lib.cfmoe_tokenizer_push(self.handle, token, out, len(out), ctypes.byref(size), *error.arguments))
        return out.raw[: size.value].decode()

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.push(i) for i in ids) + self.push(-1)


def hard_texts() -> Iterator[str]:
    """Text at the edges of every class of characters."""
    yield from (
        "",
        " ",
        "  a   b\t\tc \n\n d\r\n\r\n  e \n",
        "I'll say it's he'd 'REALLY' they'RE don'T 'ſ 'Ll",
        "x=12345678+½²٣४Ⅷ 1,000.50",
        "naïve café e\u0301 日本語テキスト 한국어 🇩🇪👩‍👩‍👧 \u200b\u00a0\u3000\u0085 x",
        "<|endoftext|><|user|> hi<|assistant|>  <|user|<|pad|>",
        "a" * 3000,
        " ".join(["..."] * 50) + "_" * 700,
        "\u0000\u0001\u007f\ufeff\U0010ffff",
    )
    source = random.Random(7)
    parts = [
        " ",
        "  ",
        "\n",
        "\r\n",
        "\t",
        "'s",
        "'LL",
        "a",
        "Zz",
        "ß",
        "9",
        "42",
        "³",
        "९",
        "!",
        "…",
        "—",
        "é",
        "日",
        "\u00a0",
        "\u2028",
        "🙂",
        "<|user|>",
    ]
    for _ in range(400):
        yield "".join(source.choices(parts, k=source.randrange(1, 30)))


def every_character() -> Iterator[str]:
    """Every character once, so that its class is compared: assigned or not."""
    for start in range(0, 0x110000, 0x1000):
        yield "".join(f"{chr(c)}a" for c in range(start, start + 0x1000) if not 0xD800 <= c < 0xE000)


def built(pre_tokenizer: Any, ignore_merges: bool = False) -> tokenizers.Tokenizer:
    """A small tokenizer trained on the spot."""
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(["the quick brown fox's 123 years\n\n   of it ", "thesis theme it's 2024 — naïve 日本"] * 20, trainer)
    tokenizer.add_special_tokens([AddedToken("<|user|>", normalized=False), AddedToken("<|endoftext|>", normalized=False)])
    tokenizer.add_tokens([AddedToken("   ", normalized=True), AddedToken("<|user", normalized=True), AddedToken("...", normalized=True)])
    return tokenizer


def byte_level(**options: bool) -> Any:
    return pre_tokenizers.ByteLevel(**({"add_prefix_space": False} | options))


def split(pattern: str) -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level(use_regex=False)])


KINDS: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "gpt2": lambda: built(byte_level()),
    "prefix space": lambda: built(byte_level(add_prefix_space=True)),
    "digit runs": lambda: built(pre_tokenizers.Sequence([pre_tokenizers.Digits(False), byte_level()])),
    "split": lambda: built(split(GPT2)),
    "one digit": lambda: built(split(QWEN[0])),
    "three digits": lambda: built(split(QWEN[1]), ignore_merges=True),
}


def write(out: Path, tokenizer: tokenizers.Tokenizer | dict[str, Any]) -> Path:
    text = json.dumps(tokenizer) if isinstance(tokenizer, dict) else tokenizer.to_str()
    return artifacts.write(out, tokenizer=text.encode())


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_that_is_read_gives_the_same_ids(kind: str, tmp_path: Path) -> None:
    reference = KINDS[kind]()
    with Native(write(tmp_path / "a", reference)) as native:
        for text in hard_texts():
            ids = reference.encode(text, add_special_tokens=False).ids
            assert native.encode(text) == ids, repr(text[:200])
            assert native.decode(ids) == reference.decode(ids), repr(text[:200])


@pytest.mark.parametrize("kind", ["gpt2", "three digits"])
def test_what_was_typed_holds_no_special_token(kind: str, tmp_path: Path) -> None:
    reference, text_only = KINDS[kind](), KINDS[kind]()
    text_only.encode_special_tokens = True
    user, end = (reference.token_to_id(token) for token in ("<|user|>", "<|endoftext|>"))
    with Native(write(tmp_path / "a", reference)) as native:
        for text in hard_texts():
            size = len(text.encode())
            ids = text_only.encode(text, add_special_tokens=False).ids
            assert native.encode_typed(text, [(0, size)]) == native.encode_typed(text, [(0, size // 2), (size // 2, size)]) == ids
            assert native.encode_typed(text, []) == native.encode_typed(text, [(0, 0), (size, size)]) == native.encode(text)
        # A template around what was typed; a token that reaches into that is none.
        typed = "é <|endoftext|> <|user|>"
        ids = native.encode_typed(f"<|user|>{typed}<|endoftext|>", [(8, 8 + len(typed.encode()))])
        assert (ids[0], ids[-1]) == (user, end) and not {user, end} & set(ids[1:-1])
        assert user not in native.encode_typed("<|user|>", [(2, 6)])
        assert native.encode_typed("<|user|>x", [(8, 9)])[0] == user
        for wrong in ([(1, 0)], [(0, 2)], [(2, 2)]):
            with pytest.raises(CFMoEError, match="plain holds what is no range of the text"):
                native.encode_typed("a", wrong)


@pytest.mark.parametrize("model", ["demo_model", "moe_63m"])
def test_the_shipped_tokenizers_give_the_same_ids(model: str, corpus_eval: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(model) / "tokenizer.json"
    reference = tokenizers.Tokenizer.from_file(str(path))
    with lzma.open(corpus_eval, "rt") as lines:
        texts = [json.loads(line)["text"] for line, _ in zip(lines, range(300), strict=False)]
    total = 0
    with Native(artifacts.write(tmp_path / "a", tokenizer=path.read_bytes())) as native:
        for text in [*texts, *hard_texts()]:
            ids = reference.encode(text, add_special_tokens=False).ids
            assert native.encode(text) == ids, repr(text[:200])
            total += len(ids)
        for text in texts[:50]:
            ids = reference.encode(text, add_special_tokens=False).ids
            assert native.decode(ids) == reference.decode(ids)
        source = random.Random(3)
        for _ in range(200):  # not what a tokenizer makes: characters begun, never ended
            ids = [source.randrange(reference.get_vocab_size()) for _ in range(30)]
            assert native.decode(ids) == reference.decode(ids)
    assert total > 100_000


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["digit runs", "three digits"])
def test_every_character_is_of_the_same_class(kind: str, tmp_path: Path) -> None:
    reference = KINDS[kind]()
    with Native(write(tmp_path / "a", reference)) as native:
        for text in every_character():
            assert native.encode(text) == reference.encode(text, add_special_tokens=False).ids, hex(ord(text[0]))


def test_other_kinds_and_broken_text_are_refused_with_the_reason(tmp_path: Path) -> None:
    def refused(number: int, change: Callable[[dict[str, Any]], object]) -> str:
        document = json.loads(KINDS["gpt2"]().to_str())
        change(document)
        with pytest.raises(CFMoEError) as raised:
            Native(write(tmp_path / str(number), document))
        assert "\n" not in str(raised.value)
        return str(raised.value)

    assert "normalizer" in refused(0, lambda d: d.update(normalizer={"type": "NFC"}))
    assert '"Unigram"' in refused(1, lambda d: d["model"].update(type="Unigram"))
    assert "not byte-level" in refused(2, lambda d: d["model"].update(byte_fallback=True))
    assert "pattern" in refused(
        3, lambda d: d.update(pre_tokenizer={"type": "Split", "pattern": {"Regex": "x"}, "behavior": "Isolated", "invert": False})
    )
    assert '"Metaspace"' in refused(4, lambda d: d.update(pre_tokenizer={"type": "Metaspace"}))
    assert "merges" in refused(5, lambda d: d["model"]["merges"].append(["q", "zzz"]))
    assert "no token for byte 33" in refused(6, lambda d: d["model"]["vocab"].pop("!"))
    assert "lstrip" in refused(7, lambda d: d["added_tokens"][0].update(lstrip=True))
    with Native(write(tmp_path / "a", KINDS["gpt2"]())) as native, pytest.raises(CFMoEError, match="not UTF-8 at byte 3"):
        native.encode(b"abc\xff")

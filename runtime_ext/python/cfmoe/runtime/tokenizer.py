"""The artifact's tokenizer: exact encoding with nothing prepended, and streaming decoding in whole characters."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from cfmoe.artifact import Artifact
from cfmoe.errors import os_error
from cfmoe.runtime.errors import CFMoEError

_FILE = "tokenizer.json"
_REPLACEMENT = "\ufffd"


class Tokenizer:
    """Opens tokenizer.json of an artifact and checks its digest. Raises CFMoEError where it is missing, damaged or unusable."""

    def __init__(self, artifact: str | os.PathLike[str]) -> None:
        import tokenizers

        opened = Artifact.open(Path(artifact))
        path = opened.path / _FILE
        if _FILE not in opened.manifest.files:
            raise CFMoEError(f"{opened.path} has no {_FILE}; compile a checkpoint that brings one")
        try:
            data = path.read_bytes()
        except OSError as error:
            raise os_error(error, path, "read") from error
        if hashlib.sha256(data).hexdigest() != opened.manifest.files[_FILE].sha256:
            raise CFMoEError(f"{path} is damaged: its SHA-256 is not the manifest's; copy the artifact again or compile the model again")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(data)
        except Exception as error:  # the package raises nothing narrower
            reason = " ".join(str(error).split())
            raise CFMoEError(f"{path} cannot be used: {reason}; compile the model again") from error
        # What training wanted of batches would cut or fill single texts.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    @property
    def vocab_size(self) -> int:
        """Tokens, added ones included."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text`` exactly as tokenizer.json says; no special token is prepended. Raises CFMoEError for broken text."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise CFMoEError(f"the text is not UTF-8 at character {error.start}: convert it to UTF-8") from error
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ``ids``; bytes that are no UTF-8 become U+FFFD."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def stream(self, skip_special_tokens: bool = True) -> TokenStream:
        """A decoder for one sequence of tokens."""
        return TokenStream(self, skip_special_tokens)


class TokenStream:
    """Turns tokens into text one at a time. A piece ends at a character's end; all pieces together are ``decode`` of all tokens."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        # Decoders look at neighbours (spaces, bytes of one character), so a little of what was emitted stays as context.
        self._ids: list[int] = []
        self._emitted = 0  # how many of these are emitted

    def push(self, token: int) -> str:
        """The text that ``token`` completes; empty while a character is incomplete."""
        self._ids.append(token)
        before = self._decode(self._ids[: self._emitted])
        text = self._decode(self._ids)
        if len(text) <= len(before) or text.endswith(_REPLACEMENT):
            return ""
        return self._emit(before, text)

    def flush(self) -> str:
        """What is left at the end: an incomplete character becomes U+FFFD."""
        return self._emit(self._decode(self._ids[: self._emitted]), self._decode(self._ids))

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, self._skip)

    def _emit(self, before: str, text: str) -> str:
        self._ids = self._ids[self._emitted :]
        self._emitted = len(self._ids)
        return text[len(before) :]

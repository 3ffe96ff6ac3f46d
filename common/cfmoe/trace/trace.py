"""The trace in memory and its file, version 1 of docs/trace-format.md: every number is checked before use."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import numpy as np
import xxhash

from cfmoe.errors import CFMoEError, os_error

MAX_LAYERS = 1024
MAX_EXPERTS = 65535
MAX_TOP_K = 256
SCORE_ONE = 65535  # the score 1.0 in fixed point

_MAGIC = b"CFMOETRC"
_VERSION = 1
_HAS_SCORES = 1
_FIELDS = struct.Struct("<8sIIIIIIQQIIQ32sQ")  # what the header's own checksum covers
_CHECKSUM = struct.Struct("<Q")
_HEADER_BYTES = 128
_SEGMENT = np.dtype([("tokens", "<u4"), ("phase", "u1"), ("flags", "u1"), ("zero", "<u2"), ("position", "<u8")])
_BEGINS_SAMPLE = 1
_HAND_OVER = 2
_POLICY_BYTES = 32
_U32 = 2**32 - 1
_U64 = 2**64 - 1
_MAX_POSITION = 2**48
_POLICY = re.compile(rf"[!-~]{{0,{_POLICY_BYTES}}}")
_AGAIN = "record the trace again"
_PIECE = 1 << 22  # ids that are checked at a time, which bounds the memory for it


class Phase(IntEnum):
    """How tokens went through the model: many at once, or one after another."""

    PREFILL = 0
    DECODE = 1


@dataclass(frozen=True)
class Segment:
    """A stretch of `tokens` tokens of one phase, the first of them at `position` of its context.

    `begins_sample`: the context is empty and the cache cold before it. `hand_over`: decode follows, for which prefill seeds the cache.
    """

    tokens: int
    phase: Phase
    begins_sample: bool
    hand_over: bool
    position: int


@dataclass(frozen=True, eq=False)
class Trace:
    """Which of `experts` experts of every MoE layer each token was routed to.

    `ids` are in routing order, best first. `chunk_size`, `slots`, `expert_bytes` and `policy` tell of the engine that wrote the trace;
    zero and empty where it was none. Raises CFMoEError where the parts contradict each other or docs/trace-format.md.
    """

    ids: np.ndarray  # (tokens, layers, top_k), uint8 where experts <= 256, else uint16
    segments: tuple[Segment, ...]
    experts: int
    scores: np.ndarray | None = None  # (tokens, layers, experts), uint16: round(65535 × p)
    chunk_size: int = 0
    slots: int = 0
    expert_bytes: int = 0
    policy: str = ""

    def __post_init__(self) -> None:
        _check_ids(self.ids, self.experts)
        _check_segments(self.segments, len(self.ids))
        if self.scores is not None:
            _check_scores(self.scores, (self.tokens, self.layers, self.experts))
        _check_number("chunk_size", self.chunk_size, 0, _U32)
        _check_number("slots", self.slots, 0, _U32)
        _check_number("expert_bytes", self.expert_bytes, 0, _U64)
        if not _POLICY.fullmatch(self.policy):
            raise _wrong(f"the policy {self.policy!r} is not at most {_POLICY_BYTES} printable ASCII characters without spaces")

    @property
    def tokens(self) -> int:
        return int(self.ids.shape[0])

    @property
    def layers(self) -> int:
        return int(self.ids.shape[1])

    @property
    def top_k(self) -> int:
        return int(self.ids.shape[2])

    def to_bytes(self) -> bytes:
        """The file's bytes."""
        return b"".join(self._parts())

    @classmethod
    def from_bytes(cls, data: bytes, where: Path | str) -> Trace:
        """The trace in `data`, which came from `where`. Raises CFMoEError where it is not a whole and sound trace."""
        try:
            return _parse(data)
        except CFMoEError as error:
            raise CFMoEError(f"{where}: {error}") from error

    def write(self, path: Path, force: bool = False) -> None:
        """Writes the file `path`, which appears only when complete. An existing one is refused unless `force`."""
        check_writable(path, force)
        staged = path.with_name(f".{path.name}.cfmoe-new-{os.getpid()}-{secrets.token_hex(4)}")
        try:
            with open(staged, "xb") as file:
                for part in self._parts():
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            os.replace(staged, path)
        except OSError as error:
            raise os_error(error, path, "write") from error
        finally:
            with contextlib.suppress(FileNotFoundError):
                staged.unlink()

    @classmethod
    def read(cls, path: Path) -> Trace:
        """The trace in the file `path`. Raises CFMoEError where it cannot be read or is not a whole and sound trace."""
        try:
            data = path.read_bytes()
        except OSError as error:
            raise os_error(error, path, "read") from error
        return cls.from_bytes(data, path)

    def _parts(self) -> list[bytes]:
        """Header, segments, ids, scores."""
        table = np.zeros(len(self.segments), _SEGMENT)
        for row, segment in zip(table, self.segments, strict=True):
            flags = _BEGINS_SAMPLE * segment.begins_sample + _HAND_OVER * segment.hand_over
            row["tokens"], row["phase"], row["flags"], row["position"] = segment.tokens, segment.phase, flags, segment.position
        payload = [table.tobytes(), _little_endian(self.ids)]
        if self.scores is not None:
            payload.append(_little_endian(self.scores))
        digest = xxhash.xxh3_64()
        for part in payload:
            digest.update(part)
        fields = _FIELDS.pack(
            *(_MAGIC, _VERSION, 0 if self.scores is None else _HAS_SCORES),
            *(self.layers, self.experts, self.top_k, self.ids.itemsize, self.tokens, len(self.segments)),
            *(self.chunk_size, self.slots, self.expert_bytes, self.policy.encode("ascii"), digest.intdigest()),
        )
        header = fields + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(fields))
        return [header.ljust(_HEADER_BYTES, b"\0"), *payload]


def id_type(experts: int) -> np.dtype:
    """The type of a trace's ids."""
    return np.dtype(np.uint8 if experts <= 256 else np.uint16)


def window_segments(tokens: int, prompt_tokens: int) -> tuple[Segment, ...]:
    """The segments of one sample: a prompt of at most `prompt_tokens` tokens, then decode of the rest; either may be absent."""
    prompt = min(tokens, prompt_tokens)
    rest = tokens - prompt
    segments = []
    if prompt:
        segments.append(Segment(prompt, Phase.PREFILL, begins_sample=True, hand_over=rest > 0, position=0))
    if rest:
        segments.append(Segment(rest, Phase.DECODE, begins_sample=prompt == 0, hand_over=False, position=prompt))
    return tuple(segments)


def check_writable(path: Path, force: bool) -> None:
    """Raises CFMoEError where `path` exists and may not be replaced, or its directory is not there: known before long work."""
    if path.is_dir():
        raise CFMoEError(f"{path} is a directory; give the path of a file")
    if os.path.lexists(path) and not force:
        raise CFMoEError(f"{path} exists; give --force to replace it, or another path")
    if not path.parent.is_dir():
        raise CFMoEError(f"cannot write {path}: its directory does not exist; create it or choose another path")


def _little_endian(array: np.ndarray) -> bytes:
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def _wrong(what: str) -> CFMoEError:
    return CFMoEError(f"{what}; {_AGAIN}")


def _check_number(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise _wrong(f"{name} is {value}, not between {low} and {high}")


def _check_ids(ids: np.ndarray, experts: int) -> None:
    if ids.ndim != 3:
        raise _wrong(f"the ids have the shape {ids.shape}, not (tokens, layers, top_k)")
    tokens, layers, top_k = ids.shape
    _check_number("experts", experts, 1, MAX_EXPERTS)
    _check_number("tokens", tokens, 1, _U32)
    _check_number("layers", layers, 1, MAX_LAYERS)
    _check_number("top_k", top_k, 1, min(experts, MAX_TOP_K))
    if ids.dtype != id_type(experts):
        raise _wrong(f"the ids of {experts} experts are {ids.dtype}, not {id_type(experts)}")
    step = max(1, _PIECE // (layers * top_k))
    for start in range(0, tokens, step):
        piece = ids[start : start + step]
        bad = np.argwhere(piece >= experts)
        if len(bad):
            token, layer, k = bad[0]
            raise _wrong(f"token {start + token}, layer {layer}: expert {piece[token, layer, k]} is not below {experts}")
        ordered = np.sort(piece, axis=-1)
        bad = np.argwhere(ordered[..., 1:] == ordered[..., :-1])
        if len(bad):
            token, layer, k = bad[0]
            raise _wrong(f"token {start + token}, layer {layer}: expert {ordered[token, layer, k]} is chosen twice")


def _check_segments(segments: Iterable[Segment], tokens: int) -> None:
    total = 0
    end = 0  # of the context so far
    for number, segment in enumerate(segments):
        name = f"segment {number}"
        _check_number(f"{name}: tokens", segment.tokens, 1, _U32)
        _check_number(f"{name}: position", segment.position, 0 if segment.begins_sample else end, _MAX_POSITION)
        end = segment.position + segment.tokens
        if number == 0 and not segment.begins_sample:
            raise _wrong(f"{name} does not begin a sample, which the first must")
        if segment.hand_over and segment.phase != Phase.PREFILL:
            raise _wrong(f"{name} is decode and hands over, which only prefill does")
        total += segment.tokens
    if total != tokens:
        raise _wrong(f"the segments add up to {total} tokens, not to {tokens}")


def _check_scores(scores: np.ndarray, shape: tuple[int, int, int]) -> None:
    if scores.shape != shape or scores.dtype != np.uint16:
        raise _wrong(f"the scores are {scores.dtype} of the shape {scores.shape}, not uint16 of (tokens, layers, experts) = {shape}")


def _parse(data: bytes) -> Trace:
    if len(data) < _HEADER_BYTES:
        raise CFMoEError(f"has {len(data)} bytes, but a trace has at least {_HEADER_BYTES}; copy it again or {_AGAIN}")
    fields = data[: _FIELDS.size]
    magic, version, *numbers, policy, payload_checksum = _FIELDS.unpack(fields)
    flags, layers, experts, top_k, id_bytes, tokens, segment_count, chunk_size, slots, expert_bytes = numbers
    if magic != _MAGIC:
        raise CFMoEError("is not a routing trace of CFMoE; give a file that cfmoe profile or cfmoe run --trace wrote")
    if version != _VERSION:
        raise CFMoEError(f"has format version {version}, but this program reads {_VERSION}; {_AGAIN}")
    if _CHECKSUM.unpack_from(data, _FIELDS.size)[0] != xxhash.xxh3_64_intdigest(fields):
        raise CFMoEError(f"its header is damaged (checksum); copy it again or {_AGAIN}")
    if any(data[_FIELDS.size + _CHECKSUM.size : _HEADER_BYTES]):
        raise _wrong("the end of the header is not zero")
    if flags & ~_HAS_SCORES:
        raise _wrong(f"the header has unknown flags {flags:#x}")
    _check_number("layers", layers, 1, MAX_LAYERS)
    _check_number("experts", experts, 1, MAX_EXPERTS)
    _check_number("top_k", top_k, 1, min(experts, MAX_TOP_K))
    _check_number("tokens", tokens, 1, _U32)
    _check_number("segments", segment_count, 1, tokens)
    if id_bytes != id_type(experts).itemsize:
        raise _wrong(f"id_bytes is {id_bytes}, not {id_type(experts).itemsize} as {experts} experts want")
    name = policy.rstrip(b"\0").decode("latin-1")

    ids_at = _HEADER_BYTES + segment_count * _SEGMENT.itemsize
    scores_at = ids_at + tokens * layers * top_k * id_bytes
    end = scores_at + (tokens * layers * experts * 2 if flags & _HAS_SCORES else 0)
    if len(data) != end:
        raise CFMoEError(f"has {len(data)} bytes, but its header says {end}; copy it again or {_AGAIN}")
    if xxhash.xxh3_64_intdigest(memoryview(data)[_HEADER_BYTES:]) != payload_checksum:
        raise CFMoEError(f"is damaged (checksum); copy it again or {_AGAIN}")

    table = np.frombuffer(data, _SEGMENT, segment_count, _HEADER_BYTES)
    ids = np.frombuffer(data, f"<u{id_bytes}", tokens * layers * top_k, ids_at).reshape(tokens, layers, top_k)
    scores: np.ndarray | None = None
    if flags & _HAS_SCORES:
        scores = np.frombuffer(data, "<u2", tokens * layers * experts, scores_at).reshape(tokens, layers, experts)
    return Trace(
        ids=ids.astype(id_type(experts), copy=False),
        segments=_parse_segments(table),
        experts=experts,
        scores=None if scores is None else scores.astype(np.uint16, copy=False),
        chunk_size=chunk_size,
        slots=slots,
        expert_bytes=expert_bytes,
        policy=name,
    )


def _parse_segments(table: np.ndarray) -> tuple[Segment, ...]:
    segments = []
    for number, (tokens, phase, flags, zero, position) in enumerate(table.tolist()):
        if phase not in (Phase.PREFILL, Phase.DECODE):
            raise _wrong(f"segment {number} has the phase {phase}, not 0 (prefill) or 1 (decode)")
        if flags & ~(_BEGINS_SAMPLE | _HAND_OVER):
            raise _wrong(f"segment {number} has unknown flags {flags:#x}")
        if zero:
            raise _wrong(f"segment {number} has {zero} where zero must be")
        segments.append(Segment(tokens, Phase(phase), bool(flags & _BEGINS_SAMPLE), bool(flags & _HAND_OVER), position))
    return tuple(segments)

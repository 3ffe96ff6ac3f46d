"""The trace file: what is written is read back, the bytes are those of docs/trace-format.md, and what is wrong is refused in one line."""

from __future__ import annotations

import dataclasses
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from cfmoe.errors import CFMoEError
from cfmoe.trace import Phase, Segment, Trace, window_segments
from cfmoe.trace.trace import check_writable, id_type


def make_trace(tokens: int = 5, layers: int = 3, top_k: int = 2, experts: int = 8, scores: bool = False, **facts: Any) -> Trace:
    """Random ids, seed 0; two samples where there are tokens enough."""
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((tokens, layers, experts)), axis=-1)[..., :top_k].astype(id_type(experts))
    segments = window_segments(tokens - tokens // 2, 1) + (window_segments(tokens // 2, 1) if tokens > 1 else ())
    values = rng.integers(0, 65536, (tokens, layers, experts)).astype(np.uint16) if scores else None
    return Trace(ids, segments, experts, values, **facts)


def assert_equal(one: Trace, other: Trace) -> None:
    for field in dataclasses.fields(Trace):
        left, right = getattr(one, field.name), getattr(other, field.name)
        if isinstance(left, np.ndarray):
            assert left.dtype == right.dtype
            np.testing.assert_array_equal(left, right)
        else:
            assert left == right, field.name


@given(
    tokens=st.integers(1, 9),
    layers=st.integers(1, 4),
    experts=st.sampled_from([1, 2, 7, 256, 257, 700]),
    top_k=st.integers(1, 5),
    scores=st.booleans(),
    policy=st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=32),
)
def test_round_trip(tokens: int, layers: int, experts: int, top_k: int, scores: bool, policy: str) -> None:
    facts = {"chunk_size": 256, "slots": 2**32 - 1, "expert_bytes": 2**64 - 1, "policy": policy}
    trace = make_trace(tokens, layers, min(top_k, experts), experts, scores, **facts)
    again = Trace.from_bytes(trace.to_bytes(), "memory")
    assert_equal(trace, again)
    assert again.to_bytes() == trace.to_bytes()


def test_the_bytes_are_those_of_the_document() -> None:
    """One token more than nothing of everything, packed by hand."""
    ids = np.array([[[2, 0]], [[1, 2]], [[0, 1]]], np.uint8)
    scores = np.array([[[1, 2, 3]], [[4, 5, 6]], [[7, 8, 65535]]], np.uint16)
    segments = (
        Segment(2, Phase.PREFILL, begins_sample=True, hand_over=True, position=0),
        Segment(1, Phase.DECODE, begins_sample=False, hand_over=False, position=2),
    )
    payload = struct.pack("<IBBHQ", 2, 0, 3, 0, 0) + struct.pack("<IBBHQ", 1, 1, 0, 0, 2)
    payload += bytes([2, 0, 1, 2, 0, 1]) + struct.pack("<9H", 1, 2, 3, 4, 5, 6, 7, 8, 65535)
    header = b"CFMOETRC" + struct.pack("<6IQQIIQ", 1, 1, 1, 3, 2, 1, 3, 2, 256, 12, 4096) + b"lru".ljust(32, b"\0")
    header += struct.pack("<Q", xxhash.xxh3_64_intdigest(payload))
    header += struct.pack("<Q", xxhash.xxh3_64_intdigest(header)) + bytes(16)
    trace = Trace(ids, segments, 3, scores, chunk_size=256, slots=12, expert_bytes=4096, policy="lru")
    assert len(header) == 128
    assert trace.to_bytes() == header + payload


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"ids": np.zeros((2, 3), np.uint8)}, "the ids have the shape (2, 3), not (tokens, layers, top_k)"),
        ({"ids": np.zeros((0, 3, 2), np.uint8), "segments": ()}, "tokens is 0, not between 1 and"),
        ({"ids": np.zeros((5, 0, 2), np.uint8)}, "layers is 0, not between 1 and 1024"),
        ({"ids": np.zeros((5, 1025, 1), np.uint8)}, "layers is 1025, not between 1 and 1024"),
        ({"ids": np.zeros((5, 3, 0), np.uint8)}, "top_k is 0, not between 1 and 8"),
        ({"ids": np.zeros((5, 3, 9), np.uint8)}, "top_k is 9, not between 1 and 8"),
        ({"experts": 0}, "experts is 0, not between 1 and 65535"),
        ({"experts": 65536}, "experts is 65536, not between 1 and 65535"),
        ({"ids": make_trace().ids.astype(np.uint16)}, "the ids of 8 experts are uint16, not uint8"),
        ({"experts": 7, "ids": np.full((5, 1, 1), 7, np.uint8)}, "token 0, layer 0: expert 7 is not below 7"),
        (
            {"ids": np.array([[[0, 1]], [[3, 3]]], np.uint8), "segments": window_segments(2, 0)},
            "token 1, layer 0: expert 3 is chosen twice",
        ),
        ({"segments": window_segments(4, 2)}, "the segments add up to 4 tokens, not to 5"),
        ({"segments": window_segments(6, 2)}, "the segments add up to 6 tokens, not to 5"),
        ({"segments": ()}, "the segments add up to 0 tokens, not to 5"),
        ({"segments": (*window_segments(5, 2), Segment(0, Phase.DECODE, False, False, 5))}, "segment 2: tokens is 0"),
        ({"segments": (Segment(5, Phase.DECODE, True, False, -1),)}, "segment 0: position is -1"),
        ({"segments": (Segment(5, Phase.DECODE, True, False, 2**48 + 1),)}, "segment 0: position is 281474976710657"),
        (
            {"segments": (Segment(3, Phase.PREFILL, True, False, 0), Segment(2, Phase.DECODE, False, False, 2))},
            "segment 1: position is 2, not between 3 and",
        ),
        ({"segments": (Segment(5, Phase.DECODE, False, False, 0),)}, "segment 0 does not begin a sample, which the first must"),
        ({"segments": (Segment(5, Phase.DECODE, True, True, 0),)}, "segment 0 is decode and hands over, which only prefill does"),
        ({"scores": np.zeros((5, 3, 7), np.uint16)}, "the scores are uint16 of the shape (5, 3, 7), not uint16 of"),
        ({"scores": np.zeros((5, 3, 8), np.float32)}, "the scores are float32 of the shape (5, 3, 8), not uint16 of"),
        ({"chunk_size": 2**32}, "chunk_size is 4294967296, not between 0 and 4294967295"),
        ({"slots": -1}, "slots is -1, not between 0 and"),
        ({"expert_bytes": 2**64}, "expert_bytes is 18446744073709551616, not between"),
        ({"policy": "é"}, "the policy 'é' is not at most 32 printable ASCII characters without spaces"),
        ({"policy": "x" * 33}, "is not at most 32 printable"),
        ({"policy": "a b"}, "is not at most 32 printable"),
        ({"policy": "a\0b"}, "is not at most 32 printable"),
    ],
)
def test_parts_that_contradict(change: dict[str, Any], expected: str) -> None:
    with pytest.raises(CFMoEError) as caught:
        dataclasses.replace(make_trace(), **change)
    assert expected in str(caught.value)


def patched(offset: int, code: str, value: int, reseal: bool = True, scores: bool = False) -> bytes:
    """A sound trace's bytes with one number changed, and with checksums that fit again."""
    data = bytearray(make_trace(scores=scores, policy="lfu").to_bytes())
    struct.pack_into(f"<{code}", data, offset, value)
    if reseal:
        struct.pack_into("<Q", data, 96, xxhash.xxh3_64_intdigest(bytes(data[128:])))
        struct.pack_into("<Q", data, 104, xxhash.xxh3_64_intdigest(bytes(data[:104])))
    return bytes(data)


SOUND = make_trace(policy="lfu").to_bytes()


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "has 0 bytes, but a trace has at least 128"),
        (SOUND[:127], "has 127 bytes, but a trace has at least 128"),
        (SOUND[:128], "has 128 bytes, but its header says"),
        (SOUND[:-1], f"has {len(SOUND) - 1} bytes, but its header says {len(SOUND)}; copy it again"),
        (SOUND + b"\0", f"has {len(SOUND) + 1} bytes, but its header says {len(SOUND)}; copy it again"),
        (patched(0, "B", 0), "is not a routing trace of CFMoE"),
        (patched(8, "I", 2), "has format version 2, but this program reads 1"),
        (patched(20, "I", 9, reseal=False), "its header is damaged (checksum)"),
        (patched(112, "B", 1), "the end of the header is not zero"),
        (patched(127, "B", 1), "the end of the header is not zero"),
        (patched(12, "I", 2), "the header has unknown flags 0x2"),
        (patched(12, "I", 1), "bytes, but its header says"),
        (patched(16, "I", 0), "layers is 0, not between 1 and 1024"),
        (patched(16, "I", 1025), "layers is 1025, not between 1 and 1024"),
        (patched(20, "I", 0), "experts is 0, not between 1 and 65535"),
        (patched(20, "I", 65536), "experts is 65536, not between 1 and 65535"),
        (patched(24, "I", 0), "top_k is 0, not between 1 and 8"),
        (patched(24, "I", 9), "top_k is 9, not between 1 and 8"),
        (patched(28, "I", 2), "id_bytes is 2, not 1 as 8 experts want"),
        (patched(32, "Q", 0), "tokens is 0, not between 1 and 4294967295"),
        (patched(32, "Q", 2**64 - 1), "tokens is 18446744073709551615, not between 1 and 4294967295"),
        (patched(32, "Q", 2**32 - 1), "bytes, but its header says"),
        (patched(40, "Q", 0), "segments is 0, not between 1 and 5"),
        (patched(40, "Q", 6), "segments is 6, not between 1 and 5"),
        (patched(64, "B", 0), "the policy '\\x00fu' is not at most 32 printable ASCII characters"),
        (patched(64, "B", 200), "the policy 'Èfu' is not at most 32 printable ASCII characters"),
        (patched(95, "B", 65), "is not at most 32 printable ASCII characters"),
        (patched(len(SOUND) - 1, "B", 0, reseal=False), "is damaged (checksum)"),
        (patched(128, "B", 9, reseal=False), "is damaged (checksum)"),
        (patched(128, "I", 0), "segment 0: tokens is 0, not between 1 and"),
        (patched(128 + 3 * 16, "I", 2), "the segments add up to 6 tokens, not to 5"),
        (patched(132, "B", 2), "segment 0 has the phase 2, not 0 (prefill) or 1 (decode)"),
        (patched(133, "B", 4), "segment 0 has unknown flags 0x4"),
        (patched(133, "B", 2), "segment 0 does not begin a sample"),
        (patched(134, "H", 3), "segment 0 has 3 where zero must be"),
        (patched(132 + 16, "B", 1) if SOUND[133 + 16] & 2 else patched(133 + 16, "B", 2), "is decode and hands over"),
        (patched(len(SOUND) - 1, "B", 8), "token 4, layer 2: expert 8 is not below 8"),
        (patched(len(SOUND) - 1, "B", SOUND[-2]), f"token 4, layer 2: expert {SOUND[-2]} is chosen twice"),
    ],
)
def test_damaged_files(data: bytes, expected: str) -> None:
    with pytest.raises(CFMoEError) as caught:
        Trace.from_bytes(data, "some.trace")
    message = str(caught.value)
    assert message.startswith("some.trace: ")
    assert expected in message
    assert "\n" not in message


@given(st.data())
def test_no_damage_goes_unseen(data: st.DataObject) -> None:
    """Whatever byte is changed, the reader sees it."""
    damaged = bytearray(SOUND)
    damaged[data.draw(st.integers(0, len(SOUND) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(CFMoEError):
        Trace.from_bytes(bytes(damaged), "x")


def test_write_and_read(tmp_path: Path) -> None:
    path = tmp_path / "a.trace"
    trace = make_trace(scores=True, policy="lru")
    trace.write(path)
    assert path.read_bytes() == trace.to_bytes()
    assert_equal(Trace.read(path), trace)
    with pytest.raises(CFMoEError, match="exists; give --force"):
        make_trace().write(path)
    assert path.read_bytes() == trace.to_bytes()
    make_trace().write(path, force=True)
    assert_equal(Trace.read(path), make_trace())
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.trace"]


def test_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CFMoEError, match=r"cannot write .*a\.trace: no space left on device; free some space"):
        make_trace().write(tmp_path / "a.trace")
    assert list(tmp_path.iterdir()) == []


def test_paths_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(CFMoEError, match=r"cannot read .*: no such file or directory; check the path"):
        Trace.read(tmp_path / "missing")
    with pytest.raises(CFMoEError, match="is a directory; give the path of a file"):
        check_writable(tmp_path, force=True)
    with pytest.raises(CFMoEError, match="its directory does not exist; create it"):
        make_trace().write(tmp_path / "no" / "a.trace")


@pytest.mark.parametrize(
    ("tokens", "prompt", "expected"),
    [
        (5, 2, (Segment(2, Phase.PREFILL, True, True, 0), Segment(3, Phase.DECODE, False, False, 2))),
        (5, 0, (Segment(5, Phase.DECODE, True, False, 0),)),
        (5, 5, (Segment(5, Phase.PREFILL, True, False, 0),)),
        (3, 5, (Segment(3, Phase.PREFILL, True, False, 0),)),
    ],
)
def test_window_segments(tokens: int, prompt: int, expected: tuple[Segment, ...]) -> None:
    assert window_segments(tokens, prompt) == expected

"""Names and numbers of the artifact format, shared by writer and reader."""

from __future__ import annotations

from pathlib import PurePosixPath

FORMAT = "cfmoe-artifact"
FORMAT_VERSION = 1
INDEX_VERSION = 1

MANIFEST = "manifest.json"
INDEX = "index.json"
WEIGHTS = "weights.bin"
EXPERTS = "experts.bin"

TENSOR_ALIGNMENT = 64  # bytes: one cache line, and what the kernels' vector loads want
WEIGHTS_PADDING = 4096  # bytes: weights.bin can be read with O_DIRECT
EXPERT_ALIGNMENT = 16384  # bytes: the page size of Android 15, and enough for O_DIRECT

TENSOR_DTYPES = ("int32", "float16", "float32", "int8", "uint8")
EXPERT_FORMATS = ("q4", "q8", "f16", "f32")
EXPERT_SECTIONS = ("gate_up", "down")

# The manifest seals itself: the digest covers every byte before the comma that opens this suffix.
SEAL_PREFIX = b',\n  "xxh3_64": "'
SEAL_SUFFIX = b'"\n}\n'
SEAL_BYTES = len(SEAL_PREFIX) + 16 + len(SEAL_SUFFIX)


def round_up(value: int, multiple: int) -> int:
    """`value` rounded up to a multiple of `multiple`."""
    return -(-value // multiple) * multiple


def is_inside(relative: str) -> bool:
    """Whether `relative` is a plain path that stays inside the directory that it is relative to."""
    path = PurePosixPath(relative)
    return (
        bool(path.parts)
        and not path.is_absolute()
        and ".." not in path.parts
        and path.as_posix() == relative
        and not any(ord(char) < 32 or char == "\\" for char in relative)
    )

"""Writes an artifact directory: streams tensors and expert records, and leaves either a complete artifact or nothing."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np

from cfmoe.artifact.digest import Bytes, StreamDigest, xxh3_64
from cfmoe.artifact.journal import Journal
from cfmoe.artifact.layout import (
    EXPERT_ALIGNMENT,
    EXPERT_FORMATS,
    EXPERT_SECTIONS,
    EXPERTS,
    FORMAT,
    FORMAT_VERSION,
    INDEX,
    INDEX_VERSION,
    MANIFEST,
    SEAL_PREFIX,
    SEAL_SUFFIX,
    TENSOR_ALIGNMENT,
    TENSOR_DTYPES,
    WEIGHTS,
    WEIGHTS_PADDING,
    is_inside,
    round_up,
)
from cfmoe.artifact.staging import StagingDirectory
from cfmoe.errors import os_error

_COPY_BYTES = 1 << 20


class ArtifactWriter:
    """Use as a context manager and call `finish` last; leaving it in any other way removes all that was written.

    Tensors go to weights.bin in the order of the calls, records to experts.bin layer by layer. Nothing is kept in memory but the
    index. Raises CFMoEError for what the user can mend (`out` exists, full disk, no permission), ValueError for a wrong call.

    With `resume`, a text that names everything the records depend on, what was written is kept instead: the next writer for `out` with
    the same text has the records that are whole already (`records_done`) and takes the rest.
    """

    def __init__(self, out: Path, force: bool = False, resume: str | None = None) -> None:
        self._out = Path(out)
        self._staging = StagingDirectory(self._out, force, resume=resume is not None)
        self._finished = False
        self._files: dict[str, dict[str, int | str]] = {}
        self._weights: list[dict[str, Any]] = []
        self._weight_names: set[str] = set()
        self._experts: dict[str, Any] | None = None
        self._streams: dict[str, _Stream] = {}
        self._journal: Journal | None = None
        if resume is not None:
            try:
                self._journal = Journal(self._staging.path, self._staging.path / EXPERTS, resume, self._out / EXPERTS)
            except BaseException:
                self._staging.discard()
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._finished:
            return
        for stream in self._streams.values():
            stream.abandon()
        self._staging.discard()
        if kind is None:
            raise ValueError("ArtifactWriter was left without finish")

    def add_weight(self, name: str, array: np.ndarray) -> None:
        """Appends a tensor to weights.bin at the next multiple of 64 bytes. `name` is unique, `array` not empty."""
        if name in self._weight_names:
            raise ValueError(f"weight {name} was added twice")
        if array.dtype.name not in TENSOR_DTYPES or array.size == 0:
            raise ValueError(f"weight {name}: dtype {array.dtype}, shape {array.shape}: want a non-empty one of {TENSOR_DTYPES}")
        stream = self._stream(WEIGHTS)
        stream.pad_to(TENSOR_ALIGNMENT)
        data = _bytes_of(array)
        self._weight_names.add(name)
        self._weights.append(
            {
                "name": name,
                "offset": stream.size,
                "size": len(data),
                "dtype": array.dtype.name,
                "shape": list(array.shape),
                "xxh3_64": xxh3_64(data),
            }
        )
        stream.write(data)

    def set_expert_layout(self, format: str, layers: int, experts: int, record_bytes: int, sections: dict[str, tuple[int, int]]) -> None:
        """Declares the records before the first `add_expert`. `sections` maps gate_up and down to (offset, size) in bytes."""
        if self._experts is not None:
            raise ValueError("the expert layout was set twice")
        if format not in EXPERT_FORMATS or layers < 1 or experts < 1 or record_bytes < 1:
            raise ValueError(f"expert layout {format}, {layers} layers, {experts} experts, {record_bytes} bytes")
        if set(sections) != set(EXPERT_SECTIONS):
            raise ValueError(f"sections {sorted(sections)}: want {EXPERT_SECTIONS}")
        for name, (offset, size) in sections.items():
            if offset < 0 or size < 1 or offset % TENSOR_ALIGNMENT or offset + size > record_bytes:
                raise ValueError(f"section {name} at {offset}, {size} bytes: not 64-byte aligned inside {record_bytes} bytes")
        self._experts = {
            "format": format,
            "layers": layers,
            "experts": experts,
            "record_bytes": record_bytes,
            "record_stride": round_up(record_bytes, EXPERT_ALIGNMENT),
            "alignment": EXPERT_ALIGNMENT,
            "sections": {name: {"offset": sections[name][0], "size": sections[name][1]} for name in EXPERT_SECTIONS},
            "xxh3_64": [],
        }
        if self._journal is not None:
            self._streams[EXPERTS] = _Stream(self._staging.path / EXPERTS, self._out / EXPERTS, append=True)
            self._journal.restore(record_bytes, self._experts["record_stride"], self._restore)

    def _restore(self, digest: str, data: bytes) -> None:
        self._note_record(digest)
        self._streams[EXPERTS].digest.update(data)

    def _note_record(self, digest: str) -> None:
        layout = self._layout()
        if self.records_done % layout["experts"] == 0:
            layout["xxh3_64"].append([])
        layout["xxh3_64"][-1].append(digest)

    @property
    def records_done(self) -> int:
        """How many records are written, those of an interrupted conversion among them."""
        return sum(map(len, self._layout()["xxh3_64"]))

    def add_expert(self, layer: int, expert: int, record: np.ndarray) -> None:
        """Appends one record of exactly `record_bytes`; layer by layer, in each the experts in order."""
        layout = self._layout()
        done = self.records_done
        if (layer, expert) != divmod(done, layout["experts"]) or layer >= layout["layers"]:
            raise ValueError(f"expert ({layer}, {expert}) after {done} records: records come in order")
        data = _bytes_of(record)
        if len(data) != layout["record_bytes"]:
            raise ValueError(f"expert ({layer}, {expert}) has {len(data)} bytes, the layout says {layout['record_bytes']}")
        digest = xxh3_64(data)
        self._note_record(digest)
        stream = self._stream(EXPERTS)
        stream.write(data)
        stream.pad_to(layout["record_stride"])
        if self._journal is not None:
            self._journal.note(digest)

    def add_file(self, relative: str, data: bytes) -> None:
        """Writes a whole file, `relative` to the artifact with forward slashes."""
        self._check_free(relative)
        stream = _Stream(self._staging.path / relative, self._out / relative)
        self._streams[relative] = stream
        stream.write(data)
        self._close(relative)

    def copy_file(self, source: Path, relative: str) -> None:
        """Copies `source` into the artifact as `relative`, in pieces."""
        self._check_free(relative)
        try:
            reader = open(source, "rb")  # noqa: SIM115 (an error in opening is told apart from one in writing)
        except OSError as error:
            raise os_error(error, source, "read") from error
        with reader:
            stream = _Stream(self._staging.path / relative, self._out / relative)
            self._streams[relative] = stream
            while piece := _read(reader, source):
                stream.write(piece)
        self._close(relative)

    def finish(self, manifest: dict[str, Any]) -> Path:
        """Writes index and sealed manifest and puts the artifact in its place; returns its path.

        `manifest` holds every field but format, format_version, files and the seal, which are added here.
        """
        layout = self._layout()
        if self.records_done != layout["layers"] * layout["experts"] or not self._weights:
            raise ValueError("the artifact is not complete: records or weights are missing")
        if taken := {"format", "format_version", "files", "xxh3_64"} & set(manifest):
            raise ValueError(f"the writer sets {sorted(taken)} itself")
        self._streams[WEIGHTS].pad_to(WEIGHTS_PADDING)
        self._close(WEIGHTS)
        self._close(EXPERTS)
        index = {"version": INDEX_VERSION, "weights": self._weights, "experts": layout}
        self.add_file(INDEX, _json(index) + b"\n")
        head = {"format": FORMAT, "format_version": FORMAT_VERSION}
        manifest_stream = _Stream(self._staging.path / MANIFEST, self._out / MANIFEST)
        manifest_stream.write(seal(head | manifest | {"files": dict(sorted(self._files.items()))}))
        manifest_stream.close()
        if self._journal is not None:
            self._journal.remove()
        self._staging.commit()
        self._finished = True
        return self._out

    def _layout(self) -> dict[str, Any]:
        if self._experts is None:
            raise ValueError("set_expert_layout comes first")
        return self._experts

    def _stream(self, name: str) -> _Stream:
        if name not in self._streams:
            self._streams[name] = _Stream(self._staging.path / name, self._out / name)
        return self._streams[name]

    def _check_free(self, relative: str) -> None:
        if not is_inside(relative):
            raise ValueError(f"{relative!r} is not a path inside the artifact")
        if relative in self._files or relative in self._streams or relative in (MANIFEST, WEIGHTS, EXPERTS):
            raise ValueError(f"{relative} was written already or is the writer's own")

    def _close(self, name: str) -> None:
        stream = self._streams[name]
        stream.close()
        self._files[name] = stream.digest.entry()


class _Stream:
    """One output file with its running digests; errors name the file's final place, since the staged one will be gone."""

    def __init__(self, path: Path, shown: Path, append: bool = False) -> None:
        self.digest = StreamDigest()
        self._shown = shown
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered: pieces are large, and after a failure there must be nothing left to flush.
            self._file = open(path, "ab" if append else "xb", buffering=0)  # noqa: SIM115 (ended by close or abandon)
        except OSError as error:
            raise os_error(error, shown, "write") from error

    @property
    def size(self) -> int:
        return self.digest.size

    def write(self, data: Bytes) -> None:
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise os_error(error, self._shown, "write") from error
        self.digest.update(data)

    def pad_to(self, multiple: int) -> None:
        if missing := -self.size % multiple:
            self.write(bytes(missing))

    def close(self) -> None:
        """Ends the file once it is on the disk: with delayed allocation a full disk shows only here."""
        try:
            os.fsync(self._file.fileno())
            self._file.close()
        except OSError as error:
            raise os_error(error, self._shown, "write") from error

    def abandon(self) -> None:
        with contextlib.suppress(OSError):  # the file is about to be removed
            self._file.close()


def seal(manifest: dict[str, Any]) -> bytes:
    """The manifest's text with its own digest at the end."""
    body = _json(manifest).removesuffix(b"\n}")
    return body + SEAL_PREFIX + xxh3_64(body).encode() + SEAL_SUFFIX


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, indent=2, allow_nan=False).encode()


def _bytes_of(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _read(reader: BinaryIO, source: Path) -> bytes:
    try:
        return reader.read(_COPY_BYTES)
    except OSError as error:
        raise os_error(error, source, "read") from error

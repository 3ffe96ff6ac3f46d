"""Opens an artifact directory: manifest and index with every field checked, and verification of all files' digests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfmoe.artifact.chat_format import ChatFormat, parse_chat
from cfmoe.artifact.digest import xxh3_64
from cfmoe.artifact.fields import Fields
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
    SEAL_BYTES,
    SEAL_PREFIX,
    SEAL_SUFFIX,
    TENSOR_ALIGNMENT,
    TENSOR_DTYPES,
    WEIGHTS,
    is_inside,
)
from cfmoe.errors import CFMoEError, os_error

_READ_BYTES = 1 << 20
_JSON_BYTES = 256 << 20  # more than any index: 1,000 layers of 1,000 experts stay below 64 MB
_COUNT = 1 << 24  # bound of layers, experts, heads and the like
_SIZE = 1 << 48  # bound of file sizes and offsets, bytes
_RECOMPILE = "compile the model again"


@dataclass(frozen=True)
class ModelFacts:
    """What the manifest says about the model; sizes are element counts, `context_size` tokens."""

    family: str
    name: str
    parameters: int
    num_layers: int
    hidden_size: int
    vocab_size: int
    context_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    moe_layers: tuple[int, ...]
    num_experts: int
    top_k: int
    expert_ffn_size: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Target:
    """One set of kernels, named by `kernel_set`; `library` and `plan` are relative to the artifact."""

    name: str
    device: str
    arch: str
    features: tuple[str, ...]
    kernel_set: str
    library: str
    plan: str


@dataclass(frozen=True)
class FileEntry:
    """A row of the manifest's file table; `size` in bytes."""

    size: int
    sha256: str
    xxh3_64: str


@dataclass(frozen=True)
class Manifest:
    model: ModelFacts
    quantisation_preset: str
    quantisation_classes: dict[str, str]
    group_size: int
    prefill_chunk: int
    kv_dtype: str
    kernel_set: str
    targets: dict[str, Target]
    tokenizer_files: tuple[str, ...]
    files: dict[str, FileEntry]
    provenance: dict[str, str]
    decoder: dict[str, Any] | None  # checked by who compiles from it; None: an artifact of an older version
    chat: ChatFormat | None
    chat_absent: str  # why `chat` is None although there is a chat template; "" if there is none


@dataclass(frozen=True)
class WeightEntry:
    """A tensor of weights.bin; `offset` and `size` in bytes."""

    name: str
    offset: int
    size: int
    dtype: str
    shape: tuple[int, ...]
    xxh3_64: str


@dataclass(frozen=True)
class ExpertLayout:
    """The records of experts.bin; all sizes in bytes. `sections` maps a name to (offset, size) in the record."""

    format: str
    layers: int
    experts: int
    record_bytes: int
    record_stride: int
    sections: dict[str, tuple[int, int]]
    xxh3_64: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Index:
    weights: tuple[WeightEntry, ...]
    experts: ExpertLayout


@dataclass(frozen=True)
class Artifact:
    """An artifact whose manifest and index were read and found consistent with the sizes of its files."""

    path: Path
    manifest: Manifest
    index: Index

    @classmethod
    def open(cls, path: Path | str) -> Artifact:
        """Raises CFMoEError naming the file, the value and the remedy where something is missing or wrong."""
        path = Path(path)
        if not path.is_dir():
            what = "is a file" if path.exists() else "does not exist"
            raise CFMoEError(f"{path} {what}; give an artifact directory that `cfmoe compile` wrote")
        if not (path / MANIFEST).exists():
            checkpoint = (path / "config.json").exists()
            remedy = "it is a checkpoint: compile it with `cfmoe compile`" if checkpoint else "give a directory that `cfmoe compile` wrote"
            raise CFMoEError(f"{path} is no artifact, it has no {MANIFEST}; {remedy}")
        manifest = _parse_manifest(path / MANIFEST)
        for relative, entry in manifest.files.items():
            _check_size(path / relative, entry)
        index = _parse_index(path / INDEX, manifest)
        return cls(path, manifest, index)

    def verify(self, progress: Callable[[str, int, int], None] | None = None) -> int:
        """Reads every file and compares its SHA-256; returns the bytes read. Raises CFMoEError naming the first bad file.

        `progress` gets the file's name, bytes done and bytes in all.
        """
        total = sum(entry.size for entry in self.manifest.files.values())
        done = 0
        for relative, entry in self.manifest.files.items():
            path = self.path / relative
            digest = hashlib.sha256()
            try:
                with open(path, "rb") as file:
                    while piece := file.read(_READ_BYTES):
                        digest.update(piece)
                        done += len(piece)
                        if progress is not None:
                            progress(relative, done, total)
            except OSError as error:
                raise os_error(error, path, "read") from error
            if digest.hexdigest() != entry.sha256:
                raise CFMoEError(
                    f"{path} is damaged: its SHA-256 is {digest.hexdigest()[:16]}…, {MANIFEST} says {entry.sha256[:16]}…; "
                    f"copy the artifact again or {_RECOMPILE}"
                )
        return done

    @property
    def expert_bytes(self) -> int:
        """Bytes of all expert records as they lie in memory and in the file, padding included."""
        layout = self.index.experts
        return layout.layers * layout.experts * layout.record_stride

    def value_dim(self) -> int:
        """Width of a head's values, which a plan tells; the manifest has that of queries and keys. Raises CFMoEError."""
        path = self.path / next(iter(self.manifest.targets.values())).plan
        shape = _parse_object(_read_json_bytes(path), path).object("kv").value("v_shape")
        width = shape[-1] if isinstance(shape, list) and shape else None
        if not isinstance(width, int) or isinstance(width, bool) or not 1 <= width <= _COUNT:
            raise CFMoEError(f"{path}: kv.v_shape is {shape!r}, which does not end in a width; {_RECOMPILE}")
        return width


def _read_json_bytes(path: Path) -> bytes:
    try:
        if path.stat().st_size > _JSON_BYTES:
            raise CFMoEError(f"{path} has {path.stat().st_size} bytes, too many for this file; {_RECOMPILE}")
        return path.read_bytes()
    except OSError as error:
        raise os_error(error, path, "read") from error


def _parse_object(data: bytes, path: Path) -> Fields:
    try:
        return Fields(path, json.loads(data.decode("utf-8")))
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise CFMoEError(f"{path} is damaged or cut short: {reason}; {_RECOMPILE}") from error


def _parse_manifest(path: Path) -> Manifest:
    data = _read_json_bytes(path)
    root = _parse_object(data, path)
    if root.value("format") != FORMAT:
        raise CFMoEError(f"{path} is not the manifest of a CFMoE artifact: format is {root.value('format')!r}, not {FORMAT!r}")
    if (version := root.value("format_version")) != FORMAT_VERSION:
        raise CFMoEError(
            f"{path} has format version {version!r}, this cfmoe reads version {FORMAT_VERSION}; "
            "compile the model again with this version, or install the one that wrote it"
        )
    _check_seal(data, path)
    quantisation = root.object("quantisation")
    model = _parse_model(root.object("model"))
    manifest = Manifest(
        model=model,
        quantisation_preset=quantisation.text("preset"),
        quantisation_classes=quantisation.object("classes").texts(),
        group_size=quantisation.integer("group_size", 1, _COUNT),
        prefill_chunk=root.integer("prefill_chunk", 1, _COUNT),
        kv_dtype=root.choice("kv_dtype", ("float16", "float32")),
        kernel_set=root.text("kernel_set"),
        targets={name: _parse_target(name, fields, root.text("kernel_set")) for name, fields in root.object("targets").objects()},
        tokenizer_files=tuple(root.text_list("tokenizer_files")),
        files={name: _parse_file(name, fields) for name, fields in root.object("files").objects()},
        provenance=root.object("provenance").texts(),
        decoder=root.value("decoder") if root.has("decoder") else None,
        chat=parse_chat(root.object("chat"), model.vocab_size) if root.has("chat") else None,
        chat_absent=root.text("chat_absent") if root.has("chat_absent") else "",
    )
    for needed in (INDEX, WEIGHTS, EXPERTS, *manifest.tokenizer_files):
        if needed not in manifest.files:
            raise root.wrong("files", f"has no row for {needed}")
    for target in manifest.targets.values():
        for relative in (target.library, target.plan):
            if relative not in manifest.files:
                raise root.wrong("files", f"has no row for {relative} of target {target.name}")
    return manifest


def _check_seal(data: bytes, path: Path) -> None:
    tail = data[-SEAL_BYTES:]
    if not (tail.startswith(SEAL_PREFIX) and tail.endswith(SEAL_SUFFIX)):
        raise CFMoEError(f"{path} does not end in its seal, so it was edited or cut short; {_RECOMPILE}")
    if xxh3_64(data[:-SEAL_BYTES]) != tail[len(SEAL_PREFIX) : -len(SEAL_SUFFIX)].decode("ascii", "replace"):
        raise CFMoEError(f"{path} does not match its seal, so it was edited or damaged; copy the artifact again or {_RECOMPILE}")


def _parse_model(fields: Fields) -> ModelFacts:
    router = fields.object("router")
    router.choice("score", ("softmax", "sigmoid"))
    vocab_size = fields.integer("vocab_size", 1, _COUNT)
    num_layers = fields.integer("num_layers", 1, _COUNT)
    num_experts = fields.integer("num_experts", 1, _COUNT)
    return ModelFacts(
        family=fields.text("family"),
        name=fields.text("name"),
        parameters=fields.integer("parameters", 0, _SIZE),
        num_layers=num_layers,
        hidden_size=fields.integer("hidden_size", 1, _COUNT),
        vocab_size=vocab_size,
        context_size=fields.integer("context_size", 1, _COUNT),
        num_heads=fields.integer("num_heads", 1, _COUNT),
        num_kv_heads=fields.integer("num_kv_heads", 1, _COUNT),
        head_dim=fields.integer("head_dim", 1, _COUNT),
        moe_layers=tuple(fields.integer_list("moe_layers", 0, num_layers - 1)),
        num_experts=num_experts,
        top_k=fields.integer("top_k", 1, num_experts),
        expert_ffn_size=fields.integer("expert_ffn_size", 1, _COUNT),
        bos_token_id=None if fields.value("bos_token_id") is None else fields.integer("bos_token_id", 0, vocab_size - 1),
        eos_token_ids=tuple(fields.integer_list("eos_token_ids", 0, vocab_size - 1)),
    )


def _parse_target(name: str, fields: Fields, kernel_set: str) -> Target:
    target = Target(
        name=name,
        device=fields.text("device"),
        arch=fields.text("arch"),
        features=tuple(fields.text_list("features")),
        kernel_set=fields.text("kernel_set") if fields.has("kernel_set") else kernel_set,
        library=fields.text("library"),
        plan=fields.text("plan"),
    )
    return target


def _parse_file(name: str, fields: Fields) -> FileEntry:
    if not is_inside(name):
        raise CFMoEError(f"{fields.path}: files names {name!r}, which is not inside the artifact; {_RECOMPILE}")
    return FileEntry(size=fields.integer("size", 0, _SIZE), sha256=fields.hex("sha256", 64), xxh3_64=fields.hex("xxh3_64", 16))


def _check_size(path: Path, entry: FileEntry) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise os_error(error, path, "read") from error
    if size != entry.size:
        what = "was cut short" if size < entry.size else "is too long"
        raise CFMoEError(f"{path} {what}: {size} bytes, {MANIFEST} says {entry.size}; copy the artifact again or {_RECOMPILE}")


def _parse_index(path: Path, manifest: Manifest) -> Index:
    root = _parse_object(_read_json_bytes(path), path)
    if (version := root.value("version")) != INDEX_VERSION:
        raise CFMoEError(f"{path} has version {version!r}, this cfmoe reads version {INDEX_VERSION}; {_RECOMPILE}")
    weights_size = manifest.files[WEIGHTS].size
    weights = tuple(_parse_weight(fields, weights_size) for fields in root.object_list("weights"))
    fields = root.object("experts")
    record_bytes = fields.integer("record_bytes", 1, _SIZE)
    stride = fields.integer("record_stride", record_bytes, _SIZE)
    if fields.integer("alignment", EXPERT_ALIGNMENT, EXPERT_ALIGNMENT) and stride % EXPERT_ALIGNMENT:
        raise fields.wrong("record_stride", f"is {stride}, not a multiple of {EXPERT_ALIGNMENT}")
    sections = {}
    for name in EXPERT_SECTIONS:
        section = fields.object("sections").object(name)
        offset = section.integer("offset", 0, record_bytes)
        sections[name] = (offset, section.integer("size", 1, record_bytes - offset))
    layout = ExpertLayout(
        format=fields.choice("format", EXPERT_FORMATS),
        layers=fields.integer("layers", len(manifest.model.moe_layers), len(manifest.model.moe_layers)),
        experts=fields.integer("experts", manifest.model.num_experts, manifest.model.num_experts),
        record_bytes=record_bytes,
        record_stride=stride,
        sections=sections,
        xxh3_64=tuple(tuple(row) for row in fields.hex_table("xxh3_64", 16)),
    )
    if any(len(row) != layout.experts for row in layout.xxh3_64) or len(layout.xxh3_64) != layout.layers:
        raise fields.wrong("xxh3_64", f"is not a table of {layout.layers} x {layout.experts} digests")
    if (want := layout.layers * layout.experts * stride) != manifest.files[EXPERTS].size:
        raise fields.wrong("record_stride", f"makes {want} bytes, {EXPERTS} has {manifest.files[EXPERTS].size}")
    return Index(weights, layout)


def _parse_weight(fields: Fields, file_size: int) -> WeightEntry:
    offset = fields.integer("offset", 0, file_size)
    entry = WeightEntry(
        name=fields.text("name"),
        offset=offset,
        size=fields.integer("size", 1, file_size - offset),
        dtype=fields.choice("dtype", TENSOR_DTYPES),
        shape=tuple(fields.integer_list("shape", 1, _SIZE)),
        xxh3_64=fields.hex("xxh3_64", 16),
    )
    if offset % TENSOR_ALIGNMENT:
        raise fields.wrong("offset", f"is {offset}, not a multiple of {TENSOR_ALIGNMENT}")
    return entry

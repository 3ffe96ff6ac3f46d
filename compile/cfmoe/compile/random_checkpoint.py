"""Full-size checkpoints with random weights, written tensor by tensor: what benchmarks need of a model is its shape and its routing."""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from cfmoe.artifact.staging import StagingDirectory
from cfmoe.compile.decoder_config import DecoderConfig, LatentAttention
from cfmoe.compile.families import FAMILIES, resolve
from cfmoe.compile.families.base import WeightNames
from cfmoe.compile.named_configs import CONFIGS
from cfmoe.errors import CFMoEError

Progress = Callable[[str, int, int], None]

_STD = 0.02
_SHARD_BYTES = 2 << 30
_PIECE = 1 << 22  # values made at once
_BYTES = {"BF16": 2, "F32": 4, "U8": 1}
# Uniform FP4 codes have a root mean square of 2.93; 2^-7 of that is close to _STD.
_MXFP4_SCALE = 120
_FACTS = "random.json"


@dataclass(frozen=True)
class Tensor:
    """`fill` is one of normal (of deviation `std`), ones, zeros, embedding, codes and scales (MXFP4)."""

    name: str
    shape: tuple[int, ...]
    std: float = _STD
    fill: str = "normal"
    dtype: str = "BF16"

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.count * _BYTES[self.dtype]


def tensors(c: DecoderConfig, names: WeightNames, packed: bool) -> Iterator[Tensor]:
    """Every tensor of a checkpoint in the published layout of its family; `packed`: the experts are in MXFP4.

    Projections back into the residual stream have a deviation smaller by sqrt(2 * layers), as in GPT-2 (Radford et al. 2019).
    """
    back = _STD / math.sqrt(2 * c.num_layers)
    # What blocks add must stay small beside the embedding: attention's part is nearly the same for all tokens, and routing would be too.
    yield Tensor(names.embedding, (c.vocab_size, c.hidden_size), 1.0, fill="embedding")
    for layer in range(c.num_layers):
        yield from (_at(t, layer) for t in (_ones(names.input_norm, c.hidden_size), _ones(names.post_norm, c.hidden_size)))
        yield from (_at(t, layer) for t in _attention(c, names.attention, back))
        if layer in c.moe_layers:
            yield from (_at(t, layer) for t in _experts(c, names, back, packed))
        else:
            yield from (_at(t, layer) for t in _feed_forward(names.dense, c.hidden_size, c.dense_ffn_size, back))
    yield _ones(names.final_norm, c.hidden_size)
    if not c.tie_embeddings:
        yield Tensor(names.head, (c.vocab_size, c.hidden_size))


def _at(tensor: Tensor, layer: int) -> Tensor:
    return Tensor(tensor.name.replace("{l}", str(layer)), tensor.shape, tensor.std, tensor.fill, tensor.dtype)


def _ones(name: str, width: int) -> Tensor:
    return Tensor(name, (width,), fill="ones")


def _attention(c: DecoderConfig, prefix: str, back: float) -> Iterator[Tensor]:
    if c.latent is not None:
        yield from _latent(c, c.latent, prefix)
    else:
        for name, heads in (("q", c.num_heads), ("k", c.num_kv_heads), ("v", c.num_kv_heads)):
            yield Tensor(f"{prefix}{name}_proj.weight", (heads * c.head_dim, c.hidden_size))
            if c.qkv_bias:
                yield Tensor(f"{prefix}{name}_proj.bias", (heads * c.head_dim,))
    yield Tensor(f"{prefix}o_proj.weight", (c.hidden_size, c.num_heads * c.value_dim), back)
    if c.o_bias:
        yield Tensor(f"{prefix}o_proj.bias", (c.hidden_size,), fill="zeros")
    if c.sinks:
        yield Tensor(f"{prefix}sinks", (c.num_heads,))
    if c.qk_norm != "none":
        counts = (1, 1) if c.qk_norm == "head" else (c.num_heads, c.num_kv_heads)
        yield _ones(f"{prefix}q_norm.weight", counts[0] * c.head_dim)
        yield _ones(f"{prefix}k_norm.weight", counts[1] * c.head_dim)


def _latent(c: DecoderConfig, m: LatentAttention, prefix: str) -> Iterator[Tensor]:
    if m.q_rank:
        yield Tensor(f"{prefix}q_a_proj.weight", (m.q_rank, c.hidden_size))
        yield _ones(f"{prefix}q_a_layernorm.weight", m.q_rank)
    yield Tensor(f"{prefix}{'q_b_proj' if m.q_rank else 'q_proj'}.weight", (c.num_heads * c.head_dim, m.q_rank or c.hidden_size))
    yield Tensor(f"{prefix}kv_a_proj_with_mqa.weight", (m.kv_rank + m.rope, c.hidden_size))
    yield _ones(f"{prefix}kv_a_layernorm.weight", m.kv_rank)
    yield Tensor(f"{prefix}kv_b_proj.weight", (c.num_heads * (m.nope + m.value), m.kv_rank))


def _feed_forward(template: str, hidden: int, ffn: int, back: float) -> Iterator[Tensor]:
    for part, shape, std in (("gate", (ffn, hidden), _STD), ("up", (ffn, hidden), _STD), ("down", (hidden, ffn), back)):
        yield Tensor(template.replace("{part}", part), shape, std)


def _experts(c: DecoderConfig, names: WeightNames, back: float, packed: bool) -> Iterator[Tensor]:
    hidden, ffn, count = c.hidden_size, c.expert_ffn_size, c.num_experts
    yield Tensor(f"{names.router}.weight", (count, hidden))
    if c.router_bias:
        yield Tensor(f"{names.router}.bias", (count,), fill="zeros")
    if names.fused_transposed:
        for name, outputs, inputs, std in ((names.fused_gate_up, 2 * ffn, hidden, _STD), (names.fused_down, hidden, ffn, back)):
            if packed:
                yield Tensor(f"{name}_blocks", (count, outputs, inputs // 32, 16), fill="codes", dtype="U8")
                yield Tensor(f"{name}_scales", (count, outputs, inputs // 32), fill="scales", dtype="U8")
            else:
                yield Tensor(name, (count, inputs, outputs), std)
            yield Tensor(f"{name}_bias", (count, outputs), fill="zeros")
    elif names.fused_gate_up.endswith(".weight"):  # Granite's own layout; elsewhere stacks are what transformers keeps in memory
        yield Tensor(names.fused_gate_up, (count, 2 * ffn, hidden))
        yield Tensor(names.fused_down, (count, hidden, ffn), back)
    else:
        gate, up, down = names.parts
        for expert in range(count):
            template = names.expert.replace("{e}", str(expert))
            for part, shape, std in ((gate, (ffn, hidden), _STD), (up, (ffn, hidden), _STD), (down, (hidden, ffn), back)):
                yield Tensor(template.replace("{part}", part), shape, std)
    if c.shared_ffn_size:
        yield from _feed_forward(names.shared, hidden, c.shared_ffn_size, back)
        if c.shared_gate:
            yield Tensor(names.shared_gate, (1, hidden))


def pieces(tensor: Tensor, locality: float, seed: Sequence[int]) -> Iterator[np.ndarray]:
    """The tensor's values in order, flat, a bounded number at a time. They depend on `seed` and the tensor alone."""
    rng = np.random.Generator(np.random.SFC64(list(seed)))
    width = tensor.shape[-1]
    common = rng.standard_normal(width, np.float32)
    step = max(1, _PIECE // width) * width
    for start in range(0, tensor.count, step):
        size = min(step, tensor.count - start)
        if tensor.fill in ("codes", "scales"):
            high = (0, 256) if tensor.fill == "codes" else (_MXFP4_SCALE, _MXFP4_SCALE + 1)
            yield rng.integers(*high, size, np.uint8)
        elif tensor.fill in ("ones", "zeros"):
            yield np.full(size, tensor.fill == "ones", ml_dtypes.bfloat16)
        else:
            values = rng.standard_normal(size, np.float32)
            if tensor.fill == "embedding" and locality:
                rows = values.reshape(-1, width)
                rows *= np.float32(math.sqrt(1 - locality))
                rows += np.float32(math.sqrt(locality)) * common
            values *= np.float32(tensor.std)
            yield values.astype(ml_dtypes.bfloat16)


def _shards(every: Sequence[Tensor]) -> list[list[Tensor]]:
    shards: list[list[Tensor]] = [[]]
    filled = 0
    for tensor in every:
        if shards[-1] and filled + tensor.bytes > _SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.bytes
    return shards


def _header(shard: Sequence[Tensor]) -> bytes:
    """A safetensors header: its length, then where each tensor lies behind it."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in shard:
        table[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, offset + tensor.bytes]}
        offset += tensor.bytes
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def tokenizer_json(vocabulary: int) -> dict[str, Any]:
    """A byte-level tokenizer of `vocabulary` ids: one per byte, then one per number, so that every id decodes to something.

    Id 256 is the one merge, of two bytes that no text has: some readers take no tokenizer without merges.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    # GPT-2's alphabet: bytes that do not print are shifted behind 255.
    alphabet = {chr(byte): byte for byte in printable}
    alphabet |= {chr(256 + i): byte for i, byte in enumerate(b for b in range(256) if b not in printable)}
    table = {char: byte for char, byte in sorted(alphabet.items(), key=lambda item: item[1]) if byte < vocabulary}
    table |= {f"<{number}>" if number > 256 else "ÿÿ": number for number in range(256, vocabulary)}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": table,
            "merges": [["ÿ", "ÿ"]] if vocabulary > 256 else [],
        },
    }


def configuration(name: str, layers: int | None) -> dict[str, Any]:
    """config.json of the public model `name`, cut to its first `layers` layers."""
    if name not in CONFIGS:
        raise CFMoEError(f"{name} is not known; known are {', '.join(sorted(CONFIGS))}")
    config: dict[str, Any] = {
        "architectures": ["RandomWeights"],
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    } | CONFIGS[name]
    if layers is not None:
        if not 1 <= layers <= config["num_hidden_layers"]:
            raise CFMoEError(f"--layers {layers} is out of range; {name} has {config['num_hidden_layers']}")
        config["num_hidden_layers"] = layers
    return config


def make_random(
    name: str,
    out: Path,
    *,
    layers: int | None = None,
    locality: float = 0.0,
    seed: int = 0,
    force: bool = False,
    progress: Progress = lambda _what, _done, _total: None,
) -> dict[str, Any]:
    """Writes a checkpoint of the public model `name` with random bf16 weights; returns the facts that random.json in it holds.

    `locality` in [0, 1) is the share of a token's embedding that all tokens have in common: the higher, the more alike are the
    routers' inputs and hence the experts of different tokens (in OLMoE's shape 0 gives an ECR of 0.12, 0.5 one of 0.38). Nothing is
    kept in memory but a few megabytes of the tensor being written. Raises CFMoEError where the disk is too small; nothing
    half-written is left.
    """
    if not 0.0 <= locality < 1.0:
        raise CFMoEError(f"--locality {locality:g} is out of range; use 0 to below 1")
    config = configuration(name, layers)
    decoder, names = resolve(config, name)
    packed = FAMILIES[config["model_type"]].packed_weights is not None and "quantization_config" in config
    every = list(tensors(decoder, names, packed))
    total = sum(tensor.bytes for tensor in every)
    with StagingDirectory(out, force, recognise=lambda path: (path / _FACTS).is_file(), kind="random checkpoints") as staging:
        free = shutil.disk_usage(staging.path).free
        if free < total + (64 << 20):
            raise CFMoEError(f"{out}: {total / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free; use --layers, or another place")
        facts = {
            "name": name,
            "layers": decoder.num_layers,
            "locality": locality,
            "seed": seed,
            "bytes": total,
            "parameters": _parameters(every),
        }
        _write_shards(staging.path, every, locality, seed, progress, total)
        for file, value in (("config.json", config), ("tokenizer.json", tokenizer_json(decoder.vocab_size)), (_FACTS, facts)):
            (staging.path / file).write_text(json.dumps(value, indent=None if file == "tokenizer.json" else 2) + "\n")
        staging.commit()
    return facts


def _parameters(every: Sequence[Tensor]) -> int:
    return sum(t.count * 2 if t.fill == "codes" else t.count for t in every if t.fill != "scales")


def _write_shards(directory: Path, every: Sequence[Tensor], locality: float, seed: int, progress: Progress, total: int) -> None:
    shards = _shards(every)
    weight_map: dict[str, str] = {}
    number = {tensor.name: i for i, tensor in enumerate(every)}
    done = 0
    for index, shard in enumerate(shards, 1):
        file = f"model-{index:05}-of-{len(shards):05}.safetensors"
        with open(directory / file, "wb") as stream:
            stream.write(_header(shard))
            for tensor in shard:
                weight_map[tensor.name] = file
                for piece in pieces(tensor, locality, (seed, number[tensor.name])):
                    stream.write(piece.view(np.uint8).data)
                    done += piece.nbytes
                    progress("random weights", done, total)
    index_file = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index_file, indent=2) + "\n")

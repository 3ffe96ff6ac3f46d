"""Streams a checkpoint's weights into an artifact: packed, layer by layer, a few matrices in memory at a time."""

from __future__ import annotations

import collections
import functools
import itertools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from cfmoe.artifact.writer import ArtifactWriter
from cfmoe.compile.checkpoint import Checkpoint
from cfmoe.compile.decoder_config import DecoderConfig, LatentAttention, Quantisation
from cfmoe.compile.expert_weights import read_expert
from cfmoe.compile.families.base import WeightNames
from cfmoe.compile.kernels.builder import TILE
from cfmoe.compile.kernels.expert import record_sections
from cfmoe.compile.kernels.matmul import FORMATS, padded
from cfmoe.compile.quantise import pack, pack_interleaved

Progress = Callable[[str, int, int], None]
T = TypeVar("T")

_MOST_PACKERS = 4  # each holds an expert, before and after packing; more of them wait for storage


def _scaled(weight: np.ndarray, factor: float) -> np.ndarray:
    return weight if factor == 1.0 else weight.astype(np.float32) * np.float32(factor)


def _halves(
    rows: np.ndarray,  # (heads, rotated rows, inputs)
) -> np.ndarray:
    """From rotated pairs side by side to the half-split arrangement of the attention kernel."""
    return np.concatenate([rows[:, 0::2], rows[:, 1::2]], axis=1)


class Converter:
    """Writes what `Decoder` declares; `named` yields (parameter name, packed array) in the same order."""

    def __init__(self, checkpoint: Checkpoint, config: DecoderConfig, names: WeightNames, quantisation: Quantisation) -> None:
        self.checkpoint, self.config, self.names, self.quantisation = checkpoint, config, names, quantisation

    def _read(self, template: str, *shape: int, layer: int = 0, **fields: object) -> np.ndarray:
        return self.checkpoint.read(template.format(l=layer, **fields), shape)

    def _vector(self, template: str, size: int, layer: int = 0) -> np.ndarray:
        return self._read(template, size, layer=layer).astype(np.float32)

    def dense_weights(self) -> Iterator[tuple[str, np.ndarray]]:
        """Always-resident tensors."""
        c, names, q = self.config, self.names, self.quantisation
        embedding = self._read(names.embedding, c.vocab_size, c.hidden_size)
        yield "embedding", pack(_scaled(embedding, c.embedding_multiplier), q["embedding"])
        yield "inverse_frequencies", c.rope.inverse_frequencies(c.rotary_dim)
        for layer in range(c.num_layers):
            for name, array in self._layer(layer):
                yield f"layers.{layer}.{name}", array
        # The head multiplies by the embedding's matrix where both are tied, so it has to undo the embedding's multiplier.
        divisor = c.logits_divisor * (c.embedding_multiplier if c.tie_embeddings else 1.0)
        yield "final_norm.weight", _scaled(self._vector(names.final_norm, c.hidden_size), 1.0 / divisor)
        if not c.tie_embeddings:
            yield "lm_head", pack(self._read(names.head, c.vocab_size, c.hidden_size), q["head"])

    def _layer(self, layer: int) -> Iterator[tuple[str, np.ndarray]]:
        c, names = self.config, self.names
        yield "input_norm.weight", self._vector(names.input_norm, c.hidden_size, layer)
        yield "post_norm.weight", self._vector(names.post_norm, c.hidden_size, layer)
        yield from self._attention(layer)
        if layer not in c.moe_layers:
            yield from self._feed_forward("dense", names.dense, c.dense_ffn_size, layer)
            return
        router = np.zeros((padded(c.num_experts), c.hidden_size), np.float32)
        router[: c.num_experts] = self._read(names.router + ".weight", c.num_experts, c.hidden_size, layer=layer)
        yield "router.weight", pack(router, "f32")
        if c.router_bias:
            yield "router.bias", np.pad(self._vector(names.router + ".bias", c.num_experts, layer), (0, len(router) - c.num_experts))
        if c.shared_ffn_size:
            yield from self._feed_forward("shared", names.shared, c.shared_ffn_size, layer)
            if c.shared_gate:
                gate = np.zeros((32, c.hidden_size), np.float32)
                gate[:1] = self._read(names.shared_gate, 1, c.hidden_size, layer=layer)
                yield "shared_gate.weight", pack(gate, "f32")

    def _attention(self, layer: int) -> Iterator[tuple[str, np.ndarray]]:
        c, prefix, fmt = self.config, self.names.attention, self.quantisation["attention"]
        if c.latent is None:
            heads = (("q_proj", c.num_heads), ("k_proj", c.num_kv_heads), ("v_proj", c.num_kv_heads))
            parts = [self._read(f"{prefix}{name}.weight", n * c.head_dim, c.hidden_size, layer=layer) for name, n in heads]
            yield "qkv.weight", pack(np.concatenate(parts), fmt)
            if c.qkv_bias:
                yield "qkv.bias", np.concatenate([self._vector(f"{prefix}{name}.bias", n * c.head_dim, layer) for name, n in heads])
        else:
            yield from self._latent(c.latent, layer)
        out = self._read(f"{prefix}o_proj.weight", c.hidden_size, c.num_heads * c.value_dim, layer=layer)
        yield "o.weight", pack(_scaled(out, c.residual_multiplier), fmt)
        if c.o_bias:
            yield "o.bias", _scaled(self._vector(f"{prefix}o_proj.bias", c.hidden_size, layer), c.residual_multiplier)
        if c.sinks:
            yield "sinks", self._vector(f"{prefix}sinks", c.num_heads, layer)
        if c.qk_norm != "none":
            scale = (1, 1) if c.qk_norm == "head" else (c.num_heads, c.num_kv_heads)
            yield "q_norm", self._vector(f"{prefix}q_norm.weight", scale[0] * c.head_dim, layer)
            yield "k_norm", self._vector(f"{prefix}k_norm.weight", scale[1] * c.head_dim, layer)

    def _latent(self, m: LatentAttention, layer: int) -> Iterator[tuple[str, np.ndarray]]:
        """Rows in the decoder's order: a head's rotated part first and split in halves, the nope parts of all heads before their values."""
        c, prefix, fmt = self.config, self.names.attention, self.quantisation["attention"]
        heads = c.num_heads

        def read(name: str, outputs: int, inputs: int) -> np.ndarray:
            return self._read(f"{prefix}{name}.weight", outputs, inputs, layer=layer)

        if m.q_rank:
            yield "latent.q_down.weight", pack(read("q_a_proj", m.q_rank, c.hidden_size), fmt)
            yield "latent.q_norm.weight", self._vector(f"{prefix}q_a_layernorm.weight", m.q_rank, layer)
        inputs = m.q_rank or c.hidden_size
        q = read("q_b_proj" if m.q_rank else "q_proj", heads * c.head_dim, inputs).reshape(heads, c.head_dim, inputs)
        q = np.concatenate([_halves(q[:, m.nope :]), q[:, : m.nope]], axis=1)
        yield "latent.q.weight", pack(q.reshape(heads * c.head_dim, inputs), fmt)
        down = read("kv_a_proj_with_mqa", m.kv_rank + m.rope, c.hidden_size)
        yield "latent.kv_down.weight", pack(down[: m.kv_rank], fmt)
        yield "latent.k_rope.weight", pack(_halves(down[None, m.kv_rank :])[0], fmt)
        yield "latent.kv_norm.weight", self._vector(f"{prefix}kv_a_layernorm.weight", m.kv_rank, layer)
        kv = read("kv_b_proj", heads * (m.nope + m.value), m.kv_rank).reshape(heads, m.nope + m.value, m.kv_rank)
        kv = np.concatenate([kv[:, : m.nope].reshape(-1, m.kv_rank), kv[:, m.nope :].reshape(-1, m.kv_rank)])
        yield "latent.kv.weight", pack(kv, fmt)

    def _feed_forward(self, prefix: str, template: str, ffn: int, layer: int) -> Iterator[tuple[str, np.ndarray]]:
        hidden, fmt = self.config.hidden_size, self.quantisation["dense"]
        gate_up = [self._read(template, ffn, hidden, layer=layer, part=part) for part in ("gate", "up")]
        yield f"{prefix}.gate_up.weight", pack(np.concatenate(gate_up), fmt)
        yield f"{prefix}.down.weight", pack(self._read(template, hidden, ffn, layer=layer, part="down"), fmt)

    def expert_record(self, layer: int, expert: int) -> np.ndarray:
        """The bytes of one expert record; `layer` is the model's layer number."""
        fmt = self.quantisation["expert"]
        w = read_expert(self.checkpoint, self.config, self.names, layer, expert)
        parts = [pack_interleaved(w.gate, w.up, fmt), pack(w.down, fmt)]
        if w.gate_bias is not None and w.up_bias is not None and w.down_bias is not None:
            # A slab has one element type, so fp32 biases beside packed codes are kept by their bits.
            kind = "float32" if FORMATS[fmt].quantised else FORMATS[fmt].dtype
            tiles = np.stack([w.gate_bias.reshape(-1, TILE), w.up_bias.reshape(-1, TILE)], axis=1)
            parts = [parts[0], tiles.astype(kind), parts[1], w.down_bias.astype(kind)]
        return np.concatenate([part.reshape(-1).view(np.uint8) for part in parts])

    def write(self, writer: ArtifactWriter, progress: Progress) -> None:
        """Streams everything into `writer`, but for the records that it has already."""
        c = self.config
        fmt = self.quantisation["expert"]
        sections = record_sections(fmt, c.hidden_size, c.expert_ffn_size, c.expert_bias)
        size = sum(length for _, length in sections.values())
        writer.set_expert_layout(fmt, len(c.moe_layers), c.num_experts, size, sections)
        count = len(c.moe_layers) * c.num_experts
        total = c.num_layers + count
        done = 0
        # Reading and packing leave the interpreter's lock alone; digests and writing stay here, in order.
        with ThreadPoolExecutor(1) as pool:
            step = functools.partial(next, self.dense_weights(), None)
            for item in itertools.takewhile(lambda item: item is not None, _in_order(pool, itertools.repeat(step), 1)):
                name, array = item
                writer.add_weight(name, array.reshape(-1))
                if name.endswith("input_norm.weight"):
                    done += 1
                    progress("dense weights", done, total)
        first = writer.records_done
        done += first
        places = [divmod(record, c.num_experts) for record in range(first, count)]
        packers = min(_MOST_PACKERS, os.cpu_count() or 1)
        with ThreadPoolExecutor(packers) as pool:
            calls = (functools.partial(self.expert_record, c.moe_layers[ordinal], expert) for ordinal, expert in places)
            for (ordinal, expert), record in zip(places, _in_order(pool, calls, packers), strict=True):
                writer.add_expert(ordinal, expert, record)
                done += 1
                progress(f"experts of layer {c.moe_layers[ordinal]}", done, total)


def _in_order(pool: Executor, calls: Iterator[Callable[[], T]], ahead: int) -> Iterator[T]:
    """What `calls` return, in order; `ahead` of them run in `pool` while the caller uses a result."""
    waiting = collections.deque(pool.submit(call) for call in itertools.islice(calls, ahead))
    while waiting:
        result = waiting.popleft().result()
        waiting.extend(pool.submit(call) for call in itertools.islice(calls, 1))
        yield result

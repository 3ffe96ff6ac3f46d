"""Streams a checkpoint's weights into an artifact: packed, layer by layer, one matrix in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from cfmoe.artifact.writer import ArtifactWriter
from cfmoe.compile.checkpoint import Checkpoint
from cfmoe.compile.decoder_config import DecoderConfig, Quantisation
from cfmoe.compile.families.base import WeightNames
from cfmoe.compile.kernels.expert import record_sections
from cfmoe.compile.kernels.matmul import padded
from cfmoe.compile.quantise import pack, pack_interleaved

Progress = Callable[[str, int, int], None]


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
        yield "embedding", pack(self._read(names.embedding, c.vocab_size, c.hidden_size), q["embedding"])
        exponents = np.arange(0, c.head_dim, 2, dtype=np.float32) / np.float32(c.head_dim)
        yield "inverse_frequencies", (np.float32(1.0) / np.float32(c.rope_theta) ** exponents).astype(np.float32)
        for layer in range(c.num_layers):
            for name, array in self._layer(layer):
                yield f"layers.{layer}.{name}", array
        yield "final_norm.weight", self._vector(names.final_norm, c.hidden_size)
        if not c.tie_embeddings:
            yield "lm_head", pack(self._read(names.head, c.vocab_size, c.hidden_size), q["head"])

    def _layer(self, layer: int) -> Iterator[tuple[str, np.ndarray]]:
        c, names, q = self.config, self.names, self.quantisation
        yield "input_norm.weight", self._vector(names.input_norm, c.hidden_size, layer)
        yield "post_norm.weight", self._vector(names.post_norm, c.hidden_size, layer)
        heads = ((names.q, c.num_heads), (names.k, c.num_kv_heads), (names.v, c.num_kv_heads))
        parts = [self._read(name + ".weight", count * c.head_dim, c.hidden_size, layer=layer) for name, count in heads]
        yield "qkv.weight", pack(np.concatenate(parts), q["attention"])
        if c.qkv_bias:
            yield "qkv.bias", np.concatenate([self._vector(name + ".bias", count * c.head_dim, layer) for name, count in heads])
        yield "o.weight", pack(self._read(names.o + ".weight", c.hidden_size, c.num_heads * c.head_dim, layer=layer), q["attention"])
        if c.qk_norm != "none":
            scale = (1, 1) if c.qk_norm == "head" else (c.num_heads, c.num_kv_heads)
            yield "q_norm", self._vector(names.q_norm, scale[0] * c.head_dim, layer)
            yield "k_norm", self._vector(names.k_norm, scale[1] * c.head_dim, layer)
        if layer not in c.moe_layers:
            yield from self._feed_forward("dense", names.dense, c.dense_ffn_size, layer)
            return
        router = np.zeros((padded(c.num_experts), c.hidden_size), np.float32)
        router[: c.num_experts] = self._read(names.router, c.num_experts, c.hidden_size, layer=layer)
        yield "router.weight", pack(router, "f32")
        if c.shared_ffn_size:
            yield from self._feed_forward("shared", names.shared, c.shared_ffn_size, layer)
            if c.shared_gate:
                gate = np.zeros((32, c.hidden_size), np.float32)
                gate[:1] = self._read(names.shared_gate, 1, c.hidden_size, layer=layer)
                yield "shared_gate.weight", pack(gate, "f32")

    def _feed_forward(self, prefix: str, template: str, ffn: int, layer: int) -> Iterator[tuple[str, np.ndarray]]:
        hidden, fmt = self.config.hidden_size, self.quantisation["dense"]
        gate_up = [self._read(template, ffn, hidden, layer=layer, part=part) for part in ("gate", "up")]
        yield f"{prefix}.gate_up.weight", pack(np.concatenate(gate_up), fmt)
        yield f"{prefix}.down.weight", pack(self._read(template, hidden, ffn, layer=layer, part="down"), fmt)

    def _expert(self, layer: int, expert: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(gate, up, down) of one expert, from either checkpoint layout."""
        c, names = self.config, self.names
        hidden, ffn = c.hidden_size, c.expert_ffn_size
        if names.fused_gate_up.format(l=layer) in self.checkpoint:
            gate_up = self.checkpoint.read(names.fused_gate_up.format(l=layer), (c.num_experts, 2 * ffn, hidden), expert)
            down = self.checkpoint.read(names.fused_down.format(l=layer), (c.num_experts, hidden, ffn), expert)
            return gate_up[:ffn], gate_up[ffn:], down
        gate, up = (self._read(names.expert, ffn, hidden, layer=layer, e=expert, part=part) for part in ("gate", "up"))
        return gate, up, self._read(names.expert, hidden, ffn, layer=layer, e=expert, part="down")

    def expert_record(self, layer: int, expert: int) -> np.ndarray:
        """The bytes of one expert record; `layer` is the model's layer number."""
        fmt = self.quantisation["expert"]
        gate, up, down = self._expert(layer, expert)
        parts = (pack_interleaved(gate, up, fmt), pack(down, fmt))
        return np.concatenate([part.reshape(-1).view(np.uint8) for part in parts])

    def write(self, writer: ArtifactWriter, progress: Progress) -> None:
        """Streams everything into `writer`."""
        c = self.config
        fmt = self.quantisation["expert"]
        sections = record_sections(fmt, c.hidden_size, c.expert_ffn_size)
        size = sum(length for _, length in sections.values())
        writer.set_expert_layout(fmt, len(c.moe_layers), c.num_experts, size, sections)
        total = c.num_layers + len(c.moe_layers) * c.num_experts
        done = 0
        for name, array in self.dense_weights():
            writer.add_weight(name, array.reshape(-1))
            if name.endswith("input_norm.weight"):
                done += 1
                progress("dense weights", done, total)
        for ordinal, layer in enumerate(c.moe_layers):
            for expert in range(c.num_experts):
                writer.add_expert(ordinal, expert, self.expert_record(layer, expert))
                done += 1
                progress(f"experts of layer {layer}", done, total)

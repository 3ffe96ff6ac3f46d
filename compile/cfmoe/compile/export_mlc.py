"""A checkpoint as MLC-LLM's parameters: q4f16_1 in a tensor cache, and the mlc-chat-config.json beside it."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cfmoe.artifact.chat_format import ChatFormat
from cfmoe.artifact.staging import StagingDirectory
from cfmoe.compile.chat_probe import checkpoint_chat
from cfmoe.compile.checkpoint import Checkpoint
from cfmoe.compile.decoder_config import DecoderConfig, LatentAttention
from cfmoe.compile.expert_weights import read_expert
from cfmoe.compile.families import resolve
from cfmoe.compile.families.base import WeightNames
from cfmoe.compile.mlc_config import mlc_chat_config
from cfmoe.errors import CFMoEError

Progress = Callable[[str, int, int], None]

_GROUP = 32
_SHARD_BYTES = 32 << 20
_TABLE = "tensor-cache.json"
# MLC-LLM's names for the fused projection of queries, keys and values; latent attention has none.
_QKV = {"deepseek": "wqkv_pack", "deepseek_v2": "", "mixtral": "qkv_proj", "qwen2_moe": "c_attn", "qwen3_moe": "c_attn"}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def quantise(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """q4f16_1: (uint32 codes [..., 4 * groups], fp16 scales [..., groups]) of groups of 32 along the last axis.

    A last group that is short counts as filled with zeros. Element j of a row is bits 4 * (j % 8) of word j // 8; the value is
    (code - 7) * scale.
    """
    values = np.asarray(weight, np.float32)
    *lead, inputs = values.shape
    groups = -(-inputs // _GROUP)
    if missing := groups * _GROUP - inputs:
        values = np.concatenate([values, np.zeros((*lead, missing), np.float32)], axis=-1)
    values = values.reshape(*lead, groups, _GROUP)
    scales = (np.abs(values).max(-1) / 7).astype(np.float16)
    divisor = np.where(scales == 0, 1, scales).astype(np.float32)[..., None]
    codes = np.clip(np.rint(values / divisor) + 7, 0, 14).astype(np.uint32).reshape(*lead, groups * 4, 8)
    words = np.zeros(codes.shape[:-1], np.uint32)
    for at in range(8):
        words |= codes[..., at] << np.uint32(4 * at)
    return words, scales


class _Parameters:
    """Names and values in MLC-LLM's order of layers; matrices quantised, routers, gates and norms fp16."""

    def __init__(self, checkpoint: Checkpoint, config: DecoderConfig, names: WeightNames) -> None:
        self.checkpoint, self.c, self.names = checkpoint, config, names

    def _read(self, name: str, *shape: int) -> np.ndarray:
        return self.checkpoint.read(name, shape)

    def __iter__(self) -> Iterator[tuple[str, np.ndarray]]:
        c, names = self.c, self.names
        yield from _quantised("model.embed_tokens", self._read(names.embedding, c.vocab_size, c.hidden_size))
        for layer in range(c.num_layers):
            to = f"model.layers.{layer}."
            yield f"{to}input_layernorm.weight", self._half(names.input_norm.format(l=layer), c.hidden_size)
            yield f"{to}post_attention_layernorm.weight", self._half(names.post_norm.format(l=layer), c.hidden_size)
            yield from self._attention(layer, f"{to}self_attn.")
            if layer in c.moe_layers:
                yield from self._moe(layer, to)
            else:
                yield from self._feed_forward(names.dense, layer, c.dense_ffn_size, f"{to}mlp.")
        yield "model.norm.weight", self._half(names.final_norm, c.hidden_size)
        if not c.tie_embeddings:
            yield from _quantised("lm_head", self._read(names.head, c.vocab_size, c.hidden_size))

    def _half(self, name: str, *shape: int) -> np.ndarray:
        return self._read(name, *shape).astype(np.float16)

    def _attention(self, layer: int, to: str) -> Iterator[tuple[str, np.ndarray]]:
        prefix = self.names.attention.format(l=layer)
        yield from self._latent(self.c.latent, prefix, to) if self.c.latent else self._heads(prefix, to)
        yield from _quantised(f"{to}o_proj", self._read(f"{prefix}o_proj.weight", self.c.hidden_size, self.c.num_heads * self.c.value_dim))

    def _latent(self, m: LatentAttention, prefix: str, to: str) -> Iterator[tuple[str, np.ndarray]]:
        """The up-projection twice: as one matrix for prompts, and in fp16 its two parts for each head, the one of keys transposed."""
        c = self.c
        matrices = {"kv_a_proj_with_mqa": (m.kv_rank + m.rope, c.hidden_size)}
        norms = {"kv_a_layernorm": m.kv_rank}
        if m.q_rank:
            matrices |= {"q_a_proj": (m.q_rank, c.hidden_size), "q_b_proj": (c.num_heads * c.head_dim, m.q_rank)}
            norms |= {"q_a_layernorm": m.q_rank}
        else:
            matrices |= {"q_proj": (c.num_heads * c.head_dim, c.hidden_size)}
        for name, shape in matrices.items():
            yield from _quantised(f"{to}{name}", self._read(f"{prefix}{name}.weight", *shape))
        for name, width in norms.items():
            yield f"{to}{name}.weight", self._half(f"{prefix}{name}.weight", width)
        up = self._read(f"{prefix}kv_b_proj.weight", c.num_heads * (m.nope + m.value), m.kv_rank)
        yield from _quantised(f"{to}kv_b_proj", up)
        heads = up.reshape(c.num_heads, m.nope + m.value, m.kv_rank).astype(np.float16)
        yield f"{to}w_uk", heads[:, : m.nope].transpose(0, 2, 1)
        yield f"{to}w_uv", heads[:, m.nope :]

    def _heads(self, prefix: str, to: str) -> Iterator[tuple[str, np.ndarray]]:
        c, fused = self.c, _QKV[self.c.family]
        heads = (("q_proj", c.num_heads), ("k_proj", c.num_kv_heads), ("v_proj", c.num_kv_heads))
        parts = [self._read(f"{prefix}{name}.weight", n * c.head_dim, c.hidden_size) for name, n in heads]
        yield from _quantised(f"{to}{fused}", np.concatenate(parts))
        if c.qkv_bias:
            yield f"{to}{fused}.bias", np.concatenate([self._half(f"{prefix}{name}.bias", n * c.head_dim) for name, n in heads])
        if c.qk_norm == "head":
            for name in ("q_norm", "k_norm"):
                yield f"{to}{name}.weight", self._half(f"{prefix}{name}.weight", c.head_dim)

    def _moe(self, layer: int, to: str) -> Iterator[tuple[str, np.ndarray]]:
        c, names = self.c, self.names
        mixtral = c.family == "mixtral"
        to = f"{to}moe." if mixtral else f"{to}mlp."
        yield f"{to}gate.weight", self._half(f"{names.router.format(l=layer)}.weight", c.num_experts, c.hidden_size)
        gate_up, down = [], []
        for expert in range(c.num_experts):
            w = read_expert(self.checkpoint, c, names, layer, expert)
            gate_up.append(quantise(np.concatenate([w.gate, w.up])))
            down.append(quantise(w.down))
        for name, stack in (("e1_e3" if mixtral else "moe_gate_up_proj", gate_up), ("e2" if mixtral else "moe_down_proj", down)):
            yield f"{to}{name}.q_weight", np.stack([words for words, _ in stack])
            yield f"{to}{name}.q_scale", np.stack([scales for _, scales in stack])
        if c.shared_ffn_size:
            shared = "shared_experts" if c.family.startswith("deepseek") else "shared_expert"
            yield from self._feed_forward(names.shared, layer, c.shared_ffn_size, f"{to}{shared}.")
            if c.shared_gate:
                yield f"{to}shared_expert_gate.weight", self._half(names.shared_gate.format(l=layer), 1, c.hidden_size)

    def _feed_forward(self, template: str, layer: int, ffn: int, to: str) -> Iterator[tuple[str, np.ndarray]]:
        hidden = self.c.hidden_size
        pair = [self._read(template.format(l=layer, part=part), ffn, hidden) for part in ("gate", "up")]
        yield from _quantised(f"{to}gate_up_proj", np.concatenate(pair))
        yield from _quantised(f"{to}down_proj", self._read(template.format(l=layer, part="down"), hidden, ffn))


def _quantised(name: str, weight: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    words, scales = quantise(weight)
    yield f"{name}.q_weight", words
    yield f"{name}.q_scale", scales


class _Shards:
    """Collects tensors into shards of 32 MiB; a tensor of half that or more that does not fit the shard gets one of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.records: list[dict[str, Any]] = []
        self._waiting: list[tuple[str, np.ndarray]] = []
        self._bytes = 0

    def add(self, name: str, array: np.ndarray) -> None:
        if self._bytes + array.nbytes > _SHARD_BYTES:
            if 2 * array.nbytes >= _SHARD_BYTES:
                self._write([(name, array)])
                return
            self.flush()
        self._waiting.append((name, array))
        self._bytes += array.nbytes

    def flush(self) -> None:
        if self._waiting:
            self._write(self._waiting)
        self._waiting, self._bytes = [], 0

    def _write(self, tensors: list[tuple[str, np.ndarray]]) -> None:
        file = f"params_shard_{len(self.records)}.bin"
        digest, rows, offset = hashlib.md5(usedforsecurity=False), [], 0
        with open(self.directory / file, "wb") as stream:
            for name, array in tensors:
                data = np.ascontiguousarray(array).data.cast("B")
                stream.write(data)
                digest.update(data)
                row = {"name": name, "shape": list(array.shape), "dtype": array.dtype.name, "format": "f32-to-bf16"}
                rows.append(row | {"nbytes": array.nbytes, "byteOffset": offset})
                offset += array.nbytes
        record = {"dataPath": file, "format": "raw-shard", "nbytes": offset, "records": rows, "md5sum": digest.hexdigest()}
        self.records.append(record)


def conversation(chat: ChatFormat | None, stop_ids: Sequence[int] = ()) -> dict[str, Any]:
    """MLC-LLM's form of a plain conversation.

    Without one, or where MLC-LLM's form is too narrow for it, messages stand bare, as for a model that continues text. It trims no
    messages, keeps thoughts, and writes no dates.
    """
    roles = _roles(chat) if chat is not None and not chat.date_format else None
    start, user, answer, separator, end = roles or ("", "", "", "", "")
    system, default = start + "{system_message}", ""
    if roles and chat is not None and chat.system is not None and chat.system.default:
        system, default = chat.system.before + "{system_message}" + chat.system.after.removesuffix(user + separator), chat.system.default
    return {
        "name": "checkpoint",
        "system_template": system,
        "system_message": default,
        "system_prefix_token_ids": None,
        "add_role_after_system_message": True,
        "roles": {"user": user, "assistant": answer, "tool": user},
        "role_templates": {"user": "{user_message}", "assistant": "{assistant_message}", "tool": "{tool_message}"},
        "messages": [],
        "seps": ["", end],
        "role_content_sep": separator,
        "role_empty_sep": "",
        "stop_str": list(chat.stop_strings) if roles and chat else [],
        "stop_token_ids": list(chat.stop_token_ids) if roles and chat else list(stop_ids),
        "strip_reasoning_in_history": False,
        "function_string": "",
        "use_function_calling": False,
    }


def _roles(chat: ChatFormat) -> tuple[str, str, str, str, str] | None:
    """(start, before the user, before the answer, between a role and its words, behind the answer); None where they do not fit."""
    if not chat.replied.startswith(chat.reply):
        return None
    separator = chat.replied[len(chat.reply) :]
    pairs = zip(reversed(chat.begin), reversed(chat.next), strict=False)
    common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    user = chat.begin[len(chat.begin) - common :]
    head, mark, rest = user.partition(">")
    if mark and "<" not in head:  # the rear part of a token, which stays with its front
        user = rest
    common = len(user)
    if not user.endswith(separator):
        return None
    start, end = chat.begin[: len(chat.begin) - common], chat.next[: len(chat.next) - common]
    return start, user[: len(user) - len(separator)], chat.reply, separator, end


def _chat_config(model: Path, config: DecoderConfig, raw: dict[str, Any]) -> dict[str, Any]:
    files = [name for name in _TOKENIZER_FILES if (model / name).exists()]
    chat = mlc_chat_config(model, config, "q4f16_1", 2048, files)
    fields = {key: value for key, value in raw.items() if key not in ("rope_parameters", "num_local_experts")}
    # MLC-LLM reads the number of experts and the base under these names.
    count = {"deepseek": "n_routed_experts", "deepseek_v2": "n_routed_experts", "mixtral": "num_local_experts"}.get(
        config.family, "num_experts"
    )
    fields |= {count: config.num_experts, "rope_theta": config.rope.theta, "head_dim": config.head_dim}
    if config.latent:
        # MLC-LLM has no defaults for these, and looks into rope_scaling whatever the type.
        given = {"scoring_func": "softmax", "topk_method": "greedy", "n_group": 1, "topk_group": 1, "moe_layer_freq": 1}
        given |= {"first_k_dense_replace": 0, "norm_topk_prob": False, "attention_bias": False, "routed_scaling_factor": 1.0}
        fields = given | fields | {"rope_scaling": {"factor": 1.0}}
    fields |= {"context_window_size": config.context_size, "prefill_chunk_size": 2048, "tensor_parallel_shards": 1}
    return chat | {
        "quantization": "q4f16_1",
        "model_config": fields,
        "conv_template": conversation(checkpoint_chat(model, config.eos_token_ids, config.vocab_size)[0], config.eos_token_ids),
    }


def _check(c: DecoderConfig) -> None:
    """Refuses what MLC-LLM has no model of, or would compute in another way."""
    # Its YaRN takes the ends of the ramp from an element's place instead of the head's width.
    ropes = ("default",) if c.latent else ("default", "llama3")
    refusals = (
        (c.family not in _QKV, f"{c.family}: MLC-LLM has no model of this family; the export takes {', '.join(sorted(_QKV))}"),
        (
            c.rope.kind not in ropes,
            f"rope_scaling of type {c.rope.kind!r}: the export of {c.family} to MLC-LLM takes {' and '.join(map(repr, ropes))}",
        ),
        (any(c.windows), f"sliding_window is {max(c.windows, default=0)}: the export to MLC-LLM has none; set it to null"),
        (
            c.family in ("qwen2_moe", "qwen3_moe") and len(c.moe_layers) < c.num_layers,
            f"mlp_only_layers: MLC-LLM's {c.family} has experts in every layer",
        ),
        (c.latent is not None and c.tie_embeddings, f"tie_word_embeddings is true: MLC-LLM's {c.family} has a head of its own"),
        (c.latent is not None and not c.shared_ffn_size, f"n_shared_experts: MLC-LLM's {c.family} has shared experts always"),
    )
    for refused, reason in refusals:
        if refused:
            raise CFMoEError(reason)


def export_mlc(model: Path, out: Path, *, force: bool = False, progress: Progress = lambda _what, _done, _total: None) -> Path:
    """Writes checkpoint directory `model` to directory `out` for MLC-LLM and returns it; one layer is in memory at a time.

    Raises CFMoEError where MLC-LLM lacks the family or what the model needs of it, or `out` exists.
    """
    checkpoint = Checkpoint(model)
    config, names = resolve(checkpoint.config, str(model / "config.json"))
    _check(config)
    with StagingDirectory(out, force, recognise=lambda path: (path / _TABLE).is_file(), kind="exports to MLC-LLM") as staging:
        shards = _Shards(staging.path)
        done = 0
        for name, array in _Parameters(checkpoint, config, names):
            shards.add(name, array)
            if name.endswith("input_layernorm.weight"):
                done += 1
                progress("layers", done, config.num_layers)
        shards.flush()
        size = sum(record["nbytes"] for record in shards.records)
        count = sum(len(record["records"]) for record in shards.records)
        weights = sum(
            int(np.prod(row["shape"])) * (8 if row["dtype"] == "uint32" else 1)
            for record in shards.records
            for row in record["records"]
            if not row["name"].endswith(".q_scale")
        )
        metadata = {"ParamSize": count, "ParamBytes": float(size), "BitsPerParam": size * 8 / weights}
        table = {"metadata": metadata, "records": shards.records}
        (staging.path / _TABLE).write_text(json.dumps(table, indent=2) + "\n")
        chat = _chat_config(model, config, checkpoint.config)
        (staging.path / "mlc-chat-config.json").write_text(json.dumps(chat, indent=2) + "\n")
        for file in chat["tokenizer_files"]:
            shutil.copy(model / file, staging.path / file)
        staging.commit()
    return out

"""compile_model: from a checkpoint directory to an artifact directory."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import tvm
from tvm import tirx

from cfmoe.artifact.writer import ArtifactWriter
from cfmoe.compile import decoder_facts, gpu, plan
from cfmoe.compile import targets as cpu_targets
from cfmoe.compile.chat_probe import checkpoint_chat
from cfmoe.compile.checkpoint import Checkpoint, read_json
from cfmoe.compile.convert import Converter, Progress
from cfmoe.compile.decoder import Decoder
from cfmoe.compile.decoder_config import PRESETS, DecoderConfig, Quantisation
from cfmoe.compile.families import resolve
from cfmoe.compile.kernels import expert
from cfmoe.compile.kernels.builder import TILE, multiply_adds
from cfmoe.compile.mlc_config import mlc_chat_config
from cfmoe.compile.passes import pipeline
from cfmoe.compile.passes.lower_to_kernels import LowerToKernels
from cfmoe.errors import CFMoEError

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json")


def _no_progress(_what: str, _done: int, _total: int) -> None:
    return None


def lower(
    config: DecoderConfig, quantisation: Quantisation, target: cpu_targets.CpuTarget, chunk: int, dump_ir: Path | None = None
) -> tuple[tvm.IRModule, list[str]]:
    """The lowered module, expert kernels included, and the weights' names in argument order."""
    mod, parameters = Decoder(config, quantisation).export()
    shape = expert.ExpertShape(
        quantisation["expert"], config.hidden_size, config.expert_ffn_size, bias=config.expert_bias, swiglu=config.expert_swiglu
    )
    with multiply_adds(target.simd.fused):
        mod = pipeline.run(mod, LowerToKernels(target.simd), plan.symbol_bounds(config, chunk), dump_ir)
        for phase in ("prefill", "decode"):
            for part, emit in (("gate_up", expert.gate_up), ("down", expert.down)):
                name = f"expert_{part}_{phase}"
                mod[name] = emit(name, target.simd, shape, phase == "decode")
    if dump_ir is not None:
        (dump_ir / "99_kernels.py").write_text(kernels_of(mod).script())
    return mod, [name for name, _ in parameters]


def kernels_of(mod: tvm.IRModule) -> tvm.IRModule:
    """The PrimFuncs alone, each exported under its own name."""
    chosen = {}
    for var, function in mod.functions_items():
        if isinstance(function, tirx.PrimFunc):
            chosen[var.name_hint] = function.with_attr("global_symbol", var.name_hint)
    return tvm.IRModule(dict(sorted(chosen.items())))


def _generation_facts(model: Path, config: DecoderConfig) -> DecoderConfig:
    """End tokens as generation_config.json refines them."""
    path = model / "generation_config.json"
    if not path.exists():
        return config
    ids = read_json(path).get("eos_token_id")
    ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
    known = [i for i in ids if isinstance(i, int) and 0 <= i < config.vocab_size]
    return replace(config, eos_token_ids=tuple(dict.fromkeys([*config.eos_token_ids, *known])))


def _parameter_count(c: DecoderConfig) -> int:
    dense = len(c.moe_layers)
    layer = sum(inputs * outputs for inputs, outputs in c.attention_matrices()) + 2 * c.hidden_size
    biases = 2 * c.expert_ffn_size + c.hidden_size if c.expert_bias else 0
    experts = c.num_experts * (3 * c.hidden_size * c.expert_ffn_size + biases + c.hidden_size)
    shared = 3 * c.hidden_size * c.shared_ffn_size
    plain = (c.num_layers - dense) * 3 * c.hidden_size * c.dense_ffn_size
    embedding = c.vocab_size * c.hidden_size * (1 if c.tie_embeddings else 2)
    return c.num_layers * layer + dense * (experts + shared) + plain + embedding + c.hidden_size


def _model_facts(name: str, c: DecoderConfig) -> dict[str, Any]:
    return {
        "family": c.family,
        "name": name,
        "parameters": _parameter_count(c),
        "num_layers": c.num_layers,
        "hidden_size": c.hidden_size,
        "vocab_size": c.vocab_size,
        "context_size": c.context_size,
        "num_heads": c.num_heads,
        "num_kv_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "moe_layers": list(c.moe_layers),
        "num_experts": c.num_experts,
        "top_k": c.top_k,
        "expert_ffn_size": c.expert_ffn_size,
        "router": {"score": c.router_score, "renormalise": c.router_renormalise, "scale": c.router_scale},
        "bos_token_id": c.bos_token_id,
        "eos_token_ids": list(c.eos_token_ids),
    }


def _write_target(
    writer: ArtifactWriter,
    target: cpu_targets.CpuTarget,
    config: DecoderConfig,
    quantisation: Quantisation,
    chunk: int,
    dump_ir: Path | None,
) -> tuple[dict[str, Any], str]:
    folder = f"lib/{target.name}"
    with tempfile.TemporaryDirectory(prefix="cfmoe-") as scratch:
        entry, _ = build_target(target, config, quantisation, chunk, Path(scratch), dump_ir)
        for name in ("plan.json", "kernels.so"):
            writer.copy_file(Path(scratch) / name, f"{folder}/{name}")
    return entry, entry["kernel_set"]


def build_target(
    target: cpu_targets.CpuTarget,
    config: DecoderConfig,
    quantisation: Quantisation,
    chunk: int,
    directory: Path,
    dump_ir: Path | None = None,
) -> tuple[dict[str, Any], tvm.IRModule]:
    """Writes plan.json and kernels.so into `directory`; returns the manifest's entry and the kernels."""
    mod, parameters = lower(config, quantisation, target, chunk, dump_ir)
    document = plan.emit(mod, config, quantisation, chunk, parameters, TILE)
    (directory / "plan.json").write_bytes(json.dumps(document, separators=(",", ":")).encode())
    kernels = kernels_of(mod)
    cpu_targets.build(kernels, target, directory / "kernels.so")
    folder = f"lib/{target.name}"
    entry = {
        "device": "cpu",
        "arch": target.arch,
        "features": list(target.features),
        "kernel_set": decoder_facts.kernel_set(config, quantisation, chunk, target.name),
        "library": f"{folder}/kernels.so",
        "plan": f"{folder}/plan.json",
    }
    return entry, kernels


def _fingerprint(checkpoint: Checkpoint, quant: str) -> str:
    """Everything that expert records depend on: the checkpoint's files, the preset, the code that converts and the CPU it runs on."""
    digest = hashlib.sha256(f"{quant} {cpu_targets.resolve('llvm').name} tvm {metadata.version('apache-tvm')}".encode())
    for source in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(source.read_bytes())
    digest.update(json.dumps(checkpoint.config, sort_keys=True).encode())
    for name, file in sorted(checkpoint.tensors.items()):
        state = file.stat()
        digest.update(f"{name} {file.name} {state.st_size} {state.st_mtime_ns}".encode())
    return digest.hexdigest()


def compile_model(
    model: Path,
    out: Path,
    *,
    quant: str = "mixed",
    targets: Sequence[str] = ("llvm",),
    context_size: int | None = None,
    prefill_chunk: int = 256,
    dump_ir: Path | None = None,
    force: bool = False,
    resume: bool = False,
    progress: Progress = _no_progress,
) -> Path:
    """Compiles the checkpoint directory `model` into the artifact directory `out` and returns it.

    `prefill_chunk` is in tokens; `context_size` may lower the model's own. Raises CFMoEError; nothing half-written is left, unless
    `resume`: then what an interruption leaves is kept beside `out`, and taken up by the next call of the same kind.
    """
    if quant not in PRESETS:
        raise CFMoEError(f"--quant {quant} is unknown; known are {', '.join(PRESETS)}")
    if not 16 <= prefill_chunk <= 4096:
        raise CFMoEError(f"--prefill-chunk {prefill_chunk} is out of range; use 16 to 4096 tokens")
    chosen = {target.name: target for target in (gpu.resolve(name) or cpu_targets.resolve(name) for name in targets)}
    checkpoint = Checkpoint(model)
    config, names = resolve(checkpoint.config, str(model / "config.json"))
    if not (model / "tokenizer.json").exists():
        raise CFMoEError(f"{model}: tokenizer.json is missing; save the fast tokenizer next to the weights")
    config = _generation_facts(model, config)
    if context_size is not None:
        if not 16 <= context_size <= config.context_size:
            raise CFMoEError(f"--context-size {context_size} is out of range; this model takes 16 to {config.context_size} tokens")
        config = replace(config, context_size=context_size)
    quantisation = Quantisation.named(quant)
    with ArtifactWriter(out, force=force, resume=_fingerprint(checkpoint, quant) if resume else None) as writer:
        entries, kernel_sets = {}, []
        for number, (name, target) in enumerate(chosen.items(), 1):
            progress(f"kernels for {name}", number, len(chosen))
            dump = dump_ir / name if dump_ir is not None and len(chosen) > 1 else dump_ir
            if isinstance(target, gpu.GpuTarget):
                entries[name], kernel_set = gpu.write(writer, target, config, quantisation, prefill_chunk, dump)
            else:
                entries[name], kernel_set = _write_target(writer, target, config, quantisation, prefill_chunk, dump)
            kernel_sets.append(kernel_set)
        Converter(checkpoint, config, names, quantisation).write(writer, progress)
        tokenizer_files = [name for name in _TOKENIZER_FILES if (model / name).exists()]
        for name in tokenizer_files:
            writer.copy_file(model / name, name)
        chat = mlc_chat_config(model, config, quant, prefill_chunk, tokenizer_files)
        writer.add_file("mlc-chat-config.json", (json.dumps(chat, indent=2) + "\n").encode())
        conversation, absent = checkpoint_chat(model, config.eos_token_ids, config.vocab_size)
        return writer.finish(
            {
                "model": _model_facts(model.resolve().name, config),
                "decoder": decoder_facts.record(config),
                "quantisation": {"preset": quant, "group_size": 32, "classes": dict(quantisation.classes)},
                "prefill_chunk": prefill_chunk,
                "kv_dtype": quantisation.kv_dtype,
                "kernel_set": hashlib.sha256("".join(kernel_sets).encode()).hexdigest() if len(kernel_sets) > 1 else kernel_sets[0],
                "targets": entries,
                "tokenizer_files": tokenizer_files,
                **({"chat": conversation.record()} if conversation else {"chat_absent": absent} if absent else {}),
                "provenance": {
                    "source": model.resolve().name,
                    "created_by": f"cfmoe {metadata.version('cfmoe')}",
                    "tvm": metadata.version("apache-tvm"),
                },
            }
        )

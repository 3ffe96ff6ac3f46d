"""Writes artifacts of public models' shapes whose weights are a repeated pattern: what GPU speed is measured with.

They open as any artifact does, and compress to a few MB, so that a machine without TVM can be given one:

    python benchmarks/gpu_artifact.py olmoe-1b-7b --target vulkan-desktop --out olmoe.cfmoe
    python benchmarks/gpu_artifact.py mixtral-8x7b --layers 1 --experts 2 --target vulkan-desktop --out mixtral.cfmoe
    cfmoe-engine bench-kernels mixtral.cfmoe --device vulkan
    cfmoe-engine bench olmoe.cfmoe --device vulkan
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from cfmoe.artifact.writer import ArtifactWriter
from cfmoe.compile import compiler, gpu, targets
from cfmoe.compile.decoder import Decoder
from cfmoe.compile.decoder_config import DecoderConfig, Quantisation
from cfmoe.compile.families import resolve
from cfmoe.compile.kernels.expert import record_sections
from cfmoe.compile.kernels.matmul import FORMATS, TILE
from cfmoe.compile.named_configs import CONFIGS

SEED = 11
_BLOCKS = 28  # of the pattern: short enough for gzip to see it again
_CHUNK = 256


def pattern(format_name: str, rng: np.random.Generator) -> np.ndarray:
    """A few blocks of random weights of about 0.02, as elements of the format's dtype."""
    fmt = FORMATS[format_name]
    if not fmt.quantised:
        return (rng.normal(size=(_BLOCKS, fmt.words)) * 0.02).astype(fmt.dtype).reshape(-1)
    blocks = rng.integers(-(1 << 31), 1 << 31, (_BLOCKS, fmt.words), dtype=np.int64).astype(np.int32)
    scales = rng.uniform(0.5, 1.5, (_BLOCKS, TILE)) * (0.02 / (4 if fmt.codes_per_word == 8 else 64))
    blocks[:, -TILE // 2 :] = scales.astype(np.float16).view(np.int32)
    return blocks.reshape(-1)


def _class_of(name: str) -> str:
    if name in ("embedding", "lm_head"):
        return {"embedding": "embedding", "lm_head": "head"}[name]
    return "dense" if ".dense." in name or ".shared." in name else "attention"


def _weights(writer: ArtifactWriter, config: DecoderConfig, quantisation: Quantisation, rng: np.random.Generator) -> None:
    patterns = {kind: pattern(kind, rng) for kind in set(quantisation.classes.values())}
    _, parameters = Decoder(config, quantisation).export()
    for name, parameter in parameters:
        shape = [int(d) for d in parameter.shape]
        if name == "inverse_frequencies":
            array = config.rope.inverse_frequencies(config.rotary_dim)
        elif name.endswith(("norm.weight", "_norm")):
            array = np.ones(shape, np.float32)
        elif len(shape) == 1 and str(parameter.dtype) == FORMATS[quantisation[_class_of(name)]].dtype and shape[0] >= TILE * TILE:
            array = np.resize(patterns[quantisation[_class_of(name)]], shape[0])
        else:
            array = (rng.normal(size=shape) * 0.02).astype(str(parameter.dtype))
        writer.add_weight(name, array)


def _experts(writer: ArtifactWriter, config: DecoderConfig, format_name: str, rng: np.random.Generator) -> None:
    fmt = FORMATS[format_name]
    sections = record_sections(format_name, config.hidden_size, config.expert_ffn_size, config.expert_bias)
    size = sum(section for _, section in sections.values())
    record = np.resize(pattern(format_name, rng), size // np.dtype(fmt.dtype).itemsize)
    writer.set_expert_layout(format_name, len(config.moe_layers), config.num_experts, size, sections)
    for layer in range(len(config.moe_layers)):
        for expert in range(config.num_experts):
            writer.add_expert(layer, expert, record)


def shrunk(name: str, layers: int | None, experts: int | None, vocabulary: int | None) -> dict[str, Any]:
    """The config.json of `name` with fewer layers, experts and tokens."""
    config = dict(CONFIGS[name])
    if vocabulary is not None:
        config |= {"vocab_size": vocabulary, "bos_token_id": None, "eos_token_id": None}
    if layers is not None:
        config["num_hidden_layers"] = layers
        if "first_k_dense_replace" in config:
            config["first_k_dense_replace"] = min(config["first_k_dense_replace"], layers - 1)
    if experts is not None:
        field = next(f for f in ("num_experts", "num_local_experts", "n_routed_experts") if f in config)
        config[field] = experts
        config["num_experts_per_tok"] = min(config["num_experts_per_tok"], experts)
    return config


def make(name: str, model: dict[str, Any], out: Path, quant: str, names: Sequence[str], tokenizer: Path) -> Path:
    """Writes the artifact of a model with config.json `model` for the targets `names` to `out`."""
    config, _ = resolve(model, name)
    config = replace(config, context_size=min(config.context_size, 4096))
    quantisation = Quantisation.named(quant)
    rng = np.random.default_rng(SEED)
    with ArtifactWriter(out, force=True) as writer:
        entries, digests = {}, []
        for target in (gpu.resolve(n) or targets.resolve(n) for n in names):
            write: Any = gpu.write if isinstance(target, gpu.GpuTarget) else compiler._write_target
            entries[target.name], digest = write(writer, target, config, quantisation, _CHUNK, None)
            digests.append(digest)
        _weights(writer, config, quantisation, rng)
        _experts(writer, config, quantisation["expert"], rng)
        writer.copy_file(tokenizer, "tokenizer.json")
        return writer.finish(
            {
                "model": compiler._model_facts(f"{name}-pattern", config),
                "quantisation": {"preset": quant, "group_size": 32, "classes": dict(quantisation.classes)},
                "prefill_chunk": _CHUNK,
                "kv_dtype": quantisation.kv_dtype,
                "kernel_set": digests[0],
                "targets": entries,
                "tokenizer_files": ["tokenizer.json"],
                "provenance": {"source": "benchmarks/gpu_artifact.py", "created_by": f"cfmoe {metadata.version('cfmoe')}"},
            }
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=sorted(CONFIGS))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quant", default="mixed")
    parser.add_argument("--target", default="vulkan-desktop", help="comma-separated")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--experts", type=int)
    parser.add_argument("--vocabulary", type=int)
    default = Path(__file__).parents[1] / "assets/demo-moe-13m/tokenizer.json"
    parser.add_argument("--tokenizer", type=Path, default=default)
    options = parser.parse_args()
    model = shrunk(options.model, options.layers, options.experts, options.vocabulary)
    print(make(options.model, model, options.out, options.quant, options.target.split(","), options.tokenizer))


if __name__ == "__main__":
    main()

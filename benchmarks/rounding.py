"""How far logits move when weights move by their last bits: what to expect between two devices that add in another order.

Run as: python benchmarks/rounding.py --model assets/demo-moe-13m --out build/bench/rounding.json

Compiles a checkpoint and a copy whose first norm is off by about two parts in a million, and compares their logits on the CPU. Where
activations are quantised, such a bit tips codes and, with them, close choices of the router.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from cfmoe.compile import compile_model
from cfmoe.runtime import Engine

MOVED = 2e-6  # relative, of a normal distribution
NORM = "model.layers.0.input_layernorm.weight"


def move(model: Path, out: Path) -> None:
    """Copies a one-file checkpoint, its first norm moved."""
    shutil.copytree(model, out)
    weights = load_file(out / "model.safetensors")
    noise = torch.randn(weights[NORM].shape, generator=torch.Generator().manual_seed(1))
    weights[NORM] = weights[NORM].float() * (1 + MOVED * noise)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})


def logits(artifact: Path, tokens: list[int]) -> np.ndarray:
    with Engine(artifact) as engine:
        return np.array(engine.session().feed(tokens, decode=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--presets", default="f32,f16,mixed,q4")
    parser.add_argument("--tokens", type=int, default=96, help="drawn at random, of the first 8,000")
    options = parser.parse_args()
    tokens = np.random.default_rng(0).integers(1, 8000, options.tokens).tolist()
    results = []
    with tempfile.TemporaryDirectory(prefix="cfmoe-rounding-") as temporary:
        moved = Path(temporary) / "moved"
        move(options.model, moved)
        for preset in options.presets.split(","):
            pair = [compile_model(m, Path(temporary) / f"{i}-{preset}", quant=preset) for i, m in enumerate((options.model, moved))]
            plain, other = (logits(artifact, tokens) for artifact in pair)
            gap = np.abs(plain - other)
            same = float((plain.argmax(-1) == other.argmax(-1)).mean())
            results.append({"preset": preset, "max": float(gap.max()), "mean": float(gap.mean()), "same_argmax": same})
            print(results[-1], flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"model": options.model.name, "moved": MOVED, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()

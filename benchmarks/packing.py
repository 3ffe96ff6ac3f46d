"""How fast checkpoint weights are quantised and packed: MB of bf16 weights per second, for every storage format.

Run as: python benchmarks/packing.py --out build/bench/packing.json
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from cfmoe.compile.kernels.matmul import FORMATS
from cfmoe.compile.quantise import pack
from cfmoe.measure.machine import cpu, memory
from cfmoe.measure.speed import spread

SIZE = 2048  # rows and columns of the matrix


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/bench/packing.json"))
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    weight = np.random.default_rng(0).normal(0, 0.02, (SIZE, SIZE)).astype(ml_dtypes.bfloat16)
    rates: dict[str, list[float]] = {name: [] for name in FORMATS}
    for name in FORMATS:
        pack(weight, name)  # compiles the kernel
    for _ in range(options.rounds):
        for name, measured in rates.items():
            start = time.perf_counter()
            pack(weight, name)
            measured.append(weight.nbytes / (time.perf_counter() - start) / 1e6)
    report = {
        "machine": {"cpu": cpu(), "memory": memory()},
        "matrix": [SIZE, SIZE],
        "rounds": options.rounds,
        "bf16_mb_per_s": {name: spread(measured) for name, measured in rates.items()},
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""How close the expert kernels come to plain read bandwidth.

Run as: python benchmarks/expert_gemv.py --out build/bench/expert_gemv.json

Decode kernels of one expert shape run over more experts than any cache holds, one token each; in the same process and interleaved with it
a plain sum reads the same memory. One thread and two, medians over rounds, and the spread of the ratio.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tvm
import tvm_ffi

from cfmoe.compile import targets
from cfmoe.compile.kernels import expert
from cfmoe.compile.kernels.builder import TILE
from cfmoe.compile.kernels.matmul import FORMATS
from cfmoe.measure.machine import describe

SHAPES = {"OLMoE": (2048, 1024), "DeepSeek-MoE": (2048, 1408), "Mixtral": (4096, 14336)}
SLAB_BYTES = 1 << 29  # above any last-level cache


def aligned(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.zeros(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def kernels(format_name: str, hidden: int, ffn: int) -> tuple[Callable[..., None], Callable[..., None]]:
    target = targets.resolve("llvm")
    shape = expert.ExpertShape(format_name, hidden, ffn)
    up = expert.gate_up("gate_up", target.simd, shape, True)
    down = expert.down("down", target.simd, shape, True)
    built = tvm.compile(tvm.IRModule({"gate_up": up, "down": down}), target=target.tvm_target())
    return built["gate_up"], built["down"]


def measure(format_name: str, hidden: int, ffn: int, rounds: int) -> dict[str, object]:
    """GB/s of weights for one and two threads, each expert on one thread, and the ratio to plain reading."""
    fmt = FORMATS[format_name]
    gate_up, down = kernels(format_name, hidden, ffn)
    record = sum(size for _, size in expert.record_sections(format_name, hidden, ffn).values())
    experts = max(2, SLAB_BYTES // record // 2 * 2)
    words = record // 4
    slab = aligned((experts * words,), "int32")
    slab[:] = np.random.default_rng(0).integers(0, 1 << 30, 1 << 16, dtype=np.int32)[np.arange(len(slab)) & 0xFFFF] & 0x0FFFFFFF
    plain = slab.view(np.int64)
    slab_tensor = tvm_ffi.from_dlpack(slab if fmt.dtype == "int32" else slab.view(fmt.dtype))

    def sweep(first: int, last: int) -> None:
        activation = tvm_ffi.from_dlpack(aligned((1, fmt.activation_width(hidden)), fmt.activation_dtype))
        rows = tvm_ffi.from_dlpack(aligned((1,), "int32"))
        scratch = tvm_ffi.from_dlpack(aligned((1, expert.scratch_width(format_name, ffn)), fmt.activation_dtype))
        out = tvm_ffi.from_dlpack(aligned((1, hidden), "float32"))
        for number in range(first, last):
            gate_up(activation, rows, slab_tensor, scratch, number * words, 0, ffn // TILE)
            down(scratch, rows, slab_tensor, out, number * words, 0, hidden // TILE)

    def read(first: int, last: int) -> None:
        np.bitwise_or.reduce(plain[first * words // 2 : last * words // 2])

    def rate(work: Callable[[int, int], None], threads: int, pool: ThreadPoolExecutor) -> float:
        edges = [experts * i // threads for i in range(threads + 1)]
        start = time.perf_counter()
        list(pool.map(work, edges[:-1], edges[1:]))
        return experts * record / (time.perf_counter() - start) / 1e9

    result: dict[str, object] = {"record_bytes": record, "experts": experts}
    with ThreadPoolExecutor(2) as pool:
        for threads in (1, 2):
            rate(sweep, threads, pool)
            pairs = [(rate(sweep, threads, pool), rate(read, threads, pool)) for _ in range(rounds)]
            ratios = sorted(kernel / plain_rate for kernel, plain_rate in pairs)
            result[f"threads_{threads}"] = {
                "kernel_gb_per_s": round(statistics.median(k for k, _ in pairs), 2),
                "read_gb_per_s": round(statistics.median(r for _, r in pairs), 2),
                "ratio": round(statistics.median(ratios), 3),
                "ratio_min": round(ratios[0], 3),
                "ratio_max": round(ratios[-1], 3),
            }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/bench/expert_gemv.json"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--formats", default="q4,q8")
    parser.add_argument("--shapes", default="OLMoE,DeepSeek-MoE")
    options = parser.parse_args()
    results = {}
    for shape in options.shapes.split(","):
        for format_name in options.formats.split(","):
            results[f"{shape} {format_name}"] = measure(format_name, *SHAPES[shape], options.rounds)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"machine": describe(), "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()

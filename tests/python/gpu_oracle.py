"""Runs the GPU plan of an artifact kernel by kernel, knowing nothing of the runtime: the oracle of plan and kernels."""

from __future__ import annotations

import json
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cfmoe.artifact.reader import Artifact
from cfmoe.compile.checkpoint import Checkpoint
from cfmoe.compile.families import resolve
from gpu_device import Binding
from vm_oracle import route

_OPERATIONS = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "floordiv": operator.floordiv,
    "floormod": operator.mod,
    "min": min,
    "max": max,
}


def evaluate(expression: Any, symbols: dict[str, int]) -> int:
    if isinstance(expression, int):
        return expression
    if isinstance(expression, str):
        return symbols[expression]
    name, a, b = expression
    return int(_OPERATIONS[name](evaluate(a, symbols), evaluate(b, symbols)))


class GpuOracle:
    """The decoder of checkpoint `model` as `artifact`'s target for `device` computes it; `device` has upload and kernel."""

    def __init__(self, model: Path, artifact: Path, target: str, device: Any, context: int = 512) -> None:
        opened = Artifact.open(artifact)
        self.chunk = opened.manifest.prefill_chunk
        self.config, _ = resolve(Checkpoint(model).config, str(model / "config.json"))
        entry = opened.manifest.targets[target]
        self.plan = json.loads((artifact / entry.plan).read_text())
        library = (artifact / entry.library).read_bytes()
        self.device = device
        self.kernels = {}
        for name, k in self.plan["kernels"].items():
            begin, size = k["code"]
            self.kernels[name] = device.kernel(library[begin : begin + size], k["entry"], k["buffers"], k["scalars"], k["local"])
        dense = (artifact / "weights.bin").read_bytes()
        self.weights = {w.name: device.upload(np.frombuffer(dense, np.uint8, w.size, w.offset)) for w in opened.index.weights}
        self.stride = opened.index.experts.record_stride
        self.slab = device.upload(np.fromfile(artifact / "experts.bin", np.uint8))
        kv, context = self.plan["kv"], min(context, -(-self.config.context_size // 16) * 16)
        self.context = context
        sizes = [int(np.prod([evaluate(d, {"context": context}) for d in kv[shape]])) for shape in ("k_shape", "v_shape")]
        # Not zeros: what nothing has written must not count.
        keys, values = (np.full(size, 7.5, kv["dtype"]) for size in sizes)
        self.keys = [device.upload(keys) for _ in range(kv["layers"])]
        self.values = [device.upload(values) for _ in range(kv["layers"])]
        size = max(p["workspace_bytes"] for p in self.plan["programs"].values())
        self.workspace = device.upload(np.full(size, 127, np.uint8))
        self.position = 0

    def prefill(self, tokens: Sequence[int]) -> np.ndarray:
        """Logits behind every token, fp32 [tokens, vocab]."""
        return np.concatenate([self._logits("prefill", tokens[i : i + self.chunk]) for i in range(0, len(tokens), self.chunk)])

    def decode(self, tokens: Sequence[int]) -> np.ndarray:
        return np.concatenate([self._logits("decode", [token]) for token in tokens])

    def _logits(self, program: str, tokens: Sequence[int]) -> np.ndarray:
        hidden = self._run(program, {"tokens": np.array(tokens, np.int32)}, len(tokens))
        self.position += len(tokens)
        return np.concatenate([self._run("head", {"hidden": row[None]}, 1) for row in hidden])

    def _run(self, program: str, inputs: dict[str, np.ndarray], n: int) -> np.ndarray:
        p = self.plan["programs"][program]
        self.symbols = {"n": n, "position": self.position, "context": self.context}
        self.buffers, self.bindings = p["buffers"], []
        for b in p["buffers"]:
            binding: Binding = {
                "input": lambda b: (self.device.upload(inputs[b["name"]]), 0),
                "weight": lambda b: (self.weights[b["name"]], 0),
                "k_cache": lambda b: (self.keys[b["layer"]], 0),
                "v_cache": lambda b: (self.values[b["layer"]], 0),
                "workspace": lambda b: (self.workspace, b["offset"]),
            }[b["kind"]](b)
            assert binding[1] % self.plan["alignment"] == 0
            self.bindings.append(binding)
        for step in p["steps"]:
            getattr(self, "_" + step["op"])(step, program)
        return self._view(p["output"]).copy()

    def _view(self, number: int) -> np.ndarray:
        b = self.buffers[number]
        shape = [evaluate(d, self.symbols) for d in b["shape"]]
        buffer, offset = self.bindings[number]
        size = int(np.prod(shape)) * np.dtype(b["dtype"]).itemsize
        return buffer.array[offset : offset + size].view(b["dtype"]).reshape(shape)

    def _launch(self, name: str, bindings: Sequence[Binding], scalars: Sequence[int]) -> None:
        symbols = {f"s{i}": value for i, value in enumerate(scalars)}
        k = self.plan["kernels"][name]
        self.kernels[name](bindings, scalars, [evaluate(e, symbols) for e in k["grid"]])

    def _call(self, step: dict[str, Any], _program: str) -> None:
        bindings = [self.bindings[a["buffer"]] for a in step["args"] if "buffer" in a]
        scalars = [evaluate(a["scalar"], self.symbols) for a in step["args"] if "scalar" in a]
        self._launch(step["kernel"], bindings, scalars)

    def _route(self, step: dict[str, Any], _program: str) -> None:
        rows = [route(row, self.config) for row in self._view(step["logits"])]
        self._view(step["ids"])[...] = np.stack([r[0] for r in rows])
        self._view(step["weights"])[...] = np.stack([r[1] for r in rows])

    def _experts(self, step: dict[str, Any], program: str) -> None:
        chosen = self._view(step["ids"]).reshape(-1)
        top_k = self.config.top_k
        work, rows_in, rows_out = [], [], []
        if program == "decode":
            groups = [(int(e), np.array([k])) for k, e in enumerate(chosen)]
        else:
            groups = [(int(e), np.flatnonzero(chosen == e)) for e in sorted(set(chosen.tolist()))]
        for expert, places in groups:
            offset = (step["layer"] * self.config.num_experts + expert) * self.stride // 4
            work += [offset, len(rows_out), len(places), len(rows_out)]
            rows_in += (places // top_k).tolist()
            rows_out += places.tolist()
        lists = [self.device.upload(np.array(values, np.int32)) for values in (work, rows_in, rows_out)]
        activation, out, scratch = (self.bindings[step[key]] for key in ("activation", "rows", "scratch"))
        names = self.plan["experts"]
        most = max(work[2::4])
        # Two dispatches, as two slabs would make.
        half = len(groups) // 2
        for first, count in ((0, half), (half, len(groups) - half)):
            if count:
                bindings = [activation, (lists[1], 0), (self.slab, 0), scratch, (lists[0], 0)]
                self._launch(names["gate_up"][program], bindings, [first, count, most])
                bindings = [scratch, (lists[2], 0), (self.slab, 0), out, (lists[0], 0)]
                self._launch(names["down"][program], bindings, [first, count, most])

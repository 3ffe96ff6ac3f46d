"""Writes the lowered Relax functions down as plan.json: flat kernel calls over one workspace."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax, tirx

from cfmoe.compile.decoder_config import DecoderConfig, Quantisation
from cfmoe.compile.kernels.matmul import FORMATS

_ALIGNMENT = 64
_K_LANES = 16  # positions of one block of the K cache
_OPERATORS = {"Add": "add", "Sub": "sub", "Mul": "mul", "FloorDiv": "floordiv", "FloorMod": "floormod", "Min": "min", "Max": "max"}


def _expression(value: Any) -> Any:
    """A TIR integer expression in the form of docs/artifact-format.md."""
    kind = type(value).__name__
    if isinstance(value, int):
        return value
    if kind == "IntImm":
        return int(value.value)
    if isinstance(value, tirx.Var) or kind == "Var":
        # The number of K blocks is not free: it follows from the context.
        return ["floordiv", "context", _K_LANES] if value.name == "blocks" else str(value.name)
    if kind in _OPERATORS:
        return [_OPERATORS[kind], _expression(value.a), _expression(value.b)]
    raise AssertionError(f"plan.json has no operation for {kind}: {value}")


def _name(var: Any) -> str:
    return str(var.name_hint if hasattr(var, "name_hint") else var.name)


class _ProgramWriter:
    """Walks one straight-line function. Storages that the memory planner shares become offsets into the workspace."""

    def __init__(self, function: relax.Function, parameters: list[str], bounds: dict[str, int]) -> None:
        self.bounds = bounds
        self.buffers: list[dict[str, Any]] = []
        self.steps: list[dict[str, Any]] = []
        self.workspace = 0
        self.values: dict[Any, Any] = {}  # relax variable -> buffer number, list of them, or storage offset
        self.parameters = parameters
        self._inputs(function)
        for block in function.body.blocks:
            for binding in block.bindings:
                self._binding(binding)
        self.output = self.values[function.body.body]

    def _buffer(self, kind: str, type_: Any, **extra: Any) -> int:
        shape = [_expression(d) for d in type_.shape]
        self.buffers.append({"kind": kind, **extra, "dtype": str(type_.dtype), "shape": shape})
        return len(self.buffers) - 1

    def _inputs(self, function: relax.Function) -> None:
        count = int(function.attrs["num_input"])
        weights = function.params[count:]
        used = {v for block in function.body.blocks for b in block.bindings for v in relax.analysis.free_vars(b.value)}
        for param in function.params[:count]:
            kind = {"k_caches": "k_cache", "v_caches": "v_cache"}.get(_name(param))
            if kind is not None:
                self.values[param] = [self._buffer(kind, t, layer=i) for i, t in enumerate(param.ty.fields)]
            elif hasattr(param.ty, "dtype"):
                self.values[param] = self._buffer("input", param.ty, name=_name(param))
        for param, name in zip(weights, self.parameters, strict=True):
            if param in used:
                self.values[param] = self._buffer("weight", param.ty, name=name)

    def _binding(self, binding: Any) -> None:
        value, var = binding.value, binding.var
        if isinstance(value, relax.Tuple):
            self.values[var] = [self.values[f] for f in value.fields]
        elif isinstance(value, relax.TupleGetItem):
            self.values[var] = self.values[value.tuple_value][value.index]
        elif isinstance(value, relax.Var):
            self.values[var] = self.values[value]
        elif isinstance(value, relax.Call):
            self._call(var, value)
        else:
            raise AssertionError(f"plan.json cannot hold {type(value).__name__}: {value}")

    def _call(self, var: Any, call: relax.Call) -> None:
        name = getattr(call.op, "name", "")
        if name == "relax.memory.alloc_storage":
            self.values[var] = self._reserve(int(call.args[0].values[0].value))
        elif name == "relax.memory.alloc_tensor":
            offset = self.values[call.args[0]] + int(call.args[1].value)
            self.values[var] = self._buffer("workspace", var.ty, offset=offset)
        elif name == "relax.builtin.alloc_tensor":
            # What a function returns is not planned; it gets memory of its own.
            self.values[var] = self._buffer("workspace", var.ty, offset=self._reserve(self._extent(var.ty)))
        elif isinstance(call.op, relax.ExternFunc):
            self._host_step(str(call.op.global_symbol), list(call.args))
        elif isinstance(call.op, relax.GlobalVar):
            self.steps.append({"op": "call", "kernel": call.op.name_hint, "args": [self._argument(a) for a in call.args]})
        elif name == "relax.call_packed":
            self._host_step(str(call.args[0].global_symbol), list(call.args[1:]))
        else:
            raise AssertionError(f"plan.json cannot hold a call of {call.op}")

    def _reserve(self, size: int) -> int:
        offset = self.workspace
        self.workspace += -(-size // _ALIGNMENT) * _ALIGNMENT
        return offset

    def _extent(self, type_: Any) -> int:
        count = tvm.DataType(str(type_.dtype)).bits // 8
        for dim in type_.shape:
            count *= int(dim.value) if type(dim).__name__ == "IntImm" else self.bounds[str(dim.name)]
        return count

    def _argument(self, arg: Any) -> dict[str, Any]:
        if arg in self.values:
            return {"buffer": self.values[arg]}
        return {"scalar": _expression(arg)}

    def _host_step(self, name: str, args: list[Any]) -> None:
        options: dict[str, int] = {}
        if name == "cfmoe.route":
            logits, layer, groups, top_groups, ids, weights = args
            if int(groups.value) > 1:
                options = {"groups": int(groups.value), "top_groups": int(top_groups.value)}
            names = {"logits": logits, "ids": ids, "weights": weights}
        elif name == "cfmoe.experts":
            activation, ids, layer, rows, scratch = args
            names = {"activation": activation, "ids": ids, "rows": rows, "scratch": scratch}
        else:
            raise AssertionError(f"the runtime has no step {name}")
        fields = {key: self.values[arg] for key, arg in names.items()}
        self.steps.append({"op": name.removeprefix("cfmoe."), "layer": int(layer.value), **options, **fields})


def symbol_bounds(config: DecoderConfig, chunk: int) -> dict[str, int]:
    """Upper bounds of the symbolic dimensions, for the memory planner."""
    context = -(-config.context_size // _K_LANES) * _K_LANES
    return {"n": chunk, "position": context, "context": context, "blocks": context // _K_LANES}


def emit(
    mod: tvm.IRModule, config: DecoderConfig, quantisation: Quantisation, chunk: int, parameters: list[str], tile: int
) -> dict[str, Any]:
    """plan.json for the module that the pipeline returned; `parameters` are the weights in argument order."""
    bounds = symbol_bounds(config, chunk)
    programs = {}
    for name in ("prefill", "decode", "head"):
        writer = _ProgramWriter(mod[name], parameters, bounds)
        programs[name] = {
            "workspace_bytes": writer.workspace,
            "buffers": writer.buffers,
            "output": writer.output,
            "steps": writer.steps,
        }
    c = config
    return {
        "version": 1,
        "symbols": {"n": [1, chunk], "position": [0, bounds["context"]], "context": [_K_LANES, bounds["context"]]},
        "hidden_size": c.hidden_size,
        "kv": {
            "dtype": quantisation.kv_dtype,
            "layers": c.num_layers,
            "k_shape": [c.num_kv_heads, ["floordiv", "context", _K_LANES], c.head_dim, _K_LANES],
            "v_shape": [c.num_kv_heads, "context", c.value_dim],
        },
        "experts": {
            "gate_up": {
                "prefill": "expert_gate_up_prefill",
                "decode": "expert_gate_up_decode",
                "tiles": c.expert_ffn_size // tile,
            },
            "down": {"prefill": "expert_down_prefill", "decode": "expert_down_decode", "tiles": c.hidden_size // tile},
            "slab_dtypes": [FORMATS[quantisation["expert"]].dtype],
        },
        "programs": programs,
    }

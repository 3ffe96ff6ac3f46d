"""Writes the lowered Relax functions down as plan.json: flat kernel calls over one workspace."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax

from cfmoe.compile.decoder_config import DecoderConfig, Quantisation
from cfmoe.compile.kernels.builder import TILE
from cfmoe.compile.kernels.matmul import FORMATS
from cfmoe.compile.passes.lower_to_gpu_kernels import GpuKernels, KernelCall
from cfmoe.compile.plan_expression import expression

_ALIGNMENT = 64
_GPU_ALIGNMENT = 512  # what devices may ask of the offset of a binding
_K_LANES = 16  # positions of one block of the K cache


def _name(var: Any) -> str:
    return str(var.name_hint if hasattr(var, "name_hint") else var.name)


class _ProgramWriter:
    """Walks one straight-line function. Storages that the memory planner shares become offsets into the workspace."""

    def __init__(
        self,
        function: relax.Function,
        parameters: list[str],
        bounds: dict[str, int],
        alignment: int = _ALIGNMENT,
        gpu: GpuKernels | None = None,
    ) -> None:
        self.bounds, self.alignment, self.gpu = bounds, alignment, gpu
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
        shape = [expression(d) for d in type_.shape]
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
        self.workspace += -(-size // self.alignment) * self.alignment
        return offset

    def _extent(self, type_: Any) -> int:
        count = tvm.DataType(str(type_.dtype)).bits // 8
        for dim in type_.shape:
            count *= int(dim.value) if type(dim).__name__ == "IntImm" else self.bounds[str(dim.name)]
        return count

    def _argument(self, arg: Any) -> dict[str, Any]:
        if arg in self.values:
            return {"buffer": self.values[arg]}
        return {"scalar": expression(arg)}

    def _operation(self, calls: list[KernelCall], args: list[Any]) -> None:
        """The kernels of a GPU operation: buffers in order, then the scalars that each kernel names."""
        assert self.gpu is not None
        tensors = [self.values[arg] for arg in args if arg in self.values]
        for call in calls:
            scalars = self.gpu.scalars(call.kernel)
            given = [{"buffer": tensors[place]} for place in call.buffers]
            self.steps.append({"op": "call", "kernel": call.kernel, "args": [*given, *({"scalar": name} for name in scalars)]})

    def _host_step(self, name: str, args: list[Any]) -> None:
        if self.gpu is not None and name in self.gpu.operations:
            self._operation(self.gpu.operations[name], args)
            return
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


def _programs(mod: tvm.IRModule, parameters: list[str], bounds: dict[str, int], **options: Any) -> dict[str, Any]:
    programs = {}
    for name in ("prefill", "decode", "head"):
        writer = _ProgramWriter(mod[name], parameters, bounds, **options)
        programs[name] = {
            "workspace_bytes": writer.workspace,
            "buffers": writer.buffers,
            "output": writer.output,
            "steps": writer.steps,
        }
    return programs


def emit(
    mod: tvm.IRModule, config: DecoderConfig, quantisation: Quantisation, chunk: int, parameters: list[str], tile: int
) -> dict[str, Any]:
    """plan.json for the module that the pipeline returned; `parameters` are the weights in argument order."""
    bounds = symbol_bounds(config, chunk)
    return _document(config, quantisation, chunk, tile) | {"programs": _programs(mod, parameters, bounds)}


def emit_gpu(
    mod: tvm.IRModule,
    config: DecoderConfig,
    quantisation: Quantisation,
    chunk: int,
    parameters: list[str],
    gpu: GpuKernels,
    kernels: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """The same for a GPU, with `kernels` as they lie in its library."""
    bounds = symbol_bounds(config, chunk)
    programs = _programs(mod, parameters, bounds, alignment=_GPU_ALIGNMENT, gpu=gpu)
    document = _document(config, quantisation, chunk, TILE)
    return document | {"alignment": _GPU_ALIGNMENT, "kernels": kernels, "programs": programs}


def _document(config: DecoderConfig, quantisation: Quantisation, chunk: int, tile: int) -> dict[str, Any]:
    bounds = symbol_bounds(config, chunk)
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
    }

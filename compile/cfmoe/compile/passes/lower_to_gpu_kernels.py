"""Replaces abstract operations by kernels for one GPU profile; equal operations share kernels.

An operation may take several kernels. Relax sees one external call of the operation's name; `GpuKernels.operations` says what that is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import tvm
from tvm import relax, tirx
from tvm.relax.expr_functor import PyExprMutator, mutator

from cfmoe.compile.codegen import walk
from cfmoe.compile.kernels.gpu import attention, attention_decode, linear, rope, rowwise
from cfmoe.compile.kernels.gpu.profile import Profile
from cfmoe.compile.kernels.linear import LinearShape
from cfmoe.compile.passes import packed_call
from cfmoe.compile.passes.lower_to_kernels import HOST_STEPS
from cfmoe.compile.passes.packed_call import PackedCall
from cfmoe.compile.passes.split_decode_attention import attention_shape


@dataclass(frozen=True)
class KernelCall:
    """One kernel of an operation; `buffers` are places among the operation's tensors and, last, its results."""

    kernel: str
    buffers: tuple[int, ...]


@dataclass
class GpuKernels:
    functions: dict[str, tirx.PrimFunc] = field(default_factory=dict)
    operations: dict[str, list[KernelCall]] = field(default_factory=dict)

    def scalars(self, kernel: str) -> list[str]:
        """Names of a kernel's scalars, which are symbols of plan.json."""
        return [str(p.name) for p in self.functions[kernel].params if not walk.is_pointer(p)]


# (kernel's suffix, emit(kernel name), places of its buffers)
Parts = Sequence[tuple[str, Callable[[str], tirx.PrimFunc], Sequence[int]]]


class _Emitters:
    def __init__(self, profile: Profile) -> None:
        self.profile = profile

    def parts(self, op: PackedCall, rows: int | None) -> Parts:
        """The kernels of an operation whose output has `rows` rows; None: as many as the call says."""
        if op.name == "attention":
            return self._attention(op, rows)
        everything = range(len(op.tensors) + len(op.out_types))
        return [("", lambda name: self._single(op, rows, name), everything)]

    def _single(self, op: PackedCall, rows: int | None, name: str) -> tirx.PrimFunc:
        p, a = self.profile, op.attributes
        width = int(op.tensors[0].ty.shape[1]) if len(op.tensors[0].ty.shape) > 1 else 0
        if op.name in ("linear", "linear_residual"):
            shape = LinearShape(a[0], a[1], a[2], rows, bias=bool(a[3]), residual=op.name == "linear_residual")
            return linear.linear(name, p, shape)
        if op.name.startswith("attention_"):
            split, splits = attention_shape(op, rows), a[-1]
            if op.name == "attention_parts":
                return attention_decode.parts(name, p, split, splits)
            return attention_decode.merge(name, p, split, splits, quantised=op.name == "attention_merge_quantise")
        emitters: dict[str, Callable[[], tirx.PrimFunc]] = {
            "add": lambda: rowwise.add_rows(name, p, rows, width),
            "embedding": lambda: linear.embedding(name, p, a[0], a[1], a[2], rows),
            "rope": lambda: rope.rope(name, p, rows, a[0], a[1]),
            "latent_heads": lambda: rowwise.latent_heads(name, p, rows, *a),
            "rms_norm": lambda: rowwise.rms_norm(name, p, rows, width, a[0]),
            "rms_norm_quantise": lambda: rowwise.rms_norm_quantise(name, p, rows, width, a[0]),
            "rms_norm_both": lambda: rowwise.rms_norm_quantise(name, p, rows, width, a[0], both=True),
            "combine_norm": lambda: rowwise.combine_norm(name, p, rows, width, a[0], a[1], quantised=bool(a[2])),
            "quantise": lambda: rowwise.quantise(name, p, rows, width),
            "silu_mul": lambda: rowwise.silu_mul(name, p, rows, width // 2),
            "gated_add": lambda: rowwise.gated_add(name, p, rows, width, int(op.tensors[1].ty.shape[1])),
            "combine": lambda: rowwise.combine(name, p, rows, width, a[0]),
        }
        return emitters[op.name]()

    def _attention(self, op: PackedCall, rows: int | None) -> Parts:
        shape = attention_shape(op, rows)
        normed, last = shape.qk_norm != "none", len(op.tensors)
        append = (0, *((2,) if normed else ()), *range(last - 3, last))
        attend = (0, *((1,) if normed else ()), *((last - 4,) if shape.sinks else ()), *range(last - 3, last), last)
        p = self.profile
        return [
            ("append", lambda name: attention.append(name, p, shape), append),
            ("attend", lambda name: attention.attend(name, p, shape), attend),
        ]


@mutator
class _Lowering(PyExprMutator):
    def __init__(self, mod: tvm.IRModule, profile: Profile, found: GpuKernels, names: dict[Any, str], phase: str) -> None:
        super().__init__(mod)
        self.emitters = _Emitters(profile)
        self.found, self.names, self.phase = found, names, phase

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        call = super().visit_call_(call)
        op = packed_call.read(call)
        if getattr(call.op, "name", "") == "relax.add":
            op = PackedCall("add", list(call.args), [], [], call.ty)
        if op is None or op.name in HOST_STEPS:
            return call
        rows = op.out_types[0].shape[0]
        static_rows = int(rows.value) if type(rows).__name__ == "IntImm" else None
        types = tuple(str(t.ty) for t in op.tensors)
        key = (op.name, static_rows, tuple(op.attributes), types if static_rows is not None else (self.phase, *types))
        if key not in self.names:
            self.names[key] = self._emit(op, static_rows)
        args = relax.Tuple([*op.tensors, *op.scalars])
        return relax.op.call_dps_packed(self.names[key], args, op.out_types if len(op.out_types) > 1 else op.out_type)

    def _emit(self, op: PackedCall, rows: int | None) -> str:
        number = sum(1 for k in self.names if k[0] == op.name)
        name = f"{op.name}_{number}_{'rows' if rows is None else rows}"
        calls = []
        for suffix, emit, places in self.emitters.parts(op, rows):
            kernel = f"{name}_{suffix}" if suffix else name
            self.found.functions[kernel] = emit(kernel)
            calls.append(KernelCall(kernel, tuple(places)))
        self.found.operations[name] = calls
        return name


@tvm.transform.module_pass(opt_level=0, name="LowerToGpuKernels")
class LowerToGpuKernels:
    """Fills `found` as it goes."""

    def __init__(self, profile: Profile, found: GpuKernels) -> None:
        self.profile, self.found = profile, found

    def transform_module(self, mod: tvm.IRModule, _ctx: Any) -> tvm.IRModule:
        names: dict[Any, str] = {}
        for program in ("prefill", "decode", "head"):
            lowering = _Lowering(mod, self.profile, self.found, names, program)
            var = mod.get_global_var(program)
            lowered = lowering.visit_expr(mod[var])
            mod = lowering.builder_.get()
            mod[mod.get_global_var(program)] = lowered
        return mod

"""Replaces abstract operations by calls of kernels for one target; equal operations share a kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm
from tvm import relax, tirx
from tvm.relax.expr_functor import PyExprMutator, mutator

from cfmoe.compile.kernels import activation, attention, linear
from cfmoe.compile.kernels.simd import Simd
from cfmoe.compile.passes import packed_call
from cfmoe.compile.passes.packed_call import PackedCall

HOST_STEPS = ("route", "experts")  # the runtime's own


def _emitters(simd: Simd) -> dict[str, Callable[[str, int | None, list[Any], PackedCall], tirx.PrimFunc]]:
    """name -> emit(kernel name, static rows, attributes, call)."""

    def emit_linear(name: str, rows: int | None, a: list[Any], _call: PackedCall, residual: bool = False) -> tirx.PrimFunc:
        return linear.linear(name, simd, linear.LinearShape(a[0], a[1], a[2], rows, bias=bool(a[3]), residual=residual))

    def emit_attention(name: str, rows: int | None, a: list[Any], call: PackedCall) -> tirx.PrimFunc:
        heads, kv_heads, dim, value_dim, rotary, scale, window, sinks, qk_norm, eps = a
        cache = str(call.tensors[-1].ty.dtype)
        shape = attention.AttentionShape(heads, kv_heads, dim, value_dim, rotary, scale, window, bool(sinks), qk_norm, eps, cache, rows)
        return attention.attention(name, shape)

    def width(call: PackedCall) -> int:
        return int(call.tensors[0].ty.shape[1])

    return {
        "embedding": lambda n, r, a, c: linear.embedding(n, a[0], a[1], a[2], r),
        "rope": lambda n, r, a, c: attention.rope(n, r, a[0], a[1]),
        "latent_heads": lambda n, r, a, c: attention.latent_heads(n, r, *a),
        "rms_norm": lambda n, r, a, c: activation.rms_norm(n, r, width(c), a[0]),
        "rms_norm_quantise": lambda n, r, a, c: activation.rms_norm_quantise(n, r, width(c), a[0]),
        "quantise": lambda n, r, a, c: activation.quantise(n, r, width(c)),
        "linear": emit_linear,
        "linear_residual": lambda n, r, a, c: emit_linear(n, r, a, c, residual=True),
        "attention": emit_attention,
        "silu_mul": lambda n, r, a, c: activation.silu_mul(n, r, width(c) // 2),
        "gated_add": lambda n, r, a, c: activation.gated_add(n, r, width(c), int(c.tensors[1].ty.shape[1])),
        "combine": lambda n, r, a, c: activation.combine(n, r, width(c), a[0]),
    }


@mutator
class _Lowering(PyExprMutator):
    def __init__(self, mod: tvm.IRModule, simd: Simd, kernels: dict[Any, Any], phase: str) -> None:
        super().__init__(mod)
        self.emitters = _emitters(simd)
        self.kernels = kernels
        self.phase = phase

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        call = super().visit_call_(call)
        op = packed_call.read(call)
        if op is None or op.name in HOST_STEPS:
            return call
        rows = op.out_type.shape[0]
        static_rows = int(rows) if isinstance(rows, tirx.IntImm) or type(rows).__name__ == "IntImm" else None
        types = tuple(str(t.ty) for t in op.tensors)
        key = (op.name, static_rows, tuple(op.attributes), types if static_rows is not None else (self.phase, *types))
        if key not in self.kernels:
            number = sum(1 for k in self.kernels if k[0] == op.name)
            name = f"{op.name}_{number}_{'rows' if static_rows is None else static_rows}"
            kernel = self.emitters[op.name](name, static_rows, op.attributes, op)
            self.kernels[key] = self.builder_.add_func(kernel, name)
        return relax.op.call_tir(self.kernels[key], relax.Tuple([*op.tensors, *op.scalars]), op.out_type)


@tvm.transform.module_pass(opt_level=0, name="LowerToKernels")
class LowerToKernels:
    def __init__(self, simd: Simd) -> None:
        self.simd = simd

    def transform_module(self, mod: tvm.IRModule, _ctx: Any) -> tvm.IRModule:
        kernels: dict[Any, Any] = {}
        for name in ("prefill", "decode", "head"):
            lowering = _Lowering(mod, self.simd, kernels, name)
            var = mod.get_global_var(name)
            lowered = lowering.visit_expr(mod[var])
            mod = lowering.builder_.get()
            mod[mod.get_global_var(name)] = lowered
        return mod

"""Cuts the attention of a single token into parts that are computed side by side, and their merge, for GPUs."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator
from tvm.relax.type import TensorType

from cfmoe.compile.kernels.attention import AttentionShape
from cfmoe.compile.kernels.gpu import attention_decode
from cfmoe.compile.passes import packed_call
from cfmoe.compile.passes.packed_call import PackedCall


def attention_shape(op: PackedCall, rows: int | None) -> AttentionShape:
    """The shape behind the attributes of an operation on attention; its last two tensors are the caches."""
    heads, kv_heads, dim, value_dim, rotary, scale, window, sinks, qk_norm, eps = op.attributes[:10]
    cache = str(op.tensors[-1].ty.dtype)
    return AttentionShape(heads, kv_heads, dim, value_dim, rotary, scale, window, bool(sinks), qk_norm, eps, cache, rows)


@mutator
class _Rewriter(PyExprMutator):
    def __init__(self, mod: tvm.IRModule, splits: int) -> None:
        super().__init__(mod)
        self.splits = splits

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        call = super().visit_call_(call)
        op = packed_call.read(call)
        if op is None or op.name != "attention" or type(op.out_type.shape[0]).__name__ != "IntImm":
            return call
        shape = attention_shape(op, 1)
        norms = [] if shape.qk_norm == "none" else op.tensors[1:3]
        sinks = [op.tensors[-4]] if shape.sinks else []
        qkv, rope_and_caches = op.tensors[0], op.tensors[-3:]
        attributes = [*op.attributes, self.splits]
        size = attention_decode.parts_size(shape, self.splits)
        inputs = [qkv, *norms, *rope_and_caches]
        cut = packed_call.write("attention_parts", inputs, attributes, TensorType([1, size], "float32"), op.scalars)
        parts = self.builder_.emit(cut, "parts")
        inputs = [parts, *sinks, qkv, *norms[1:], *rope_and_caches]
        return packed_call.write("attention_merge", inputs, attributes, op.out_type, op.scalars)


@tvm.transform.module_pass(opt_level=0, name="SplitDecodeAttention")
class SplitDecodeAttention:
    """`splits` parts at most."""

    def __init__(self, splits: int) -> None:
        self.splits = splits

    def transform_module(self, mod: tvm.IRModule, _ctx: Any) -> tvm.IRModule:
        return packed_call.rewrite(mod, lambda m, _once: _Rewriter(m, self.splits))

"""Fuses an RMS norm, or the merge of a row's attention, with the quantisation that alone reads it: the row never reaches memory."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator

from cfmoe.compile.passes import packed_call

_FUSED = {"rms_norm": "rms_norm_quantise", "attention_merge": "attention_merge_quantise"}


@mutator
class _Rewriter(PyExprMutator):
    def __init__(self, mod: tvm.IRModule, once: set[Any]) -> None:
        super().__init__(mod)
        self.once = once

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        call = super().visit_call_(call)
        quantise = packed_call.read(call)
        if quantise is None or quantise.name != "quantise" or quantise.tensors[0] not in self.once:
            return call
        source = packed_call.read(self.lookup_binding(quantise.tensors[0]))
        if source is None or source.name not in _FUSED:
            return call
        return packed_call.write(_FUSED[source.name], source.tensors, source.attributes, quantise.out_type, source.scalars)


@tvm.transform.module_pass(opt_level=0, name="FuseNormQuantise")
class FuseNormQuantise:
    def transform_module(self, mod: tvm.IRModule, _ctx: Any) -> tvm.IRModule:
        return packed_call.rewrite(mod, _Rewriter)

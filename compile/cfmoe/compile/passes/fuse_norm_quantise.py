"""Fuses an RMS norm with the quantisation that alone reads it: the normalised row never reaches memory."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator

from cfmoe.compile.passes import packed_call


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
        norm = packed_call.read(self.lookup_binding(quantise.tensors[0]))
        if norm is None or norm.name != "rms_norm":
            return call
        return packed_call.write("rms_norm_quantise", norm.tensors, norm.attributes, quantise.out_type)


@tvm.transform.module_pass(opt_level=0, name="FuseNormQuantise")
class FuseNormQuantise:
    def transform_module(self, mod: tvm.IRModule, _ctx: Any) -> tvm.IRModule:
        return packed_call.rewrite(mod, _Rewriter)

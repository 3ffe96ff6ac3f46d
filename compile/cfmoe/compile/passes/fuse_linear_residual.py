"""Fuses a projection with the residual addition behind it."""

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
        if getattr(call.op, "name", "") != "relax.add":
            return call
        for projected, residual in ((call.args[1], call.args[0]), (call.args[0], call.args[1])):
            if not isinstance(projected, relax.Var) or projected not in self.once:
                continue
            linear = packed_call.read(self.lookup_binding(projected))
            if linear is not None and linear.name == "linear":
                return packed_call.write("linear_residual", [*linear.tensors, residual], linear.attributes, linear.out_type)
        return call


@tvm.transform.module_pass(opt_level=0, name="FuseLinearResidual")
class FuseLinearResidual:
    def transform_module(self, mod: tvm.IRModule, _ctx: Any) -> tvm.IRModule:
        return packed_call.rewrite(mod, _Rewriter)

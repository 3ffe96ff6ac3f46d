"""Fuses neighbours whose results are both needed, for GPUs, where a kernel costs more to start than a row takes to compute.

An RMS norm that is read quantised and as it is becomes one operation with both results; so does the sum of the experts' rows with the
norm of the next layer.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator

from cfmoe.compile.passes import packed_call
from cfmoe.compile.passes.packed_call import PackedCall

_NORMS = ("rms_norm", "rms_norm_quantise")


class _Uses:
    """Who reads which result, and what it is a result of."""

    def __init__(self, function: relax.Function) -> None:
        self.source: dict[Any, PackedCall] = {}
        self.readers: dict[Any, list[PackedCall]] = {}
        for block in function.body.blocks:
            for binding in block.bindings:
                op = packed_call.read(binding.value)
                if op is None:
                    continue
                self.source[binding.var] = op
                for tensor in op.tensors:
                    self.readers.setdefault(tensor, []).append(op)

    def quantised_norms(self) -> dict[Any, PackedCall]:
        """Weights of norms that something quantises -> that quantisation."""
        found = {}
        for var, op in self.source.items():
            readers = [r for r in self.readers.get(var, []) if r.name == "quantise"]
            if op.name == "rms_norm" and readers:
                found[op.tensors[1]] = readers[0]
        return found

    def normed_sums(self) -> dict[Any, PackedCall]:
        """Experts' rows whose sum is normed -> that norm."""
        found = {}
        for var, op in self.source.items():
            norms = [r for r in self.readers.get(var, []) if r.name in _NORMS]
            if op.name == "combine" and len(norms) == 1:
                found[op.tensors[1]] = norms[0]
        return found


@mutator
class _Rewriter(PyExprMutator):
    def __init__(self, mod: tvm.IRModule, function: relax.Function) -> None:
        super().__init__(mod)
        uses = _Uses(function)
        self.quantised, self.normed = uses.quantised_norms(), uses.normed_sums()

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        original = packed_call.read(call)
        call = super().visit_call_(call)
        op = packed_call.read(call)
        if op is None or original is None:
            return call
        if op.name == "quantise" or op.name in _NORMS:
            pair = self.lookup_binding(op.tensors[0]) if isinstance(op.tensors[0], relax.Var) else None
            second = {"quantise": "rms_norm_both"}.get(op.name, "combine_norm")
            if isinstance(pair, relax.TupleGetItem) and pair.index == 0 and self._name(pair.tuple_value) == second:
                return relax.TupleGetItem(pair.tuple_value, 1)
        if op.name == "rms_norm" and original.tensors[1] in self.quantised:
            types = [op.out_type, self.quantised[original.tensors[1]].out_type]
            return self._first("rms_norm_both", op.tensors, op.attributes, types)
        if op.name == "combine" and original.tensors[1] in self.normed:
            norm = self.normed[original.tensors[1]]
            attributes = [*op.attributes, *norm.attributes, int(norm.name == "rms_norm_quantise")]
            return self._first("combine_norm", [*op.tensors, norm.tensors[1]], attributes, [op.out_type, norm.out_type])
        return call

    def _name(self, var: Any) -> str:
        op = packed_call.read(self.lookup_binding(var))
        return op.name if op is not None else ""

    def _first(self, name: str, tensors: list[Any], attributes: list[Any], types: list[Any]) -> relax.Expr:
        pair = self.builder_.emit(packed_call.write(name, tensors, attributes, types), name)
        return relax.TupleGetItem(pair, 0)


@tvm.transform.module_pass(opt_level=0, name="FuseRowKernels")
class FuseRowKernels:
    def transform_module(self, mod: tvm.IRModule, _ctx: Any) -> tvm.IRModule:
        for var, function in mod.functions_items():
            if isinstance(function, relax.Function):
                mod[var] = _Rewriter(mod, function).visit_expr(function)
        return relax.transform.DeadCodeElimination()(mod)

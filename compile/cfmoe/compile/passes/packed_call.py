"""Reading and writing the abstract `cfmoe.*` operations of the decoder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import ir, relax
from tvm.relax.type import TensorType

PREFIX = "cfmoe."


@dataclass(frozen=True)
class PackedCall:
    """One abstract operation: tensors, scalars known at run time, and attributes known now. A tuple is the type of several results."""

    name: str
    tensors: list[Any]
    scalars: list[Any]
    attributes: list[Any]
    out_type: Any

    @property
    def out_types(self) -> list[Any]:
        return list(self.out_type.fields) if hasattr(self.out_type, "fields") else [self.out_type]


def read(expr: Any) -> PackedCall | None:
    """The operation behind `expr`, or None where it is something else."""
    if not isinstance(expr, relax.Call) or getattr(expr.op, "name", "") != "relax.call_dps_packed":
        return None
    name = str(expr.args[0].global_symbol)
    if not name.startswith(PREFIX):
        return None
    tensors, scalars, attributes = [], [], []
    for arg in expr.args[1].fields:
        if type(arg).__name__ in ("IntImm", "FloatImm", "StringImm"):
            attributes.append(arg.value)
        elif isinstance(arg.ty, TensorType):
            tensors.append(arg)
        else:
            scalars.append(arg)
    return PackedCall(name.removeprefix(PREFIX), tensors, scalars, attributes, expr.ty)


def write(name: str, tensors: list[Any], attributes: list[Any], out_type: Any, scalars: Sequence[Any] = ()) -> relax.Call:
    """A call of operation `name` with a result of type `out_type`, or a tuple of results for a list.

    Attributes are ints, floats and strings, scalars what is known at run time.
    """

    def convert(value: Any) -> Any:
        return ir.StringImm(value) if isinstance(value, str) else relax.prim_value(value)

    args = relax.Tuple([*tensors, *scalars, *(convert(a) for a in attributes)])
    return relax.op.call_dps_packed(PREFIX + name, args, out_type)


def single_uses(function: relax.Function) -> set[Any]:
    """Variables that are read exactly once."""
    counts: Counter[Any] = Counter()

    def visit(node: Any) -> None:
        if isinstance(node, relax.Var):
            counts[node] += 1

    for block in function.body.blocks:
        for binding in block.bindings:
            relax.analysis.post_order_visit(binding.value, visit)
    relax.analysis.post_order_visit(function.body.body, visit)
    return {var for var, uses in counts.items() if uses == 1}


def rewrite(mod: tvm.IRModule, rewriter: Callable[[tvm.IRModule, set[Any]], Any]) -> tvm.IRModule:
    """Runs a fresh `rewriter(mod, single uses)` over every Relax function, then drops what nothing reads any more."""
    for var, function in mod.functions_items():
        if isinstance(function, relax.Function):
            mod[var] = rewriter(mod, single_uses(function)).visit_expr(function)
    return relax.transform.DeadCodeElimination()(mod)

"""Integer expressions of plan.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cfmoe.compile.codegen import walk

_OPERATORS = {
    "Add": "add",
    "Sub": "sub",
    "Mul": "mul",
    "FloorDiv": "floordiv",
    "Div": "floordiv",  # TIR divides sizes, which are not negative
    "FloorMod": "floormod",
    "Min": "min",
    "Max": "max",
}
_LANES = 16  # positions of one block of the K cache


def expression(value: Any, symbols: Mapping[Any, str] | None = None) -> Any:
    """A TIR integer expression in the form of docs/artifact-format.md; `symbols` names variables that do not go by their own name."""
    kind = type(value).__name__
    if isinstance(value, int):
        return value
    if kind == "IntImm":
        return int(value.value)
    if kind == "Var":
        if symbols is not None and value in symbols:
            return symbols[value]
        # The number of K blocks is not free: it follows from the context.
        return ["floordiv", "context", _LANES] if value.name == "blocks" else str(value.name)
    if kind in _OPERATORS:
        return [_OPERATORS[kind], expression(value.a, symbols), expression(value.b, symbols)]
    if kind == "RShift" or walk.operator(value) == "shift_right":
        amount, shift = value.args if kind == "Call" else (value.a, value.b)
        return ["floordiv", expression(amount, symbols), 1 << int(shift.value)]
    raise AssertionError(f"plan.json has no operation for {kind}: {value}")

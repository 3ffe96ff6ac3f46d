"""What code generators ask of TIR nodes: operators, element types, parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


def operator(call: Any) -> str:
    """The operator's name of a call without its dialect, such as exp; empty for other nodes."""
    return str(getattr(getattr(call, "op", None), "name", "")).rpartition(".")[2] if type(call).__name__ == "Call" else ""


def is_pointer(parameter: Any) -> bool:
    return "Pointer" in type(parameter.ty).__name__


def constant(node: Any) -> int | None:
    """The value of an integer literal, None for other nodes."""
    if isinstance(node, int):
        return node
    return int(node.value) if type(node).__name__ == "IntImm" else None


def scope_of(buffer: Any) -> str:
    scope = buffer.scope
    return str(scope() if callable(scope) else scope) or "global"


@dataclass(frozen=True)
class Dtype:
    """An element type: kind int, uint, float or bool, bits and lanes."""

    kind: str
    bits: int
    lanes: int

    @staticmethod
    def parse(text: str) -> Dtype:
        """From TVM's name, such as float16x2. Raises ValueError where it is not a number's type."""
        if text == "bool":
            return Dtype("bool", 1, 1)
        head, _, lanes = text.partition("x")
        for kind in ("uint", "int", "float", "bool"):
            if head.startswith(kind) and (head[len(kind) :].isdigit() or head == kind):
                return Dtype(kind, int(head[len(kind) :] or 1), int(lanes or 1))
        raise ValueError(text)

    @property
    def element(self) -> Dtype:
        return Dtype(self.kind, self.bits, 1)


def dtype(node: Any) -> Dtype:
    return Dtype.parse(str(node.ty))

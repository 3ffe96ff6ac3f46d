"""TIR expressions, loads and stores in GLSL.

Every integer is 32 bits wide: 64-bit ones, which TIR makes of indices, are narrowed; smaller ones live in 32 bits and are cut when cast.
Halves are float16_t where the target has float16, otherwise fp32 that is unpacked from 32-bit words and packed back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from cfmoe.compile.codegen import glsl_helpers, walk
from cfmoe.compile.codegen.walk import Dtype
from cfmoe.errors import CFMoEError

_BINARY = {"Add": "+", "Sub": "-", "Mul": "*", "Div": "/"}
_COMPARE = {
    "EQ": ("==", "equal"),
    "NE": ("!=", "notEqual"),
    "LT": ("<", "lessThan"),
    "LE": ("<=", "lessThanEqual"),
    "GT": (">", "greaterThan"),
    "GE": (">=", "greaterThanEqual"),
}
_OPERATORS = {
    "LShift": "<<",
    "RShift": ">>",
    "BitwiseAnd": "&",
    "BitwiseOr": "|",
    "BitwiseXor": "^",
}
# Functions of one or two floats; GLSL has no double or half form of most, so halves are widened.
_FUNCTIONS = {
    "exp": "exp",
    "exp2": "exp2",
    "log": "log",
    "log2": "log2",
    "sqrt": "sqrt",
    "rsqrt": "inversesqrt",
    "sin": "sin",
    "cos": "cos",
    "tan": "tan",
    "tanh": "tanh",
    "pow": "pow",
    "floor": "floor",
    "ceil": "ceil",
    "trunc": "trunc",
    "fabs": "abs",
    "round": "roundEven",
    "rint": "roundEven",
    "nearbyint": "roundEven",
    "fma": "fma",
}
_COMPONENTS = "xyzw"
_WIDTHS = (2, 4)  # of vectors in memory
_PREFIXES = {"bool": "b", "int": "i", "uint": "u", "float": ""}  # of vectors


def _vector(scalar: str, prefix: str, lanes: int) -> str:
    return scalar if lanes == 1 else f"{prefix}vec{lanes}"


@dataclass
class _Parameter:
    """A storage buffer. `widths` are the vector widths that it is read or written in."""

    pointer: Any
    name: str
    binding: int
    dtype: Dtype
    widths: set[int] = field(default_factory=set)
    stored: bool = False


@dataclass(frozen=True)
class _Array:
    """Local or shared memory."""

    name: str
    dtype: Dtype


class Expressions:
    """The names of a shader and the text of what it computes; collects which extensions and helpers that needs."""

    def __init__(self, kernel: str, features: frozenset[str]) -> None:
        self.kernel, self.features = kernel, features
        self.names: dict[Any, str] = {}
        self.parameters: list[_Parameter] = []
        self.memory: dict[Any, _Parameter | _Array] = {}
        self.taken: set[str] = set(glsl_helpers.RESERVED)
        self.used: dict[str, None] = {}
        self.halves = False
        self.branches = 0  # around what is written now

    @contextmanager
    def branch(self) -> Iterator[None]:
        """What is written inside runs in some invocations alone."""
        self.branches += 1
        yield
        self.branches -= 1

    # Names and types

    def fresh(self, wish: str) -> str:
        clean = "".join(c if c.isalnum() else "_" for c in str(wish)).strip("_") or "v"
        clean = "_".join(part for part in clean.split("_") if part)  # GLSL reserves double underscores
        clean = clean if clean[0].isalpha() else f"v{clean}"
        name, number = clean, 1
        while name in self.taken:
            name, number = f"{clean}_{number}", number + 1
        self.taken.add(name)
        return name

    def declare(self, variable: Any) -> str:
        self.names[variable] = self.fresh(variable.name)
        return self.names[variable]

    def unsupported(self, what: str) -> CFMoEError:
        return CFMoEError(f"kernel {self.kernel}: GLSL has no form for {what}")

    @property
    def has_half(self) -> bool:
        return "float16" in self.features

    def type_name(self, dtype: Dtype) -> str:
        if dtype.lanes > 4:
            raise self.unsupported(f"vectors of {dtype.lanes} lanes")
        if dtype.kind == "float" and dtype.bits not in (16, 32):
            raise self.unsupported(f"float{dtype.bits}")
        half = dtype.kind == "float" and dtype.bits == 16 and self.has_half
        if half:
            self.halves = True
        return _vector("float16_t", "f16", dtype.lanes) if half else _vector(dtype.kind, _PREFIXES[dtype.kind], dtype.lanes)

    def add_parameter(self, pointer: Any) -> None:
        dtype = Dtype.parse(str(pointer.ty.element_type))
        if dtype.bits != 32 and (dtype.kind, dtype.bits) != ("float", 16):
            raise self.unsupported(f"a buffer of {pointer.ty.element_type}")
        parameter = _Parameter(pointer, self.fresh(pointer.name), len(self.parameters), dtype)
        self.taken |= {f"{parameter.name}_{width}" for width in _WIDTHS}  # what vectors of it are reached by
        self.parameters.append(parameter)
        self.memory[pointer] = parameter

    def add_array(self, buffer: Any, size: int) -> tuple[str, int]:
        """The declaration of a local or shared buffer, and the bytes of an element."""
        dtype = Dtype.parse(str(buffer.dtype))
        array = _Array(self.fresh(buffer.name), dtype)
        self.memory[buffer] = array
        bits = 16 if dtype.kind == "float" and dtype.bits == 16 and self.has_half else 32
        return f"{self.type_name(dtype)} {array.name}[{size}];", dtype.lanes * bits // 8

    def alias(self, buffer: Any, data: Any) -> None:
        """Lets `buffer` stand for the memory behind `data`, a pointer parameter or another buffer's."""
        if walk.operator(data):
            data = data.args[0]
        if data not in self.memory:
            raise self.unsupported(f"the pointer {data}")
        self.memory[buffer] = self.memory[data]

    # What the whole shader needs

    def extensions(self) -> list[str]:
        wanted = [e for name in self.used for e in glsl_helpers.extensions(name, self.features)]
        if self.halves:
            wanted.append("GL_EXT_shader_explicit_arithmetic_types_float16")
        if any(self._stores_halves(p) for p in self.parameters):
            wanted.append("GL_EXT_shader_16bit_storage")
        return [f"#extension {name} : require" for name in dict.fromkeys(wanted)]

    def used_features(self) -> tuple[str, ...]:
        used = {f for name in self.used for f in glsl_helpers.features(name) if f in self.features}
        used |= {"float16"} if self.halves else set()
        used |= {"storage16"} if any(self._stores_halves(p) for p in self.parameters) else set()
        return tuple(sorted(used))

    def helpers(self) -> list[str]:
        return [glsl_helpers.source(name, self.features) for name in self.used]

    def _stores_halves(self, parameter: _Parameter) -> bool:
        return parameter.dtype.bits == 16 and "storage16" in self.features

    def _in_words(self, parameter: _Parameter) -> bool:
        """Whether halves of this buffer are reached through 32-bit words."""
        return parameter.dtype.bits == 16 and "storage16" not in self.features

    def interface(self) -> list[str]:
        lines = []
        for p in self.parameters:
            access = "" if p.stored else "readonly "
            for width in sorted(p.widths or {1}):
                if self._in_words(p):
                    element = "uint"
                elif p.dtype.bits == 16:
                    element = _vector("float16_t", "f16", width)
                else:
                    element = _vector(p.dtype.kind, _PREFIXES[p.dtype.kind], width)
                name = p.name if width == 1 else f"{p.name}_{width}"
                block = f"Block_{name}"
                lines.append(f"layout(set = 0, binding = {p.binding}, std430) {access}buffer {block} {{ {element} {name}[]; }};")
        return lines

    # Memory

    def _place(self, parameter: _Parameter, width: int, index: Any) -> str:
        """An element, or `width` of them that start at a multiple of `width`."""
        parameter.widths.add(width)
        if width == 1:
            return f"{parameter.name}[{self.text(index)}]"
        shift = {2: 1, 4: 2}[width]
        known = walk.constant(index)
        place = str(known >> shift) if known is not None else f"({self.text(index)} >> {shift})"
        return f"{parameter.name}_{width}[{place}]"

    def _span(self, index: Any) -> tuple[Any, int]:
        """The first element and the number of elements of an index."""
        if type(index).__name__ != "Ramp":
            return index, 1
        if walk.constant(index.stride) != 1:
            raise self.unsupported("strided vector access")
        lanes = walk.dtype(index).lanes
        if lanes not in _WIDTHS:
            raise self.unsupported(f"vectors of {lanes} lanes")
        return index.base, lanes

    def load(self, buffer: Any, index: Any) -> str:
        memory = self.memory[buffer]
        first, width = self._span(index)
        if isinstance(memory, _Array):
            if width == 1:
                return f"{memory.name}[{self.text(index)}]"
            parts = ", ".join(f"{memory.name}[{self.text(first)} + {i}]" for i in range(width))
            return f"{self.type_name(Dtype(memory.dtype.kind, memory.dtype.bits, width))}({parts})"
        if memory.dtype.bits == 16:
            return self._load_halves(memory, first, width)
        return self._place(memory, width, first)

    def _load_halves(self, memory: _Parameter, first: Any, width: int) -> str:
        kind = self.type_name(Dtype("float", 16, width))
        if not self._in_words(memory):
            text = self._place(memory, width, first)
            return text if self.has_half else f"{kind}({text})"
        memory.widths.add(1)
        at = self.text(first)
        if width == 1:
            return f"{kind}(unpackHalf2x16({memory.name}[{at} >> 1])[{at} & 1])"
        parts = ", ".join(f"unpackHalf2x16({memory.name}[({at} >> 1) + {i}])" for i in range(width // 2))
        return f"{kind}({parts})"

    def store(self, buffer: Any, index: Any, value: Any) -> list[str]:
        """The lines that write `value`; a half in a word that others may write too is exchanged atomically."""
        memory = self.memory[buffer]
        first, width = self._span(index)
        text = self.text(value)
        if isinstance(memory, _Array):
            if width == 1:
                return [f"{memory.name}[{self.text(index)}] = {text};"]
            name = self.fresh("lanes")
            lines = [f"{self.type_name(walk.dtype(value))} {name} = {text};"]
            return lines + [f"{memory.name}[{self.text(first)} + {i}] = {name}.{_COMPONENTS[i]};" for i in range(width)]
        memory.stored = True
        if not self._in_words(memory):
            cast = f"{self.type_name(Dtype('float', 16, width))}({text})" if memory.dtype.bits == 16 and self.has_half else text
            if memory.dtype.bits == 16 and not self.has_half:
                cast = f"{_vector('float16_t', 'f16', width)}({text})"
            return [f"{self._place(memory, width, first)} = {cast};"]
        memory.widths.add(1)
        at = self.text(first)
        if width > 1:
            name = self.fresh("lanes")
            lines = [f"{'vec' + str(width)} {name} = vec{width}({text});"]
            return lines + [f"{memory.name}[({at} >> 1) + {i}] = packHalf2x16({name}.{'xz'[i]}{'yw'[i]});" for i in range(width // 2)]
        mask = f"(0xffff0000u >> (({at} & 1) << 4))"
        bits = f"(packHalf2x16(vec2(float({text}), 0.0)) << (({at} & 1) << 4))"
        word = f"{memory.name}[{at} >> 1]"
        return [f"atomicAnd({word}, {mask});", f"atomicOr({word}, {bits});"]

    # Expressions

    def text(self, node: Any) -> str:
        kind = type(node).__name__
        method: Callable[[Any], str] | None = getattr(self, f"_{kind.lower()}", None)
        if method is not None:
            return method(node)
        if kind in _BINARY:
            return f"({self.text(node.a)} {_BINARY[kind]} {self.text(node.b)})"
        if kind in _OPERATORS:
            return f"({self.text(node.a)} {_OPERATORS[kind]} {self.text(node.b)})"
        if kind in _COMPARE:
            symbol, function = _COMPARE[kind]
            if walk.dtype(node.a).lanes > 1:
                return f"{function}({self.text(node.a)}, {self.text(node.b)})"
            return f"({self.text(node.a)} {symbol} {self.text(node.b)})"
        if kind in ("Min", "Max"):
            return f"{kind.lower()}({self.text(node.a)}, {self.text(node.b)})"
        raise self.unsupported(f"the TIR expression {kind}")

    def _var(self, node: Any) -> str:
        if node not in self.names:
            raise self.unsupported(f"the free variable {node.name}")
        return self.names[node]

    def _intimm(self, node: Any) -> str:
        dtype, value = walk.dtype(node), int(node.value)
        if dtype.kind == "bool":
            return "true" if value else "false"
        if dtype.kind == "uint":
            return f"{value}u"
        if not -(1 << 31) <= value < 1 << 31:
            raise self.unsupported(f"the integer {value}, which needs 64 bits")
        if value == -(1 << 31):
            return "(-2147483647 - 1)"
        return f"({value})" if value < 0 else str(value)

    def _floatimm(self, node: Any) -> str:
        value = float(node.value)
        if math.isfinite(value):
            text = f"({value!r})" if value < 0 else repr(value)
        else:
            text = "uintBitsToFloat(0x7fc00000u)" if math.isnan(value) else f"({'-' if value < 0 else ''}uintBitsToFloat(0x7f800000u))"
        name = self.type_name(walk.dtype(node))
        return text if name == "float" else f"{name}({text})"

    def _cast(self, node: Any) -> str:
        source, target = walk.dtype(node.value), walk.dtype(node)
        text = self.text(node.value)
        if target.kind in ("int", "uint") and target.bits < 32:
            wide = self.type_name(Dtype(target.kind, 32, target.lanes))
            return f"bitfieldExtract({wide}({text}), 0, {target.bits})"
        name = self.type_name(target)
        same = source == target or ((source.kind, source.lanes) == (target.kind, target.lanes) and target.kind in ("int", "uint"))
        return text if same else f"{name}({text})"

    def _mod(self, node: Any) -> str:
        # GLSL leaves % of negative numbers open.
        a, b = self.text(node.a), self.text(node.b)
        return f"({a} - ({a} / {b}) * {b})"

    def _floordiv(self, node: Any) -> str:
        return self._floored("floor_div", node)

    def _floormod(self, node: Any) -> str:
        return self._floored("floor_mod", node)

    def _floored(self, helper: str, node: Any) -> str:
        divisor = walk.constant(node.b)
        if divisor is not None and divisor > 0 and divisor & (divisor - 1) == 0:
            if helper == "floor_div":
                return f"({self.text(node.a)} >> {divisor.bit_length() - 1})"
            return f"({self.text(node.a)} & {divisor - 1})"
        if walk.dtype(node).kind == "uint":
            return f"({self.text(node.a)} {'/' if helper == 'floor_div' else '%'} {self.text(node.b)})"
        return self._helper(helper, [node.a, node.b])

    def _helper(self, name: str, args: Any) -> str:
        if name in glsl_helpers.CONVERGENT and self.branches:
            raise self.unsupported(f"{name} inside a branch, where other invocations may be missing")
        self.used[name] = None
        return f"{name}({', '.join(self.text(a) for a in args)})"

    def _and(self, node: Any) -> str:
        with self.branch():
            return f"({self.text(node.a)} && {self.text(node.b)})"

    def _or(self, node: Any) -> str:
        with self.branch():
            return f"({self.text(node.a)} || {self.text(node.b)})"

    def _not(self, node: Any) -> str:
        return f"(!{self.text(node.a)})"

    def _bitwisenot(self, node: Any) -> str:
        return f"(~{self.text(node.a)})"

    def _select(self, node: Any) -> str:
        # Both values are computed, as Select says: mix is one instruction, where ?: would be a branch.
        text = self.text(node.condition)
        with self.branch():
            return f"mix({self.text(node.false_value)}, {self.text(node.true_value)}, {text})"

    def _lazy(self, condition: Any, true_value: Any, false_value: Any) -> str:
        text = self.text(condition)
        with self.branch():
            return f"({text} ? {self.text(true_value)} : {self.text(false_value)})"

    def _ramp(self, node: Any) -> str:
        base, stride = self.text(node.base), self.text(node.stride)
        dtype = walk.dtype(node)
        return f"{self.type_name(dtype)}({', '.join(f'{base} + {i} * {stride}' for i in range(dtype.lanes))})"

    def _broadcast(self, node: Any) -> str:
        return f"{self.type_name(walk.dtype(node))}({self.text(node.value)})"

    def _shuffle(self, node: Any) -> str:
        lanes = []
        for vector in node.vectors:
            text, width = self.text(vector), walk.dtype(vector).lanes
            lanes += [text] if width == 1 else [f"{text}.{_COMPONENTS[i]}" for i in range(width)]
        chosen = [lanes[int(i.value)] for i in node.indices]
        return chosen[0] if len(chosen) == 1 else f"{self.type_name(walk.dtype(node))}({', '.join(chosen)})"

    def _let(self, node: Any) -> str:
        # Put in its place rather than computed before: it may stand in the lazy branch of a conditional.
        self.names[node.var] = self.text(node.value)
        return self.text(node.body)

    def _tensorload(self, node: Any) -> str:
        return self.load(node.source, node.indices[0])

    def _call(self, node: Any) -> str:
        name, args = walk.operator(node), list(node.args)
        if name == "if_then_else":
            return self._lazy(*args)
        if name == "likely":
            return self.text(args[0])
        if name == "reinterpret":
            return self._reinterpret(walk.dtype(node), args[0])
        if name in ("call_pure_extern", "call_extern"):
            function, args = str(args[0].value), args[1:]
        else:
            function = name
        if function in glsl_helpers.NAMES:
            return self._helper(function, args)
        plain = function if function in _FUNCTIONS else function.removesuffix("f")
        if plain not in _FUNCTIONS:
            raise self.unsupported(f"the function {function or name}")
        return self._function(_FUNCTIONS[plain], walk.dtype(node), args)

    def _function(self, function: str, dtype: Dtype, args: list[Any]) -> str:
        texts = [self.text(a) for a in args]
        if dtype.kind == "float" and dtype.bits == 16 and self.has_half:
            wide = self.type_name(Dtype("float", 32, dtype.lanes))
            return f"{self.type_name(dtype)}({function}({', '.join(f'{wide}({t})' for t in texts)}))"
        return f"{function}({', '.join(texts)})"

    def _reinterpret(self, target: Dtype, value: Any) -> str:
        source, text = walk.dtype(value), self.text(value)
        if source.kind == target.kind and source.bits == target.bits:
            return text
        pair = (source.kind, source.bits, target.kind, target.bits)
        direct = {
            ("int", 32, "float", 32): "intBitsToFloat",
            ("uint", 32, "float", 32): "uintBitsToFloat",
            ("float", 32, "int", 32): "floatBitsToInt",
            ("float", 32, "uint", 32): "floatBitsToUint",
        }.get(pair)
        if direct is not None:
            return f"{direct}({text})"
        if source.bits == target.bits and {source.kind, target.kind} == {"int", "uint"}:
            return f"{self.type_name(target)}({text})"
        if source.lanes == 1 and target.lanes == 1 and source.bits == target.bits == 16:
            if target.kind == "float":
                return f"{self.type_name(target)}(unpackHalf2x16(uint({text}) & 0xffffu).x)"
            return f"{self.type_name(target)}(packHalf2x16(vec2(float({text}), 0.0)))"
        raise self.unsupported(f"reinterpreting {source.kind}{source.bits} as {target.kind}{target.bits}")

"""TIR device function to a GLSL compute shader: statements, launch and interface."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from cfmoe.compile.codegen import walk
from cfmoe.compile.codegen.glsl_expression import Expressions
from cfmoe.errors import CFMoEError

MAX_PUSH_CONSTANTS = 128  # bytes: what every Vulkan device has


@dataclass(frozen=True)
class Shader:
    """One shader and its interface: storage buffers at set 0 in order, then 32-bit push constants in order.

    `grid` are TIR expressions over `scalars`, `local` the workgroup's size, `writes` the numbers of the buffers that it writes.
    """

    name: str
    source: str
    local: tuple[int, int, int]
    grid: tuple[Any, Any, Any]
    buffers: int
    scalars: tuple[Any, ...]
    writes: tuple[int, ...]
    shared_bytes: int
    features: tuple[str, ...]  # of those allowed, what it uses
    launch: tuple[str, ...]  # TIR's tags of the launch's axes


def emit(function: tirx.PrimFunc, name: str, features: frozenset[str], shared_limit: int) -> Shader:
    """Writes `function`, whose parameters are typed pointers and integers and whose body launches its threads.

    `features` are names of targets.GPU_FEATURES; `shared_limit` is in bytes. Raises CFMoEError where GLSL has no form for it within these.
    """
    return _Writer(function, name, features, shared_limit).shader()


class _Writer:
    def __init__(self, function: tirx.PrimFunc, name: str, features: frozenset[str], shared_limit: int) -> None:
        self.name, self.shared_limit = name, shared_limit
        self.lines: list[str] = []
        self.shared: list[str] = []
        self.shared_bytes = 0
        self.depth = 1
        self.launch: dict[str, Any] = {}
        self.expressions = Expressions(name, features)
        for parameter in function.params:
            if walk.is_pointer(parameter):
                self.expressions.add_parameter(parameter)
        self.scalars = tuple(p for p in function.params if not walk.is_pointer(p))
        if 4 * len(self.scalars) > MAX_PUSH_CONSTANTS:
            raise CFMoEError(f"kernel {name} has {len(self.scalars)} scalars; push constants hold {MAX_PUSH_CONSTANTS // 4}")
        self.fields = [self.expressions.fresh(s.name) for s in self.scalars]
        for scalar, field in zip(self.scalars, self.fields, strict=True):
            self.expressions.names[scalar] = f"scalars.{field}"
        self._statement(function.body)

    def shader(self) -> Shader:
        local = tuple(walk.constant(self.launch.get(f"threadIdx.{axis}", 1)) for axis in "xyz")
        if None in local:
            raise CFMoEError(f"kernel {self.name}: the workgroup's size is not constant")
        x, y, z = (size or 1 for size in local)
        grid = tuple(self.launch.get(f"blockIdx.{axis}", 1) for axis in "xyz")
        head = ["#version 450", *self.expressions.extensions()]
        head.append(f"layout(local_size_x = {x}, local_size_y = {y}, local_size_z = {z}) in;")
        head += self.expressions.interface()
        if self.scalars:
            fields = " ".join(f"int {field};" for field in self.fields)
            head.append(f"layout(push_constant) uniform Scalars {{ {fields} }} scalars;")
        source = "\n".join([*head, *self.shared, *self.expressions.helpers(), "void main() {", *self.lines, "}", ""])
        parameters = self.expressions.parameters
        writes = tuple(p.binding for p in parameters if p.stored)
        features = self.expressions.used_features()
        interface = (len(parameters), self.scalars, writes)
        return Shader(self.name, source, (x, y, z), grid, *interface, self.shared_bytes, features, tuple(self.launch))

    def _line(self, text: str) -> None:
        self.lines.append("  " * self.depth + text)

    @contextmanager
    def _block(self, head: str) -> Iterator[None]:
        self._line(head + " {")
        self.depth += 1
        yield
        self.depth -= 1
        self._line("}")

    def _statement(self, node: Any) -> None:
        kind = type(node).__name__
        method = getattr(self, f"_{kind.lower()}", None)
        if method is None:
            raise CFMoEError(f"kernel {self.name}: GLSL has no form for the TIR statement {kind}")
        method(node)

    def _seqstmt(self, node: Any) -> None:
        for part in node.seq:
            self._statement(part)

    def _attrstmt(self, node: Any) -> None:
        if node.attr_key == "thread_extent":
            tag, variable = str(node.node.thread_tag), node.node.var
            if variable not in self.expressions.names:
                self.launch[tag] = node.value
                builtin = "gl_WorkGroupID" if tag.startswith("blockIdx") else "gl_LocalInvocationID"
                self._line(f"int {self.expressions.declare(variable)} = int({builtin}.{tag[-1]});")
        self._statement(node.body)

    def _declbuffer(self, node: Any) -> None:
        self.expressions.alias(node.buffer, node.data)
        self._body(node)

    def _allocbuffer(self, node: Any) -> None:
        buffer = node.buffer
        size = 1
        for extent in buffer.shape:
            count = walk.constant(extent)
            if count is None:
                raise CFMoEError(f"kernel {self.name}: {buffer.name} has no constant size")
            size *= count
        scope = walk.scope_of(buffer)
        line, element_bytes = self.expressions.add_array(buffer, size)
        if scope == "local":
            self._line(line)
        elif scope.startswith("shared"):
            self.shared.append(f"shared {line}")
            self.shared_bytes += size * element_bytes
            if self.shared_bytes > self.shared_limit:
                raise CFMoEError(
                    f"kernel {self.name} wants {self.shared_bytes} bytes of shared memory; its target allows {self.shared_limit}"
                )
        else:
            raise CFMoEError(f"kernel {self.name}: GLSL has no memory of scope {scope}")
        self._body(node)

    def _body(self, node: Any) -> None:
        if getattr(node, "body", None) is not None:
            self._statement(node.body)

    def _bind(self, node: Any) -> None:
        value = self.expressions.text(node.value)
        type_name = self.expressions.type_name(walk.dtype(node.value))
        self._line(f"{type_name} {self.expressions.declare(node.var)} = {value};")

    def _bufferstore(self, node: Any) -> None:
        if len(node.indices) != 1:
            raise CFMoEError(f"kernel {self.name}: {node.buffer.name} is not flat; run FlattenBuffer first")
        for line in self.expressions.store(node.buffer, node.indices[0], node.value):
            self._line(line)

    def _for(self, node: Any) -> None:
        first, extent = self.expressions.text(node.min), self.expressions.text(node.extent)
        name = self.expressions.declare(node.loop_var)
        end = extent if first == "0" else f"({first} + {extent})"
        with self._block(f"for (int {name} = {first}; {name} < {end}; ++{name})"):
            self._statement(node.body)

    def _while(self, node: Any) -> None:
        condition = self.expressions.text(node.condition)
        with self.expressions.branch(), self._block(f"while ({condition})"):
            self._statement(node.body)

    def _ifthenelse(self, node: Any) -> None:
        condition = self.expressions.text(node.condition)
        with self.expressions.branch():
            with self._block(f"if ({condition})"):
                self._statement(node.then_case)
            if node.else_case is not None:
                with self._block("else"):
                    self._statement(node.else_case)

    def _evaluate(self, node: Any) -> None:
        if walk.constant(node.value) is not None:
            return
        if walk.operator(node.value) == "tvm_storage_sync":
            self._line("barrier();")
        else:
            self._line(self.expressions.text(node.value) + ";")

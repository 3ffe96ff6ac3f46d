"""target.build.vulkan: what tvm.compile calls for the device functions of a Vulkan target.

The PyPI TVM has no Vulkan runtime, hence no module class that could launch them: the module that comes back holds text, GLSL for people and
the SPIR-V of every function for whoever brings a device (`spirv_of`).
"""

from __future__ import annotations

import base64
from typing import Any

import tvm
import tvm_ffi
from tvm.target import Target

from cfmoe.compile.codegen import glsl, spirv

_FUNCTION = "// Function: "
_BINARY = "// SPIR-V: "
_MIN_SHARED = 16384  # bytes of workgroup memory that every Vulkan device has
# TVM's names of target attributes.
_FEATURES = {"supports_float16": "float16", "supports_16bit_buffer": "storage16", "supports_integer_dot_product": "integer_dot"}


def build(mod: tvm.IRModule, target: Target) -> Any:
    """A source module of every device function in `mod`. Raises CFMoEError where one has no form in GLSL."""
    attributes = dict(target.attrs)
    features = frozenset(name for key, name in _FEATURES.items() if bool(attributes.get(key, False)))
    limit = int(attributes.get("max_shared_memory_per_block", _MIN_SHARED))
    parts = []
    for var, function in mod.functions_items():
        name = str(function.attrs["global_symbol"]) if "global_symbol" in function.attrs else str(var.name_hint)
        shader = glsl.emit(function, name, features, limit)
        code = spirv.assemble(name, shader.source)
        parts.append(f"{_FUNCTION}{name}\n{shader.source}{_BINARY}{base64.b64encode(code).decode()}\n")
    return tvm.get_global_func("runtime.SourceModuleCreate")("\n".join(parts), "glsl")


def spirv_of(source: str) -> dict[str, bytes]:
    """Function name to SPIR-V, out of the text of a module that `build` returned."""
    found, name = {}, ""
    for line in source.splitlines():
        if line.startswith(_FUNCTION):
            name = line.removeprefix(_FUNCTION)
        elif line.startswith(_BINARY):
            found[name] = base64.b64decode(line.removeprefix(_BINARY))
    return found


tvm_ffi.register_global_func("target.build.vulkan", build, override=True)

"""GLSL to validated SPIR-V, with the Khronos tools or the NDK's."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from cfmoe.errors import CFMoEError

_REMEDY = "install glslang-tools and spirv-tools (Debian, Ubuntu), or put the NDK's shader-tools on the PATH"
ENVIRONMENT = "vulkan1.1"


@cache
def _tool(*names: str) -> str:
    for name in names:
        found = shutil.which(name)
        if found is not None:
            return found
    raise CFMoEError(f"{' and '.join(names)} not found: shaders need {'one of them' if len(names) > 1 else 'it'}; {_REMEDY}")


def assemble(name: str, source: str) -> bytes:
    """SPIR-V of the compute shader `source` with entry point `name`: optimised, and valid for Vulkan 1.1.

    Raises CFMoEError where a tool is missing or refuses it.
    """
    with tempfile.TemporaryDirectory(prefix="cfmoe-") as scratch:
        text, raw, optimised = (Path(scratch) / f"shader.{suffix}" for suffix in ("comp", "raw.spv", "spv"))
        text.write_text(source)
        compiler = _tool("glslangValidator", "glslang", "glslc")
        if Path(compiler).name == "glslc":
            # glslc keeps the entry point's name, main: the plan says which one a kernel has.
            command = [compiler, f"--target-env={ENVIRONMENT}", "-fshader-stage=compute", str(text), "-o", str(raw)]
        else:
            command = [compiler, "-V", "--target-env", ENVIRONMENT, "-S", "comp", "-e", name, "--source-entrypoint", "main"]
            command += [str(text), "-o", str(raw)]
        _run(name, command)
        _run(name, [_tool("spirv-opt"), f"--target-env={ENVIRONMENT}", "-O", str(raw), "-o", str(optimised)])
        _run(name, [_tool("spirv-val"), "--target-env", ENVIRONMENT, str(optimised)])
        return optimised.read_bytes()


def entry_point(name: str) -> str:
    """What `assemble` calls the entry point."""
    return "main" if Path(_tool("glslangValidator", "glslang", "glslc")).name == "glslc" else name


def _run(name: str, command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        reason = " ".join((done.stdout + done.stderr).split())
        raise CFMoEError(f"{Path(command[0]).name} refuses the shader of kernel {name}: {reason}")

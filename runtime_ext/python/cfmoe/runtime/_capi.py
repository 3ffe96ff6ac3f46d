"""The C API of libcfmoe (cfmoe.h) as ctypes declarations."""

from __future__ import annotations

import ctypes
import functools
import importlib.resources
import importlib.util
import sys
from ctypes import (
    CDLL,
    CFUNCTYPE,
    POINTER,
    Structure,
    c_char_p,
    c_double,
    c_float,
    c_int,
    c_int32,
    c_size_t,
    c_uint8,
    c_uint16,
    c_uint32,
    c_uint64,
    c_void_p,
)
from pathlib import Path

from cfmoe.runtime.errors import Cancelled, CFMoEError, RuntimeFault

ABI_VERSION = 5
OK, INTERNAL, USER, CANCELLED = 0, 1, 2, 3
_ERROR_BYTES = 2048

TokenCallback = CFUNCTYPE(c_int, c_int32, c_void_p)


class EngineOptions(Structure):
    _fields_ = (
        ("struct_size", c_uint32),
        ("budget_bytes", c_uint64),
        ("expert_percent", c_double),
        ("context_size", c_uint32),
        ("threads", c_int32),
        ("io", c_char_p),
        ("policy", c_char_p),
        ("log_events", c_int32),
        ("record_trace", c_int32),
        ("record_scores", c_int32),
        ("device", c_char_p),
        ("prefill_device", c_char_p),
        ("decode_device", c_char_p),
    )


class Memory(Structure):
    _fields_ = (
        ("budget_bytes", c_uint64),
        ("smallest_budget_bytes", c_uint64),
        ("largest_budget_bytes", c_uint64),
        ("weights_bytes", c_uint64),
        ("kv_bytes", c_uint64),
        ("workspace_bytes", c_uint64),
        ("pool_bytes", c_uint64),
        ("arena_bytes", c_uint64),
        ("mapped_bytes", c_uint64),
        ("expert_slots", c_uint32),
        ("expert_total", c_uint32),
    )


class PhaseMetrics(Structure):
    _fields_ = (
        ("tokens", c_uint64),
        ("seconds", c_double),
        ("hits", c_uint64),
        ("misses", c_uint64),
        ("prefetched", c_uint64),
        ("bytes_read", c_uint64),
        ("stall_ms", c_double),
    )


class Metrics(Structure):
    _fields_ = (
        ("prefill", PhaseMetrics),
        ("decode", PhaseMetrics),
        ("first_32_hits", c_uint64),
        ("first_32_accesses", c_uint64),
    )


class ModelInfo(Structure):
    _fields_ = (
        ("vocab_size", c_uint32),
        ("context_size", c_uint32),
        ("num_layers", c_uint32),
        ("moe_layers", c_uint32),
        ("num_experts", c_uint32),
        ("top_k", c_uint32),
        ("prefill_chunk", c_uint32),
        ("expert_record_bytes", c_uint64),
    )


class AccessEvent(Structure):
    _fields_ = (
        ("decode", c_uint8),
        ("hit", c_uint8),
        ("layer", c_uint16),
        ("expert", c_uint32),
        ("position", c_uint64),
    )


class Sampling(Structure):
    _fields_ = (
        ("struct_size", c_uint32),
        ("temperature", c_float),
        ("top_k", c_int32),
        ("top_p", c_float),
        ("repetition_penalty", c_float),
        ("seed", c_uint64),
    )


class SimulatorOptions(Structure):
    _fields_ = (("struct_size", c_uint32), ("reference", c_int32), ("warm", c_int32), ("chunk_size", c_uint32))


class Simulation(Structure):
    _fields_ = (
        ("prefill_hits", c_uint64),
        ("prefill_misses", c_uint64),
        ("decode_hits", c_uint64),
        ("decode_misses", c_uint64),
        ("hand_over_loads", c_uint64),
    )


_FUNCTIONS: dict[str, tuple[object, list[object]]] = {
    "cfmoe_abi_version": (c_uint32, []),
    "cfmoe_version": (c_char_p, []),
    "cfmoe_engine_options_init": (None, [POINTER(EngineOptions)]),
    "cfmoe_sampling_init": (None, [POINTER(Sampling)]),
    "cfmoe_engine_open": (c_int, [c_char_p, POINTER(EngineOptions), POINTER(c_void_p), c_char_p, c_size_t]),
    "cfmoe_engine_close": (None, [c_void_p]),
    "cfmoe_engine_model": (None, [c_void_p, POINTER(ModelInfo)]),
    "cfmoe_engine_memory": (None, [c_void_p, POINTER(Memory)]),
    "cfmoe_engine_keep_warm": (c_int, [c_void_p, POINTER(c_uint32), c_size_t, c_char_p, c_size_t]),
    "cfmoe_engine_set_budget": (c_int, [c_void_p, c_uint64, c_double, c_char_p, c_size_t]),
    "cfmoe_engine_trim": (c_int, [c_void_p, c_uint64, c_char_p, c_size_t]),
    "cfmoe_engine_residents": (c_size_t, [c_void_p, POINTER(c_uint8), c_size_t]),
    "cfmoe_engine_io": (c_char_p, [c_void_p]),
    "cfmoe_engine_policy": (c_char_p, [c_void_p]),
    "cfmoe_engine_warning": (c_char_p, [c_void_p]),
    "cfmoe_engine_device": (c_char_p, [c_void_p, c_int]),
    "cfmoe_engine_device_name": (c_char_p, [c_void_p]),
    "cfmoe_devices": (c_int, [c_char_p, c_char_p, c_size_t, POINTER(c_size_t), c_char_p, c_size_t]),
    "cfmoe_session_create": (c_int, [c_void_p, POINTER(c_void_p), c_char_p, c_size_t]),
    "cfmoe_session_destroy": (None, [c_void_p]),
    "cfmoe_session_reset": (c_int, [c_void_p, c_char_p, c_size_t]),
    "cfmoe_session_rewind": (c_int, [c_void_p, c_uint32, c_char_p, c_size_t]),
    "cfmoe_session_position": (c_uint32, [c_void_p]),
    "cfmoe_session_generate": (
        c_int,
        [
            c_void_p,
            POINTER(c_int32),
            c_uint32,
            c_uint32,
            POINTER(Sampling),
            POINTER(c_int32),
            c_uint32,
            TokenCallback,
            c_void_p,
            POINTER(c_int32),
            POINTER(c_uint32),
            c_char_p,
            c_size_t,
        ],
    ),
    "cfmoe_session_feed": (c_int, [c_void_p, POINTER(c_int32), c_uint32, c_int, POINTER(c_float), c_char_p, c_size_t]),
    "cfmoe_session_cancel": (None, [c_void_p]),
    "cfmoe_session_metrics": (None, [c_void_p, POINTER(Metrics)]),
    "cfmoe_session_take_events": (c_size_t, [c_void_p, POINTER(AccessEvent), c_size_t]),
    "cfmoe_session_write_trace": (c_int, [c_void_p, c_char_p, c_char_p, c_size_t]),
    "cfmoe_tokenizer_open": (c_int, [c_char_p, POINTER(c_void_p), c_char_p, c_size_t]),
    "cfmoe_tokenizer_close": (None, [c_void_p]),
    "cfmoe_tokenizer_encode": (
        c_int,
        [c_void_p, c_char_p, c_size_t, POINTER(c_int32), c_size_t, POINTER(c_size_t), c_char_p, c_size_t],
    ),
    "cfmoe_tokenizer_encode_typed": (
        c_int,
        [
            *(c_void_p, c_char_p, c_size_t, POINTER(c_size_t), c_size_t),
            *(POINTER(c_int32), c_size_t, POINTER(c_size_t), c_char_p, c_size_t),
        ],
    ),
    "cfmoe_tokenizer_push": (c_int, [c_void_p, c_int32, c_char_p, c_size_t, POINTER(c_size_t), c_char_p, c_size_t]),
    "cfmoe_engine_policies": (c_char_p, []),
    "cfmoe_simulator_policies": (c_char_p, []),
    "cfmoe_default_policy": (c_char_p, []),
    "cfmoe_simulator_create": (c_int, [c_char_p, c_size_t, c_char_p, POINTER(SimulatorOptions), POINTER(c_void_p), c_char_p, c_size_t]),
    "cfmoe_simulator_destroy": (None, [c_void_p]),
    "cfmoe_simulator_run": (
        c_int,
        [c_void_p, c_char_p, c_uint64, c_uint32, POINTER(Simulation), POINTER(c_uint64), c_char_p, c_size_t],
    ),
}


def _load_tvm_ffi() -> None:
    """Loads libtvm_ffi, which libcfmoe then finds in the process wherever either is installed.

    Not by importing tvm_ffi: that imports torch where torch is installed, 200 MB that a run does not need.
    """
    spec = importlib.util.find_spec("tvm_ffi")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeFault("the package apache-tvm-ffi is missing: install cfmoe again")
    name = {"darwin": "libtvm_ffi.dylib", "win32": "tvm_ffi.dll"}.get(sys.platform, "libtvm_ffi.so")
    path = Path(spec.submodule_search_locations[0]) / "lib" / name
    if not path.exists():
        raise RuntimeFault(f"{path} is missing: install apache-tvm-ffi again")
    CDLL(str(path))


@functools.cache
def library() -> CDLL:
    """libcfmoe, loaded once. Raises RuntimeFault where it is missing or of another version."""
    _load_tvm_ffi()
    name = {"darwin": "libcfmoe.dylib", "win32": "cfmoe.dll"}.get(sys.platform, "libcfmoe.so")
    resource = importlib.resources.files("cfmoe.runtime").joinpath(name)
    with importlib.resources.as_file(resource) as path:
        if not path.exists():
            raise RuntimeFault(f"{name} is missing from the package cfmoe.runtime: install cfmoe again")
        lib = CDLL(str(path))
    for function, (result, arguments) in _FUNCTIONS.items():
        symbol = getattr(lib, function)
        symbol.restype = result
        symbol.argtypes = arguments
    if lib.cfmoe_abi_version() != ABI_VERSION:
        raise RuntimeFault(f"{name} has ABI version {lib.cfmoe_abi_version()}, this package needs {ABI_VERSION}: install cfmoe again")
    return lib


class ErrorText:
    """Where the library writes what went wrong: pass :attr:`arguments` last, then :meth:`check` the status."""

    def __init__(self) -> None:
        self._buffer = ctypes.create_string_buffer(_ERROR_BYTES)
        self.arguments = (self._buffer, _ERROR_BYTES)

    def check(self, status: int) -> None:
        """Raises the exception that ``status`` stands for, if any."""
        if status == OK:
            return
        message = self._buffer.value.decode("utf-8", "replace")
        if status == USER:
            raise CFMoEError(message)
        if status == CANCELLED:
            raise Cancelled(message)
        raise RuntimeFault(message)

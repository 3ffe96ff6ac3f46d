"""The runtime: runs an artifact inside a memory budget. Needs neither torch nor the compiler."""

from __future__ import annotations

from cfmoe.runtime._capi import library as load_library
from cfmoe.runtime.devices import Device, devices
from cfmoe.runtime.engine import Engine, Event, Generation, Memory, Metrics, ModelInfo, PhaseMetrics, Sampling, Session
from cfmoe.runtime.errors import Cancelled, CFMoEError, RuntimeFault
from cfmoe.runtime.simulator import Counts, Semantics, Simulation, Simulator, default_policy, engine_policies, simulator_policies
from cfmoe.runtime.size import format_size, parse_size
from cfmoe.runtime.tokenizer import Tokenizer

__all__ = [
    "CFMoEError",
    "Cancelled",
    "Counts",
    "Device",
    "Engine",
    "Event",
    "Generation",
    "Memory",
    "Metrics",
    "ModelInfo",
    "PhaseMetrics",
    "RuntimeFault",
    "Sampling",
    "Semantics",
    "Session",
    "Simulation",
    "Simulator",
    "Tokenizer",
    "default_policy",
    "devices",
    "engine_policies",
    "format_size",
    "load_library",
    "parse_size",
    "simulator_policies",
]

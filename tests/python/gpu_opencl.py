"""The first OpenCL device, for tests alone: the same interface as gpu_device.VulkanDevice, through ctypes."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

_READ_WRITE, _USE_HOST_PTR = 1, 8
_BUILD_LOG, _DEVICE_NAME = 0x1183, 0x102B
_ALL_DEVICES = 0xFFFFFFFF


class OpenClBuffer:
    """Memory that host and device share; `array` is the host's view, valid between kernels."""

    def __init__(self, device: OpenClDevice, array: np.ndarray) -> None:
        self.device = device
        self.size = max(64, -(-array.nbytes // 64) * 64)
        raw = np.zeros(self.size + 4096, np.uint8)
        start = -raw.ctypes.data % 4096
        self.memory = raw[start : start + self.size]
        self.array = self.memory[: array.nbytes].view(array.dtype).reshape(array.shape)
        self.array[...] = array
        self.handle = device.create("clCreateBuffer", device.context, _READ_WRITE | _USE_HOST_PTR, self.size, self.memory.ctypes.data)
        self.parts: dict[int, int] = {}

    def at(self, offset: int) -> int:
        """The buffer, or the part of it that starts at `offset`."""
        if offset == 0:
            return self.handle
        if offset not in self.parts:
            region = (ctypes.c_size_t * 2)(offset, self.size - offset)
            create = self.device.create
            self.parts[offset] = create("clCreateSubBuffer", self.handle, _READ_WRITE, 0x1220, ctypes.cast(region, ctypes.c_void_p).value)
        return self.parts[offset]


class OpenClDevice:
    def __init__(self) -> None:
        self.library = ctypes.CDLL("libOpenCL.so.1")
        platform, device = ctypes.c_void_p(), ctypes.c_void_p()
        self.check("clGetPlatformIDs", 1, ctypes.byref(platform), None)
        self.check("clGetDeviceIDs", platform, ctypes.c_ulong(_ALL_DEVICES), 1, ctypes.byref(device), None)
        self.device = device.value
        devices = (ctypes.c_void_p * 1)(self.device)
        self.context = self.create("clCreateContext", None, 1, devices, None, None)
        self.queue = self.create("clCreateCommandQueue", self.context, self.device, 0)
        name = ctypes.create_string_buffer(256)
        self.check("clGetDeviceInfo", ctypes.c_void_p(self.device), _DEVICE_NAME, ctypes.c_size_t(256), name, None)
        self.name = name.value.decode()
        self.programs: dict[bytes, int] = {}

    def _function(self, name: str) -> Any:
        return getattr(self.library, name)

    def check(self, name: str, *args: Any) -> None:
        status = self._function(name)(*args)
        assert status == 0, f"{name}: error {status}"

    def create(self, name: str, *args: Any) -> int:
        function = self._function(name)
        function.restype = ctypes.c_void_p
        status = ctypes.c_int()
        converted = [
            ctypes.c_void_p(a) if isinstance(a, int) and a > 1 << 20 else ctypes.c_ulong(a) if isinstance(a, int) else a for a in args
        ]
        handle = function(*converted, ctypes.byref(status))
        assert status.value == 0, f"{name}: error {status.value}"
        return handle

    def upload(self, array: np.ndarray) -> OpenClBuffer:
        return OpenClBuffer(self, np.ascontiguousarray(array))

    def _program(self, source: bytes) -> int:
        if source not in self.programs:
            text = ctypes.c_char_p(source)
            program = self.create("clCreateProgramWithSource", self.context, 1, ctypes.byref(text), None)
            device = (ctypes.c_void_p * 1)(self.device)
            status = self.library.clBuildProgram(ctypes.c_void_p(program), 1, device, None, None, None)
            if status:
                log = ctypes.create_string_buffer(1 << 16)
                size = ctypes.c_size_t(1 << 16)
                self.library.clGetProgramBuildInfo(ctypes.c_void_p(program), ctypes.c_void_p(self.device), _BUILD_LOG, size, log, None)
                raise AssertionError(log.value.decode())
            self.programs[source] = program
        return self.programs[source]

    def kernel(self, code: bytes, entry: str, buffers: int, scalars: int, local: Sequence[int]) -> OpenClKernel:
        return OpenClKernel(self, self.create("clCreateKernel", self._program(code), ctypes.c_char_p(entry.encode())), local)


class OpenClKernel:
    def __init__(self, owner: OpenClDevice, handle: int, local: Sequence[int]) -> None:
        self.owner, self.handle, self.local = owner, ctypes.c_void_p(handle), local

    def __call__(self, bindings: Sequence[tuple[OpenClBuffer, int]], scalars: Sequence[int], grid: Sequence[int]) -> None:
        """Runs the kernel and waits for it."""
        values: list[Any] = [*(ctypes.c_void_p(b.at(offset)) for b, offset in bindings), *(ctypes.c_int(s) for s in scalars)]
        for i, value in enumerate(values):
            self.owner.check("clSetKernelArg", self.handle, i, ctypes.c_size_t(ctypes.sizeof(value)), ctypes.byref(value))
        size = ctypes.c_size_t * 3
        total, local = size(*(g * n for g, n in zip(grid, self.local, strict=True))), size(*self.local)
        queue = ctypes.c_void_p(self.owner.queue)
        self.owner.check("clEnqueueNDRangeKernel", queue, self.handle, 3, None, total, local, 0, None, None)
        self.owner.check("clFinish", queue)

"""The CUDA driver through `ctypes`: cubins loaded into the context that torch uses, and kernels launched from them."""

import ctypes
import struct
from collections.abc import Sequence
from ctypes import POINTER, Structure, byref, c_char_p, c_int, c_size_t, c_uint, c_void_p
from functools import cache
from pathlib import Path
from threading import Lock

import torch

from specdec_kernels.compiling import BuildError

_INVALID_CONTEXT = 201
# The launch may begin while the kernel before it on the stream still runs (griddepcontrol in PTX).
_PROGRAMMATIC_STREAM_SERIALIZATION = 6
# Compute capability from which it can say so.
_WAITING = (9, 0)
# All blocks of the launch run at the same time, or none does.
_COOPERATIVE = 2
# The attribute of a function: the most bytes of dynamic shared memory that a launch may ask for.
_MOST_SHARED = 8
_PARAMETERS, _PARAMETER_BYTES, _END = 1, 2, 0


class _Attribute(Structure):
    _fields_ = (("id", c_int), ("padding", c_int), ("value", c_int * 16))


class _Config(Structure):
    _fields_ = (
        ("grid_x", c_uint),
        ("grid_y", c_uint),
        ("grid_z", c_uint),
        ("block_x", c_uint),
        ("block_y", c_uint),
        ("block_z", c_uint),
        ("shared", c_uint),
        ("stream", c_void_p),
        ("attributes", POINTER(_Attribute)),
        ("count", c_uint),
    )


class Module:
    """A cubin loaded for one device. Raises `BuildError` when the driver refuses it."""

    def __init__(self, cubin: Path, index: int) -> None:
        self.driver, self.index = _driver(), index
        self.context, self._handle = _context(index), c_void_p()
        driver = self.driver
        _check(driver, driver.cuCtxPushCurrent_v2(self.context))
        try:
            _check(driver, driver.cuModuleLoadData(byref(self._handle), cubin.read_bytes()))
        finally:
            driver.cuCtxPopCurrent_v2(byref(c_void_p()))

    def function(self, name: str) -> c_void_p:
        """The kernel of that name. Raises `BuildError` when there is none."""
        found = c_void_p()
        _check(self.driver, self.driver.cuModuleGetFunction(byref(found), self._handle, name.encode()))
        return found

    def allow_shared(self, name: str, most: int) -> None:
        """Let launches of a kernel ask for up to `most` bytes of dynamic shared memory."""
        _check(self.driver, self.driver.cuFuncSetAttribute(self.function(name), _MOST_SHARED, most))


class Kernel:
    """A kernel of a module, launched by calling it.

    `parameters`: what it takes, as `struct` writes it in native alignment (`P` a pointer, `q` an int64_t, `f` a float),
    which is how the driver reads them. `threads`: of a block. `early`: a launch may begin while the kernel before it
    still runs, from compute capability 9.0 on; the kernel itself says when it needs what that one wrote.
    `cooperative`: all blocks run at the same time; `parameters` are then those of one structure. `most_shared`: bytes
    of dynamic shared memory that a launch may ask for.

    A launch allocates nothing on the device and waits for nothing, so it can be captured into a graph.
    """

    def __init__(
        self,
        module: Module,
        name: str,
        parameters: str,
        threads: int,
        *,
        early: bool = False,
        cooperative: bool = False,
        most_shared: int = 0,
    ) -> None:
        self.name, self._module = name, module
        self._function = module.function(name)
        if most_shared:
            module.allow_shared(name, most_shared)
        self._launch = module.driver.cuLaunchKernelEx
        # A launch fills in what is made here once; another thread waits for it to be read.
        self._lock = Lock()
        self._layout = struct.Struct(f"@{parameters}")
        self._values = ctypes.create_string_buffer(self._layout.size)
        self._size = c_size_t(self._layout.size)
        at = ctypes.addressof(self._values)
        # All parameters as one piece of memory, which cooperative launches do not take.
        self._extra = (c_void_p * 5)(_PARAMETERS, at, _PARAMETER_BYTES, ctypes.addressof(self._size), _END)
        self._passed = ((c_void_p * 1)(at), None) if cooperative else (None, self._extra)
        early = early and torch.cuda.get_device_capability(module.index) >= _WAITING
        ids = [_PROGRAMMATIC_STREAM_SERIALIZATION] * early + [_COOPERATIVE] * cooperative
        self._attributes = (_Attribute * 2)(*(_Attribute(id=id, value=(c_int * 16)(1)) for id in ids))
        self._config = _Config(
            block_x=threads, block_y=1, block_z=1, grid_z=1, attributes=self._attributes, count=len(ids)
        )
        self._config_at = byref(self._config)

    def __call__(self, grid: tuple[int, int], *arguments: int | float, shared: int = 0) -> None:
        """Launch on the current stream of the module's device; `shared`: bytes of dynamic shared memory.

        Raises `RuntimeError` when the driver refuses.
        """
        index = self._module.index
        stream = torch.cuda.current_stream(index).cuda_stream
        if index == torch.cuda.current_device():
            self._start(grid, shared, stream, arguments)
        else:
            with torch.cuda.device(index):
                self._start(grid, shared, stream, arguments)

    def _start(self, grid: tuple[int, int], shared: int, stream: int, arguments: Sequence[int | float]) -> None:
        with self._lock:
            self._layout.pack_into(self._values, 0, *arguments)
            config = self._config
            config.grid_x, config.grid_y = grid
            config.shared, config.stream = shared, stream
            status = self._launch(self._config_at, self._function, *self._passed)
            if status == _INVALID_CONTEXT:
                # A thread in which no call of torch has reached the device yet.
                self._module.driver.cuCtxSetCurrent(self._module.context)
                status = self._launch(self._config_at, self._function, *self._passed)
        if status:
            raise RuntimeError(f"{self.name}: the launch failed ({_describe(self._module.driver, status)})")


@cache
def _driver() -> ctypes.CDLL:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise BuildError("needs the NVIDIA driver, and libcuda.so.1 is not here") from error
    driver.cuGetErrorString.argtypes = (c_int, POINTER(c_char_p))
    driver.cuModuleLoadData.argtypes = (POINTER(c_void_p), c_char_p)
    driver.cuModuleGetFunction.argtypes = (POINTER(c_void_p), c_void_p, c_char_p)
    driver.cuCtxPushCurrent_v2.argtypes = (c_void_p,)
    driver.cuCtxSetCurrent.argtypes = (c_void_p,)
    driver.cuFuncSetAttribute.argtypes = (c_void_p, c_int, c_int)
    driver.cuLaunchKernelEx.argtypes = (POINTER(_Config), c_void_p, c_void_p, c_void_p)
    _check(driver, driver.cuInit(0))
    return driver


@cache
def _context(index: int) -> c_void_p:
    """The primary context of a device, which the runtime, and so torch, uses; it lives as long as the process."""
    driver, device, context = _driver(), c_int(), c_void_p()
    _check(driver, driver.cuDeviceGet(byref(device), index))
    _check(driver, driver.cuDevicePrimaryCtxRetain(byref(context), device))
    return context


def _check(driver: ctypes.CDLL, status: int) -> None:
    if status:
        raise BuildError(f"was compiled but cannot run ({_describe(driver, status)})")


def _describe(driver: ctypes.CDLL, status: int) -> str:
    message = c_char_p()
    driver.cuGetErrorString(status, byref(message))
    return message.value.decode() if message.value else f"error {status}"

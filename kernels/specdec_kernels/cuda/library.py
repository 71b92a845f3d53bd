"""The compiled CUDA sources as Python sees them: whether they can run, their entry points, and launch errors.

Each `{source}.cu` has one entry point, `extern "C" int specdec_{source}(...)`, which launches on the stream it is
given (its last argument), allocates nothing, waits for nothing, and returns a `cudaError_t`. So a launch can be
captured into a graph, once the library has been loaded by a call outside the capture.
"""

import ctypes
from collections.abc import Callable
from ctypes import c_void_p
from functools import cache
from typing import Any

import torch

from specdec_kernels.cuda.build import BuildError, library_path

Launch = Callable[..., None]


def available(source: str, device: torch.device) -> str | None:
    """`None` when `{source}.cu` runs on `device`, else the reason why not; compiles it on first use."""
    if torch.version.cuda is None:
        return "needs a torch built for CUDA"
    if device.type != "cuda":
        return f"runs on NVIDIA GPUs, not on {device.type}"
    if not torch.cuda.is_available():
        return "needs a GPU, and torch sees none"
    return _open(source, _architecture(device))[1]


@cache
def load(source: str, argument_types: tuple[Any, ...], device: torch.device) -> Launch:
    """The function that launches `specdec_{source}` on the current stream of `device`, the stream left out.

    It raises `RuntimeError` when the launch is refused. Raises `BuildError` where `available` has a reason.
    """
    handle, reason = _open(source, _architecture(device))
    if handle is None:
        raise BuildError(f"{source}: cuda {reason}")
    entry = getattr(handle, f"specdec_{source}")
    entry.argtypes = (*argument_types, c_void_p)
    entry.restype = ctypes.c_int

    def launch(*arguments: Any) -> None:
        stream = torch.cuda.current_stream(device).cuda_stream
        if device.index in (None, torch.cuda.current_device()):
            status = entry(*arguments, stream)
        else:
            with torch.cuda.device(device):
                status = entry(*arguments, stream)
        if status:
            raise RuntimeError(f"{source}: the launch failed ({_describe(handle, status)})")

    return launch


@cache
def _architecture(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@cache
def _open(source: str, architecture: str) -> tuple[ctypes.CDLL | None, str | None]:
    try:
        handle = ctypes.CDLL(str(library_path(source, architecture)))
    except BuildError as error:
        return None, str(error)
    except OSError as error:
        return None, f"was compiled but cannot be loaded ({str(error).splitlines()[0]})"
    status = handle.specdec_ready()
    return (None, f"was compiled but cannot run ({_describe(handle, status)})") if status else (handle, None)


def _describe(handle: ctypes.CDLL, status: int) -> str:
    handle.specdec_error.argtypes, handle.specdec_error.restype = (ctypes.c_int,), ctypes.c_char_p
    message: bytes = handle.specdec_error(status)
    return message.decode()

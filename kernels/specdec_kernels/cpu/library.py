"""The compiled kernels as Python sees them: C structures, entry points, and whether they can run at all."""

import ctypes
import platform
from collections.abc import Callable
from ctypes import POINTER, c_char_p, c_float, c_int32, c_int64, c_void_p
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from specdec_kernels.cpu.build import BuildError, library_path

# Fastest first; which of them exist depends on the machine the library was compiled on.
INSTRUCTION_SETS = ("avx512vnni", "avx512", "avx2", "neon", "portable")


class Matrix(ctypes.Structure):
    _fields_ = (
        ("format", c_int32),
        ("out", c_int64),
        ("in_", c_int64),
        ("columns", c_int64),
        ("data", c_void_p),
        ("scales", c_void_p),
        ("bias", c_void_p),
    )


class Layer(ctypes.Structure):
    _fields_ = (
        ("attention_norm", c_void_p),
        ("feed_norm", c_void_p),
        ("head_norm", c_void_p),
        ("qkv", Matrix),
        ("out", Matrix),
        ("gate", Matrix),
        ("up", Matrix),
        ("down", Matrix),
    )


class Stack(ctypes.Structure):
    _fields_ = (
        ("hidden", c_int64),
        ("inner", c_int64),
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("head_size", c_int64),
        ("vocab", c_int64),
        ("norm_eps", c_float),
        ("num_layers", c_int32),
        ("layers", POINTER(Layer)),
        ("final_norm", c_void_p),
        ("angles", c_void_p),
        ("embedding", c_void_p),
        ("embedding_format", c_int32),
        ("head", Matrix),
    )


class Call(ctypes.Structure):
    _fields_ = (
        ("slots", c_void_p),
        ("rows", c_int64),
        ("nodes", c_int64),
        ("capacity", c_int64),
        ("extent", c_int64),
        ("tokens", c_void_p),
        ("embedded", c_void_p),
        ("positions", c_void_p),
        ("slot_index", c_void_p),
        ("length", c_void_p),
        ("mask", c_void_p),
        ("mask_start", c_void_p),
        ("mask_width", c_int64),
        ("states", c_void_p),
        ("logits", c_void_p),
        ("best", c_void_p),
        ("best_value", c_void_p),
        ("num_layers", c_int32),
        ("threads", c_int32),
        ("spent", c_void_p),
    )


# What a thread does in a forward, as the kernels count it. `prepare`: norms and the rounding of inputs; `feed`: gate,
# up and what joins them; `wait`: for the other threads.
WORKS = ("start", "prepare", "qkv", "rotate", "attend", "out", "feed", "down", "head", "wait")


class Library(NamedTuple):
    """`linear` and `stack` are the C entry points; their first argument is the name of an instruction set.
    `instruction_sets`: those that this machine runs, fastest first."""

    linear: Callable[..., int]
    stack: Callable[..., int]
    instruction_sets: tuple[str, ...]


def available() -> str | None:
    """`None` when the kernels can run here, else the reason why not, as the end of a sentence about them."""
    return _open()[1]


def refuse(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot compute with tensors of `dtype` on `device`, or `None`: an entry for `dispatch`, for the
    operations `linear` and `decoder_stack` alike. `dtype` is that of inputs and outputs; weights have a format.
    """
    if device.type != "cpu":
        return f"runs on the CPU, not on {device.type}"
    if dtype != torch.float32:
        return f"computes in float32, not in {str(dtype).removeprefix('torch.')}"
    return available()


def load() -> Library:
    """The kernels, compiled first if need be; raises `BuildError` where `available` has a reason."""
    library, reason = _open()
    if library is None:
        raise BuildError(f"the CPU implementation {reason}")
    return library


@cache
def _open() -> tuple[Library | None, str | None]:
    try:
        handle = ctypes.CDLL(str(library_path()))
    except BuildError as error:
        return None, str(error)
    except OSError as error:
        return None, f"was compiled but cannot be loaded ({str(error).splitlines()[0]})"
    handle.specdec_size_of.restype = c_int64
    sizes = [handle.specdec_size_of(c_int32(which)) for which in range(4)]
    if sizes != [ctypes.sizeof(kind) for kind in (Matrix, Layer, Stack, Call)]:
        return None, f"lays out its structures differently on {platform.machine()}"
    handle.specdec_runs.argtypes = (c_char_p,)
    names = tuple(name for name in INSTRUCTION_SETS if handle.specdec_runs(name.encode()))
    linear, stack = handle.specdec_linear, handle.specdec_stack
    linear.argtypes = (c_char_p, POINTER(Matrix), c_void_p, c_int64, c_void_p, c_int32)
    stack.argtypes = (c_char_p, POINTER(Stack), POINTER(Call))
    return Library(linear, stack, names), None


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def check_tensor(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...] | None = None) -> None:
    """Raise `ValueError` for a tensor whose memory is not what the kernels read: they see a bare address."""
    found: Any = None
    if tensor.device.type != "cpu":
        found, wanted = tensor.device.type, "cpu"
    elif tensor.dtype != dtype:
        found, wanted = tensor.dtype, str(dtype)
    elif shape is not None and tuple(tensor.shape) != shape:
        found, wanted = list(tensor.shape), str(list(shape))
    elif not tensor.is_contiguous():
        found, wanted = f"strides {tensor.stride()}", "contiguous memory"
    if found is not None:
        raise ValueError(f"{name} is {found}, the CPU kernels need {wanted}")


def check_status(status: int) -> None:
    if status == 1:
        raise IndexError("a token id is not in the vocabulary")
    if status == 2:
        raise IndexError("a slot is outside the cache, or rows reach past `extent`")
    if status:
        raise MemoryError("the CPU kernels could not allocate their workspace")

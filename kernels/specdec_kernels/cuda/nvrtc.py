"""NVRTC, CUDA's compiler as a library: found where toolkits and wheels put it, called through `ctypes`."""

import ctypes
import os
from collections.abc import Iterable, Iterator, Sequence
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_void_p
from ctypes.util import find_library
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import NamedTuple

from specdec_kernels.compiling import BuildError

# Of programs compiled at the same time, NVRTC 13.0 returned the assembler's report for some alone.
_one_at_a_time = Lock()

# The headers that the sources include.
_HEADERS = ("cuda_fp16.h", "cuda_bf16.h")


class Nvrtc(NamedTuple):
    """The loaded library, its version, where it lies, and a folder with the headers of CUDA's 16-bit types."""

    library: ctypes.CDLL
    version: str
    path: str
    headers: Path


def find_nvrtc() -> Nvrtc:
    """NVRTC: what the environment's `NVRTC` names, in the toolkit at `CUDA_HOME`, in NVIDIA's wheels, or where the
    loader looks. Raises `BuildError` when it or its headers are not here."""
    named = os.environ.get("NVRTC")
    if named:
        return _open(named)
    candidates = list(_libraries())
    if not candidates:
        raise BuildError("needs NVRTC, which is not here; install nvidia-cuda-nvrtc or set NVRTC")
    return _open(candidates[0])


def compile_cubin(nvrtc: Nvrtc, source: Path, architecture: str, options: Sequence[str], out: Path) -> str:
    """Compile `source` to the cubin `out` for an architecture such as `sm_90`, and return what the compiler said.

    Raises `BuildError` with its first error.
    """
    words = [*options, f"--gpu-architecture={architecture}", f"-I{source.parent}", f"-I{nvrtc.headers}"]
    library, program, size = nvrtc.library, c_void_p(), c_size_t()
    text, name = source.read_bytes(), source.name.encode()
    _check(nvrtc, library.nvrtcCreateProgram(byref(program), text, name, 0, None, None))
    try:
        arguments = (c_char_p * len(words))(*(word.encode() for word in words))
        with _one_at_a_time:
            status = library.nvrtcCompileProgram(program, len(words), arguments)
        _check(nvrtc, library.nvrtcGetProgramLogSize(program, byref(size)))
        log = ctypes.create_string_buffer(size.value)
        _check(nvrtc, library.nvrtcGetProgramLog(program, log))
        said = log.value.decode(errors="replace")
        if status:
            raise BuildError(_summary(said) or f"does not compile with NVRTC ({_describe(nvrtc, status)})")
        _check(nvrtc, library.nvrtcGetCUBINSize(program, byref(size)))
        cubin = ctypes.create_string_buffer(size.value)
        _check(nvrtc, library.nvrtcGetCUBIN(program, cubin))
    finally:
        library.nvrtcDestroyProgram(byref(program))
    out.write_bytes(cubin.raw)
    return said


def _libraries() -> Iterator[str]:
    for folder in (*_toolkits("lib64"), *_wheels("lib")):
        # The newest of one folder; the builtins lie beside it under another name.
        yield from sorted(map(str, folder.glob("libnvrtc.so*")), reverse=True)[:1]
    found = find_library("nvrtc")
    if found:
        yield found


def _headers(library: str) -> Path:
    beside = Path(library).resolve().parent.parent / "include"
    triton = find_spec("triton")
    bundled = (Path(place, "backends", "nvidia", "include") for place in _places(triton))
    folders = (beside, *_toolkits("include"), *_wheels("include"), *bundled)
    for folder in folders:
        if all((folder / header).is_file() for header in _HEADERS):
            return folder
    raise BuildError("has NVRTC but not cuda_fp16.h; install nvidia-cuda-runtime, triton or the CUDA toolkit")


def _toolkits(folder: str) -> Iterator[Path]:
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if home:
            yield Path(home, folder)


def _wheels(folder: str) -> Iterator[Path]:
    """The folders of NVIDIA's wheels: `nvidia/cu13/lib`, or `nvidia/cuda_nvrtc/lib` before CUDA 13."""
    for place in _places(find_spec("nvidia")):
        yield from sorted(Path(place).glob(f"*/{folder}"))


def _places(package: object) -> Iterable[str]:
    return getattr(package, "submodule_search_locations", None) or ()


@cache
def _open(path: str) -> Nvrtc:
    try:
        library = ctypes.CDLL(path)
    except OSError as error:
        raise BuildError(f"cannot load NVRTC ({str(error).splitlines()[0]})") from error
    library.nvrtcCreateProgram.argtypes = (POINTER(c_void_p), c_char_p, c_char_p, c_int, c_void_p, c_void_p)
    library.nvrtcCompileProgram.argtypes = (c_void_p, c_int, POINTER(c_char_p))
    for name in ("nvrtcGetProgramLogSize", "nvrtcGetCUBINSize"):
        getattr(library, name).argtypes = (c_void_p, POINTER(c_size_t))
    for name in ("nvrtcGetProgramLog", "nvrtcGetCUBIN"):
        getattr(library, name).argtypes = (c_void_p, c_char_p)
    library.nvrtcGetErrorString.restype = c_char_p
    major, minor = c_int(), c_int()
    library.nvrtcVersion(byref(major), byref(minor))
    return Nvrtc(library, f"{major.value}.{minor.value}", path, _headers(path))


def _check(nvrtc: Nvrtc, status: int) -> None:
    if status:
        raise BuildError(f"does not compile with NVRTC ({_describe(nvrtc, status)})")


def _describe(nvrtc: Nvrtc, status: int) -> str:
    message: bytes = nvrtc.library.nvrtcGetErrorString(status)
    return message.decode()


def _summary(log: str) -> str | None:
    line = next((line.strip() for line in log.splitlines() if "error" in line), None)
    return line and f"does not compile with NVRTC ({line[:200]})"

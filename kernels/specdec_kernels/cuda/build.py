"""Compiles the CUDA C++ sources to cubins, one for each architecture, with nvcc or NVRTC, into the cache folder."""

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

from specdec_kernels.compiling import BuildError, build_once, compiler_version, run
from specdec_kernels.cuda.nvrtc import compile_cubin, find_nvrtc

__all__ = [
    "COMPILER",
    "SOURCE",
    "BuildError",
    "Compiler",
    "KernelReport",
    "architecture_of",
    "compile_all",
    "cubin_path",
    "find_compiler",
    "sources",
]

SOURCE = Path(__file__).parent

# The environment variable that names one of `_FINDERS`; unset or `auto`, the first that is here.
COMPILER = "SPECDEC_CUDA_COMPILER"

# No --use_fast_math: the CUDA versions must agree with definitions that were not compiled with it. What the assembler
# reports changes no code.
_NVCC_FLAGS = ("-std=c++17", "-O3", "-cubin", "-Xptxas", "-v")
_NVRTC_FLAGS = ("--std=c++17", "--ptxas-options=-v")


class Compiler(NamedTuple):
    """What makes cubins: `compile(source, architecture, cubin)` writes one and returns what was said of it, or raises
    `BuildError`. `key` is what a cubin of it depends on besides the sources."""

    name: str
    version: str
    path: str
    key: tuple[str, ...]
    compile: Callable[[Path, str, Path], str]


class KernelReport(NamedTuple):
    """What the assembler said of one kernel: registers per thread, bytes spilled, bytes of static shared memory."""

    source: str
    architecture: str
    kernel: str
    registers: int
    spill_stores: int
    spill_loads: int
    shared: int


def sources() -> tuple[str, ...]:
    """The names that `cubin_path` takes."""
    return tuple(sorted(path.stem for path in SOURCE.glob("*.cu")))


def architecture_of(major: int, minor: int) -> str:
    """The architecture to compile for, by compute capability; from Hopper on with what only that one has (`sm_90a`)."""
    return f"sm_{major}{minor}{'a' * (major >= 9)}"


def cubin_path(source: str, architecture: str) -> Path:
    """The cubin of `{source}.cu` for an architecture such as `sm_90`, compiled now if it is not there yet (see
    `compiling.build_once`); raises `BuildError` with the reason if it cannot be."""
    compiler = find_compiler()

    def build(folder: Path) -> Path:
        compiler.compile(SOURCE / f"{source}.cu", architecture, folder / "cubin")
        return folder / "cubin"

    return build_once(f"{source}-{architecture}", (architecture, *compiler.key), _read(source), build, suffix=".cubin")


def find_compiler(name: str | None = None) -> Compiler:
    """The compiler called `name`, `nvcc` or `nvrtc`; by default what `SPECDEC_CUDA_COMPILER` says, else the first of
    the two that is here. Raises `BuildError` when there is none."""
    name = name or os.environ.get(COMPILER) or "auto"
    if name in _FINDERS:
        return _FINDERS[name]()
    if name != "auto":
        raise BuildError(f"knows no compiler {name!r}; set {COMPILER} to nvcc, nvrtc or auto")
    try:
        return _find_nvcc()
    except BuildError as no_nvcc:
        try:
            return _find_nvrtc()
        except BuildError as no_nvrtc:
            raise BuildError(f"{no_nvcc}; or {no_nvrtc}") from no_nvrtc


def compile_all(
    architectures: Sequence[str] = ("sm_80", "sm_90a"), compiler: Compiler | None = None
) -> tuple[KernelReport, ...]:
    """Compile every source for every architecture, needing no GPU and keeping nothing, and report each kernel.

    Raises `BuildError` with the compiler's first error.
    """
    compiler = compiler or find_compiler()
    cases = [(source, architecture) for source in sources() for architecture in architectures]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:

        def compile(case: tuple[str, str]) -> str:
            source, architecture = case
            return compiler.compile(SOURCE / f"{source}.cu", architecture, Path(folder, f"{source}-{architecture}"))

        said = list(pool.map(compile, cases))
    return tuple(report for case, text in zip(cases, said, strict=True) for report in _parse(*case, text))


def _find_nvcc() -> Compiler:
    """nvcc: the environment's `NVCC`, in the toolkit at `CUDA_HOME`, on `PATH`, or where toolkits are put."""
    named = os.environ.get("NVCC")
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    candidates = [named] if named else [*(str(Path(home, "bin", "nvcc")) for home in homes if home), "nvcc"]
    if not named:
        candidates.append("/usr/local/cuda/bin/nvcc")
    path = next((path for path in map(shutil.which, candidates) if path), None)
    if path is None:
        wanted = named or "nvcc"
        raise BuildError(f"needs {wanted}, which is not here; install the CUDA toolkit or set NVCC")
    said = compiler_version(path)
    release = re.search(r"\bV?(\d+\.\d+[.\d]*)", said)
    version = release[1] if release else "of unknown version"
    return Compiler("nvcc", version, path, ("nvcc", said, repr(_NVCC_FLAGS)), partial(_run_nvcc, path))


def _run_nvcc(path: str, source: Path, architecture: str, cubin: Path) -> str:
    number = architecture.removeprefix("sm_")
    target = f"arch=compute_{number},code=sm_{number}"
    return run([path, *_NVCC_FLAGS, "-gencode", target, str(source), "-o", str(cubin)])


def _find_nvrtc() -> Compiler:
    nvrtc = find_nvrtc()

    def compile(source: Path, architecture: str, cubin: Path) -> str:
        return compile_cubin(nvrtc, source, architecture, _NVRTC_FLAGS, cubin)

    key = ("nvrtc", nvrtc.version, str(nvrtc.headers), repr(_NVRTC_FLAGS))
    return Compiler("nvrtc", nvrtc.version, nvrtc.path, key, compile)


_FINDERS: dict[str, Callable[[], Compiler]] = {"nvcc": _find_nvcc, "nvrtc": _find_nvrtc}


def _read(source: str) -> Iterable[Path]:
    # A header that changes recompiles everything: there are few, and a stale cubin would be worse.
    return [SOURCE / f"{source}.cu", *SOURCE.glob("*.cuh")]


def _parse(source: str, architecture: str, text: str) -> Iterable[KernelReport]:
    for part in text.split("Compiling entry function '")[1:]:

        def number(pattern: str, part: str = part) -> int:
            found = re.search(pattern, part)
            return int(found[1]) if found else 0

        yield KernelReport(
            source,
            architecture,
            part.split("'", 1)[0],
            number(r"Used (\d+) registers"),
            number(r"(\d+) bytes spill stores"),
            number(r"(\d+) bytes spill loads"),
            number(r"(\d+) bytes smem"),
        )

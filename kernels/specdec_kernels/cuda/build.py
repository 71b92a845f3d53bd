"""Compiles the CUDA C++ sources with nvcc, each for one architecture at a time, into specdec's cache folder."""

import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from specdec_kernels.compiling import BuildError, build_once, compiler_version, run, run_all

__all__ = ["SOURCE", "BuildError", "KernelReport", "compile_all", "find_compiler", "library_path", "sources"]

SOURCE = Path(__file__).parent

# No --use_fast_math: the CUDA versions must agree with definitions that were not compiled with it. The runtime is
# linked in, so a library depends on the driver alone and shares the context that torch made.
_FLAGS = ("-std=c++17", "-O3", "-Xcompiler", "-fPIC", "-cudart", "static", "-shared")


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
    """The names that `library_path` takes."""
    return tuple(sorted(path.stem for path in SOURCE.glob("*.cu")))


def library_path(source: str, architecture: str) -> Path:
    """The shared library of `{source}.cu` for an architecture such as `sm_90`, compiled now if it is not there yet
    (see `compiling.build_once`); raises `BuildError` with the reason if it cannot be."""
    compiler = find_compiler()
    key = (compiler_version(compiler), platform.machine(), architecture, repr(_FLAGS))
    name = f"{source}-{architecture}"
    return build_once(name, key, _read(source), lambda folder: _link(compiler, source, architecture, folder))


def find_compiler() -> str:
    """The path of nvcc: the environment's `NVCC`, the toolkit at `CUDA_HOME`, `PATH`, or where toolkits are put."""
    named = os.environ.get("NVCC")
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    candidates = [named] if named else [*(str(Path(home, "bin", "nvcc")) for home in homes if home), "nvcc"]
    if not named:
        candidates.append("/usr/local/cuda/bin/nvcc")
    found = next((path for path in map(shutil.which, candidates) if path), None)
    if found is None:
        wanted = named or "nvcc"
        raise BuildError(f"needs {wanted}, which is not here; install the CUDA toolkit or set NVCC")
    return found


def compile_all(architectures: Sequence[str] = ("sm_80", "sm_90")) -> tuple[KernelReport, ...]:
    """Compile every source for every architecture, needing no GPU and keeping nothing, and report each kernel.

    Raises `BuildError` with the compiler's first error.
    """
    compiler = find_compiler()
    cases = [(source, architecture) for source in sources() for architecture in architectures]
    with tempfile.TemporaryDirectory() as folder:
        commands = [
            _command(compiler, source, architecture, Path(folder, f"{source}-{architecture}.so"), "-Xptxas", "-v")
            for source, architecture in cases
        ]
        printed = run_all(commands)
    return tuple(report for case, text in zip(cases, printed, strict=True) for report in _parse(*case, _readable(text)))


def _read(source: str) -> Iterable[Path]:
    # A header that changes recompiles everything: there are few, and a stale library would be worse.
    return [SOURCE / f"{source}.cu", *SOURCE.glob("*.cuh")]


def _command(compiler: str, source: str, architecture: str, library: Path, *more: str) -> list[str]:
    number = architecture.removeprefix("sm_")
    target = ("-gencode", f"arch=compute_{number},code=sm_{number}")
    return [compiler, *_FLAGS, *more, *target, str(SOURCE / f"{source}.cu"), "-o", str(library)]


def _link(compiler: str, source: str, architecture: str, folder: Path) -> Path:
    library = folder / f"{source}.so"
    run(_command(compiler, source, architecture, library))
    return library


def _readable(text: str) -> str:
    """The assembler's report with C++ names as they were written, where there is a demangler."""
    demangler = shutil.which("cu++filt") or shutil.which("c++filt")
    names = sorted(set(re.findall(r"\b_Z\w+", text)), key=len, reverse=True)
    if demangler is None or not names:
        return text
    for name, readable in zip(names, run([demangler, *names]).splitlines(), strict=True):
        text = text.replace(name, readable)
    return text


def _parse(source: str, architecture: str, text: str) -> Iterable[KernelReport]:
    for part in text.split("Compiling entry function '")[1:]:
        # Without its template's namespace, result and arguments: they are the same for all.
        kernel = part.split("' for '", 1)[0].replace("(anonymous namespace)::", "")
        kernel = re.sub(r"^void |\([^()]*\)$", "", kernel)

        def number(pattern: str, part: str = part) -> int:
            found = re.search(pattern, part)
            return int(found[1]) if found else 0

        yield KernelReport(
            source,
            architecture,
            kernel,
            number(r"Used (\d+) registers"),
            number(r"(\d+) bytes spill stores"),
            number(r"(\d+) bytes spill loads"),
            number(r"(\d+) bytes smem"),
        )

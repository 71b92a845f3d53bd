"""Compiles the C++ sources once per version, compiler and machine, into specdec's cache folder."""

import os
import platform
import shutil
from pathlib import Path

from specdec_kernels.compiling import BuildError, build_once, compiler_version, run, run_all

__all__ = ["SOURCE", "BuildError", "compile_flags", "find_compiler", "library_path"]

SOURCE = Path(__file__).parent / "source"

# No -ffast-math: it may reorder sums, and then a row's bits depend on what else was compiled with it. No contraction
# either, which would round differently in a vector loop and in its remainder; fused multiply-adds are written out.
_COMMON = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-pthread",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fvisibility=hidden",
    "-w",
)

# One instruction set per translation unit: what only some processors have must stay out of the code all of them run.
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
_X86_FLAGS = {"avx2.cpp": _AVX2, "avx512.cpp": _AVX512, "avx512vnni.cpp": (*_AVX512, "-mavx512vnni")}


def compile_flags(instruction_set: str = "portable") -> tuple[str, ...]:
    """What the source of an instruction set is compiled with, beside the macros that it defines itself."""
    return (*_COMMON, *_flags().get(f"{instruction_set}.cpp", ()))


def library_path() -> Path:
    """The shared library, compiled now if it is not there yet (see `compiling.build_once`); raises `BuildError` with
    the reason if it cannot be."""
    if platform.system() == "Windows":
        raise BuildError("is not written for Windows")
    compiler = find_compiler()
    key = (compiler_version(compiler), platform.machine(), repr(_COMMON), repr(_flags()))
    return build_once("kernels", key, SOURCE.iterdir(), lambda folder: _compile(compiler, folder))


def find_compiler() -> str:
    """`CXX`, else the first C++ compiler there is; raises `BuildError` where there is none."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    found = next((path for path in map(shutil.which, names) if path), None)
    if found is None:
        raise BuildError(f"needs a C++ compiler, and there is no {' or '.join(names)}; install g++ or clang++")
    return found


def _flags() -> dict[str, tuple[str, ...]]:
    return _X86_FLAGS if platform.machine().lower() in ("x86_64", "amd64") else {}


def _compile(compiler: str, folder: Path) -> Path:
    commands, objects = [], []
    for source in sorted(SOURCE.glob("*.cpp")):
        objects.append(str(folder / f"{source.stem}.o"))
        commands.append([compiler, *compile_flags(source.stem), "-c", str(source), "-o", objects[-1]])
    run_all(commands)
    library = folder / "kernels.so"
    run([compiler, *_COMMON, "-shared", *objects, "-o", str(library)])
    return library

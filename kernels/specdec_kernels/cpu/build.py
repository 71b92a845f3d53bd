"""Compiles the C++ sources once per version, compiler and machine, into specdec's cache folder."""

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from filelock import FileLock
from platformdirs import user_cache_dir

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
_X86_FLAGS = {"avx2.cpp": _AVX2, "avx512.cpp": (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")}

_TIMEOUT = 300.0


class BuildError(RuntimeError):
    """The kernels cannot be compiled here; the message is one line."""


def library_path() -> Path:
    """The shared library, compiled now if it is not there yet; raises `BuildError` with the reason if it cannot be.

    Two processes that need it at once compile it once; a process killed while compiling leaves nothing behind that
    looks complete.
    """
    if platform.system() == "Windows":
        raise BuildError("is not written for Windows")
    compiler = _compiler()
    library = _folder() / f"kernels-{_key(compiler)}.so"
    if library.exists():
        return library
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(library.with_suffix(".lock")):
            if not library.exists():
                _compile(compiler, library)
    except OSError as error:
        raise BuildError(f"cannot be compiled into {library.parent} ({error.strerror or error})") from error
    return library


def _folder() -> Path:
    home = os.environ.get("SPECDEC_HOME")
    root = Path(home).expanduser().absolute() if home else Path(user_cache_dir("specdec", appauthor=False))
    return root / "kernels"


def _compiler() -> str:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    found = next((path for path in map(shutil.which, names) if path), None)
    if found is None:
        raise BuildError(f"needs a C++ compiler, and there is no {' or '.join(names)}; install g++ or clang++")
    return found


def _key(compiler: str) -> str:
    digest = hashlib.sha256()
    for part in (_version(compiler), platform.machine(), repr(_COMMON), repr(_flags())):
        digest.update(part.encode() + b"\0")
    for path in sorted(SOURCE.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:20]


@cache
def _version(compiler: str) -> str:
    return _run([compiler, "--version"])


def _flags() -> dict[str, tuple[str, ...]]:
    return _X86_FLAGS if platform.machine().lower() in ("x86_64", "amd64") else {}


def _compile(compiler: str, library: Path) -> None:
    flags = _flags()
    with tempfile.TemporaryDirectory(dir=library.parent, prefix=".build-") as folder:
        commands, objects = [], []
        for source in sorted(SOURCE.glob("*.cpp")):
            objects.append(str(Path(folder) / f"{source.stem}.o"))
            commands.append([compiler, *_COMMON, *flags.get(source.name, ()), "-c", str(source), "-o", objects[-1]])
        _run_all(commands)
        built = Path(folder) / library.name
        _run([compiler, *_COMMON, "-shared", *objects, "-o", str(built)])
        os.replace(built, library)


def _run_all(commands: Sequence[Sequence[str]]) -> None:
    started = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for command in commands
    ]
    try:
        for process in started:
            output = process.communicate(timeout=_TIMEOUT)[0]
            if process.returncode:
                raise BuildError(_summary(commands[0][0], output))
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"took longer than {_TIMEOUT:.0f} seconds to compile") from error
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
                process.communicate()


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=_TIMEOUT, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"cannot run {command[0]} ({error})") from error
    if done.returncode:
        raise BuildError(_summary(command[0], done.stdout))
    return done.stdout


def _summary(compiler: str, output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    line = next((line for line in lines if "error" in line), lines[0] if lines else "no message")
    return f"does not compile with {compiler} ({line[:200]})"

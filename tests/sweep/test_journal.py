"""Rows on disk survive what happens to processes."""

import os
import sys
from pathlib import Path

import pytest

from specdec.sweep.journal import CONTEXTS, ROWS, TORN, Journal, read_rows


def test_rows_are_appended_and_read_back(tmp_path: Path) -> None:
    with Journal(tmp_path / "new" / "run") as journal:
        journal.append(['{"a": 1}', '{"a": 2}'])
        journal.append(['{"a": 3}']).result()
        assert [row["a"] for row in journal.rows()] == [1, 2, 3]
    assert [row["a"] for row in read_rows(tmp_path / "new" / "run" / ROWS)] == [1, 2, 3]


@pytest.mark.parametrize("tail", ['{"a": 2', '{"a": 2}', "\0\0\0\n", "{}x\n", '"text"\n', "\xff"])
def test_a_torn_last_line_is_set_aside(tail: str, tmp_path: Path) -> None:
    (tmp_path / ROWS).write_bytes(b'{"a": 1}\n' + tail.encode("latin-1"))
    with Journal(tmp_path) as journal:
        assert journal.torn == len(tail)
        journal.append(['{"a": 9}'])
    assert [row["a"] for row in read_rows(tmp_path / ROWS)] == [1, 9]
    assert tail.encode("latin-1") in (tmp_path / TORN).read_bytes()


@pytest.mark.skipif(sys.platform != "linux", reason="names of open files")
def test_a_context_is_on_the_disk_before_the_rows_that_name_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Journal(tmp_path) as journal:
        synced = []
        monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.readlink(f"/proc/self/fd/{file}")))
        journal.append(['{"row": 1}'], ['{"context": 1}'])
        journal.append(['{"row": 2}'])
    assert [Path(name).name for name in synced] == [CONTEXTS, ROWS, ROWS]
    with (tmp_path / CONTEXTS).open("a") as file:
        file.write('{"conte')
    with Journal(tmp_path) as journal:
        assert journal.torn == len('{"conte')
        journal.append([], ['{"context": 2}'])
    assert [row["context"] for row in read_rows(tmp_path / CONTEXTS)] == [1, 2]


def test_a_damaged_line_in_the_middle_is_refused(tmp_path: Path) -> None:
    (tmp_path / ROWS).write_text('{"a": 1}\n{"a"\n{"a": 3}\n')
    with pytest.raises(ValueError, match="line 2 is damaged"), Journal(tmp_path) as journal:
        list(journal.rows())


def test_one_process_writes_at_a_time(tmp_path: Path) -> None:
    with (
        Journal(tmp_path),
        pytest.raises(ValueError, match="another process is writing"),
        Journal(tmp_path),
    ):
        pass
    with Journal(tmp_path):
        pass


def test_a_full_disk_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write

    def full(file: int, data: bytes) -> int:
        write(file, bytes(data)[:5])
        raise OSError(28, "No space left on device")

    with Journal(tmp_path) as journal:
        journal.append(['{"a": 1}']).result()
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space left"):
            journal.append(['{"a": 2}']).result()
        monkeypatch.setattr(os, "write", write)
        journal.append(['{"a": 3}'])
    assert [row["a"] for row in read_rows(tmp_path / ROWS)] == [1, 3]


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, bytes(data)[:3]))
    with Journal(tmp_path) as journal:
        journal.append(['{"a": "long enough"}'])
    assert [row["a"] for row in read_rows(tmp_path / ROWS)] == ["long enough"]

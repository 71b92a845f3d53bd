"""A journal cut at any byte keeps every whole row, loses only the torn one, and can be written on."""

import json
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from specdec.sweep.journal import ROWS, Journal, read_rows

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=5,
)
RECORDS = st.lists(st.dictionaries(st.text(max_size=4), VALUES, max_size=3), min_size=1, max_size=6)


@given(records=RECORDS, more=RECORDS, data=st.data())
def test_a_cut_loses_the_torn_row_and_nothing_else(
    records: list[dict[str, Any]], more: list[dict[str, Any]], data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with Journal(folder) as journal:
            journal.append([json.dumps(record) for record in records])
        whole = (folder / ROWS).read_bytes()
        cut = data.draw(st.integers(0, len(whole)))
        (folder / ROWS).write_bytes(whole[:cut])
        kept = records[: whole[:cut].count(b"\n")]
        assert list(read_rows(folder / ROWS)) == kept
        with Journal(folder) as journal:
            assert list(journal.rows()) == kept
            journal.append([json.dumps(record) for record in more])
        assert list(read_rows(folder / ROWS)) == kept + more


@given(records=RECORDS, groups=st.lists(st.integers(1, 3), max_size=6))
def test_how_rows_are_grouped_does_not_show(records: list[dict[str, Any]], groups: list[int]) -> None:
    with tempfile.TemporaryDirectory() as name:
        rest = [json.dumps(record) for record in records]
        for size in [*groups, len(rest)]:
            with Journal(Path(name)) as journal:
                journal.append(rest[:size])
            rest = rest[size:]
        assert list(read_rows(Path(name) / ROWS)) == records

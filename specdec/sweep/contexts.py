"""What the model was given, kept once however many cells were given it: `contexts.jsonl`."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from specdec.sweep.journal import CONTEXTS, ROWS, read_rows


class Context(NamedTuple):
    """`prompt`: what the user says in this turn; `prompt_text`: what the model was given, template and earlier turns
    included; both of the last are empty when it could not be encoded."""

    prompt: str
    prompt_text: str = ""
    prompt_token_ids: tuple[int, ...] = ()

    @property
    def id(self) -> str:
        """What rows call it: 64 bits of a hash of what is in it."""
        return hashlib.sha256(json.dumps(self).encode()).hexdigest()[:16]

    def line(self) -> str:
        """The line of `contexts.jsonl`."""
        return json.dumps({"context": self.id, **self._asdict()}, ensure_ascii=False, separators=(",", ":"))


def read_contexts(folder: Path) -> dict[str, Context]:
    """The contexts of a run folder by their id; none where there is no such file."""
    if not (folder / CONTEXTS).is_file():
        return {}
    return {
        row["context"]: Context(row["prompt"], row["prompt_text"], tuple(row["prompt_token_ids"]))
        for row in read_rows(folder / CONTEXTS)
    }


def whole_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """The rows of a run folder, each with the fields of its context; raises `ValueError` when that is missing."""
    contexts = read_contexts(folder)
    for row in read_rows(folder / ROWS):
        context = contexts.get(row["context"])
        if context is None:
            raise ValueError(f"{folder / CONTEXTS} has no context {row['context']}; copy the file with its rows")
        yield {**row, **context._asdict()}

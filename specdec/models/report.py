"""What the code around models tells its caller: errors as one line, and progress.

Kept free of torch and transformers, so that listing stored models stays instant.
"""

import difflib
from collections.abc import Callable, Iterable

Progress = Callable[[str, int, int], None]
"""`progress(stage, done, total)`: `stage` is a short phrase, the unit is the stage's own, `total` 0 means unknown."""


class ModelError(ValueError):
    """A model cannot be found, fetched, read or combined; one line that says what was found and what to do."""


def silent(stage: str, done: int, total: int) -> None:
    """The progress callback that shows nothing."""


def one_line(error: BaseException, limit: int = 300) -> str:
    """What another library's error says, without its line breaks; the class name when it says nothing."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"`, or nothing when no known name is near."""
    near = difflib.get_close_matches(name.lower(), list(known), n=2, cutoff=0.6)
    return f"; did you mean {' or '.join(repr(match) for match in near)}?" if near else ""

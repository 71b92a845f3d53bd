"""The traces of a run: a file a sample, named after it, and their hashes for the manifest."""

import hashlib
import re
from pathlib import Path

TRACES = "traces"


def trace_file(folder: Path, cell: str, iteration: int, prompt_id: str, turn: int) -> Path:
    """Where the trace of a sample is: readable, and told apart by a hash of what makes a row one of its run."""
    digest = hashlib.sha256(f"{cell}/{iteration}/{prompt_id}/{turn}".encode()).hexdigest()[:12]
    words = re.sub(r"[^A-Za-z0-9=.]+", "-", f"{cell} {prompt_id} {turn} {iteration}").strip("-.")
    return folder / TRACES / f"{words[:80]}-{digest}.npz"


def list_traces(folder: Path) -> dict[str, str]:
    """The SHA-256 of every trace, by its path in the folder."""
    files = sorted((folder / TRACES).glob("*.npz"))
    return {f"{TRACES}/{file.name}": hashlib.sha256(file.read_bytes()).hexdigest() for file in files}

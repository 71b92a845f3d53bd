"""A trace: the rounds of one sample as plain numbers, and its file.

The laws are as wide as the vocabulary, a trace is not. Of each node it keeps the two probabilities its coin was
compared with, the mass of the residual behind it, and what the target chooses after it; of each round the one token
that was drawn, with its interval in the cumulative law. `docs/trace.md` says what a replay recomputes from them.
"""

import io
import json
import os
import zipfile
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

FORMAT = 1
# Rounds of a sample that are kept unless told otherwise; with `MAX_NODE_BYTES` it bounds memory and file.
DEFAULT_LIMIT = 10_000

NODE = np.dtype(
    [
        # Place in the tree as it was proposed, which numbers the uniforms; parents are places in this record.
        ("index", "<i2"),
        ("token", "<i4"),
        ("parent", "<i2"),
        ("sampled", "?"),
        # Law of target and draft at the token, the siblings before it rejected; and what a rejection leaves,
        # the sum of (p - q)+. Of the root: 1, 1 and 0.
        ("p", "<f8"),
        ("q", "<f8"),
        ("residual", "<f8"),
        # Block verification: the sum of (r p - q)+ over the next position; NaN where there is none.
        ("block", "<f8"),
        ("accept", "<f8"),
        # The target's own choice after the node and its rival: logits (greedy), log probabilities (coupled), or the
        # choice's interval [low, high) of `total` in the cumulative law (match). -1 where the policy makes none.
        ("choice", "<i4"),
        ("rival", "<i4"),
        ("low", "<f8"),
        ("high", "<f8"),
        ("total", "<f8"),
    ]
)
ROUND = np.dtype(
    [
        ("round", "<i4"),
        ("length", "<i4"),
        ("depth", "<i2"),
        ("nodes", "<i2"),
        ("emitted", "<i2"),
        ("accepted", "<i2"),
        ("forwards", "<i2"),
        # The draft that would have come next (`lookahead`), -1 where there is none.
        ("ahead", "<i4"),
        ("uniform", "<f8"),
        ("draw", "<i4"),
        ("low", "<f8"),
        ("high", "<f8"),
        ("total", "<f8"),
        ("draft_s", "<f4"),
        ("verify_s", "<f4"),
        ("accept_s", "<f4"),
        ("total_s", "<f4"),
    ]
)
Table = npt.NDArray[Any]


@dataclass(frozen=True)
class Header:
    """What was run. `drafter`, `policy`, `controller`: as `specdec.grammar` spells them. `seed`: of this sample's
    randomness. `rows`: samples decoded together with it, itself included, whose time the rounds' seconds are. `costs`:
    seconds of a forward of n tokens, where the run measured them. `lookahead`: drafts went one token deeper than they
    were verified. `complete`: no round was left out."""

    model: str
    drafter: str
    policy: str
    controller: str
    sampling: dict[str, float]
    dtype: str
    vocab_size: int
    seed: int
    eos_ids: tuple[int, ...]
    max_new_tokens: int
    stop_reason: str = "running"
    rows: int = 1
    chain: bool = True
    replacement: bool = True
    prefill_s: float = 0.0
    lookahead: bool = False
    complete: bool = True
    synthetic: bool = False
    costs: dict[int, float] | None = None
    format: int = FORMAT


@dataclass(frozen=True)
class Trace:
    """`rounds` (`ROUND`), their nodes one after the other (`NODE`), and their committed tokens likewise."""

    header: Header
    prompt: Table
    rounds: Table
    nodes: Table
    emitted: Table

    def tree(self, index: int) -> Table:
        """The nodes of a round, root first."""
        begin = int(self.rounds["nodes"][:index].sum(dtype=np.int64))
        return self.nodes[begin : begin + int(self.rounds["nodes"][index])]

    def tokens(self, index: int) -> list[int]:
        """What a round committed."""
        begin = int(self.rounds["emitted"][:index].sum(dtype=np.int64))
        return [int(token) for token in self.emitted[begin : begin + int(self.rounds["emitted"][index])]]

    @property
    def text(self) -> list[int]:
        """Prompt and output."""
        return [*map(int, self.prompt), *map(int, self.emitted)]


def bytes_bound(rounds: int, nodes: int) -> int:
    """The most bytes that rounds with so many nodes in all (root included) take, prompt and header apart."""
    return rounds * (ROUND.itemsize + 4) + nodes * (NODE.itemsize + 4)


def write_trace(trace: Trace, file: Path) -> Path:
    """Write the trace so that a reader finds all of it or nothing: a temporary file, flushed to the disk, renamed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    header = np.frombuffer(json.dumps(asdict(trace.header)).encode(), dtype=np.uint8)
    partial = file.with_name(f"{file.name}.partial")
    with partial.open("wb") as handle:
        tables = {name: getattr(trace, name) for name in ("prompt", "rounds", "nodes", "emitted")}
        np.savez_compressed(handle, header=header, **tables)
        handle.flush()
        os.fsync(handle.fileno())
    partial.replace(file)
    return file


def read_trace(file: Path) -> Trace:
    """The trace in `file`; raises `ValueError` in one line for a file that is torn, damaged or of another kind."""
    try:
        held = io.BytesIO(file.read_bytes())
        if not zipfile.is_zipfile(held):
            # numpy would take it for something pickled, and say how to load that all the same.
            raise ValueError("it is no archive of tables")
        held.seek(0)
        with np.load(held, allow_pickle=False) as stored:
            header = json.loads(bytes(stored["header"]))
            prompt, rounds, nodes, emitted = (stored[name] for name in ("prompt", "rounds", "nodes", "emitted"))
    except OSError as error:
        raise ValueError(f"cannot read {file} ({error.strerror or error}); name a file that --trace wrote") from error
    except (ValueError, KeyError, EOFError, AttributeError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{file} is no whole trace ({' '.join(str(error).split())}); record it again") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(f"{file} is a trace of another format; this version reads format {FORMAT}")
    fits = rounds.dtype == ROUND and nodes.dtype == NODE
    sizes = fits and (int(rounds["nodes"].sum(dtype=np.int64)), int(rounds["emitted"].sum(dtype=np.int64)))
    if sizes != (len(nodes), len(emitted)):
        raise ValueError(f"{file} is no whole trace (its tables do not belong together); record it again")
    costs = header.pop("costs")
    known = None if costs is None else {int(n): seconds for n, seconds in costs.items()}
    try:
        return Trace(
            Header(**{**header, "eos_ids": tuple(header["eos_ids"])}, costs=known), prompt, rounds, nodes, emitted
        )
    except TypeError as error:
        raise ValueError(f"{file} is no whole trace ({error}); record it again") from error

"""`detailed.json`: histograms over the rounds of every cell, and seconds by operation, profiled apart."""

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from torch.profiler import record_function

from specdec.run import decode_rounds
from specdec.sweep.bench import Prepared
from specdec.sweep.config import Config
from specdec.sweep.journal import ROWS, read_rows, write_whole
from specdec.sweep.measure import Sample, encode_sample
from specdec.sweep.prompts import Prompt
from specdec.sweep.samples import Run
from specdec.transforms import spanned_parts
from specdec_kernels.profile import profiled

DETAILED, OPERATIONS = "detailed.json", "operations.json"
# Enough rounds for a mean, and few enough for the profiler's memory.
_PROFILED_ROUNDS = 16
_QUANTILES = (0.5, 0.9, 0.99)
_BINS = 20


def profile_cell(prepared: Prepared, prompt: Prompt, config: Config) -> dict[str, Any]:
    """Decode the first rounds of `prompt` under torch's profiler: `rounds`, and `operations` with their calls and
    seconds. What no operation of torch accounts for is under `specdec.` and the phase."""
    tokens = encode_sample(prepared, Sample(0, prompt, 0, 0), config)
    job = prepared.job._replace(
        parts=spanned_parts(prepared.job.parts, lambda phase: record_function(f"specdec.{phase}")),
        prompts=[tokens] * prepared.cell.batch_size,
    )
    with profiled(job.parts.model.device) as found:
        items = sum(1 for _ in islice(decode_rounds(job), 1 + _PROFILED_ROUNDS))
    # The first item is the prefill.
    return {"rounds": items - 1, "operations": found.kernels}


def read_operations(folder: Path) -> dict[str, Any]:
    """What was profiled of each cell; nothing where there is no file."""
    file = folder / OPERATIONS
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def write_operations(folder: Path, operations: Mapping[str, Any]) -> None:
    """Keep what was profiled."""
    write_whole(folder / OPERATIONS, json.dumps(operations, indent=1) + "\n")


def write_detailed(run: Run, file: Path) -> None:
    """Write the histograms of the rows of `run`, and beside them what was profiled."""
    lengths: dict[str, Counter[int]] = defaultdict(Counter)
    rounds: dict[str, list[Mapping[str, float]]] = defaultdict(list)
    for row in read_rows(run.folder / ROWS):
        lengths[row["cell"]].update(row["accept_lengths"])
        rounds[row["cell"]] += row["round_seconds"] or []
    operations = read_operations(run.folder)
    cells = {
        cell.id: {
            "accepted_length": {str(length): count for length, count in sorted(lengths[cell.id].items())},
            "seconds": _by_phase(rounds[cell.id]),
            "profiled": operations.get(cell.id),
        }
        for cell in run.cells
    }
    file.write_text(json.dumps({"synthetic": run.synthetic, "cells": cells}, indent=1) + "\n", encoding="utf-8")


def _by_phase(rounds: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    phases = dict.fromkeys(name for seconds in rounds for name in seconds if name not in ("accepted", "proposed"))
    return {phase: _histogram([seconds.get(phase, 0.0) for seconds in rounds]) for phase in phases}


def _histogram(values: Sequence[float]) -> dict[str, Any]:
    """Quantiles, and counts between edges."""
    counts, edges = np.histogram(values, bins=_BINS)
    quantiles = dict(zip(map(str, _QUANTILES), np.quantile(values, _QUANTILES).tolist(), strict=True))
    return {"rounds": len(values), "quantiles": quantiles, "edges": edges.tolist(), "counts": counts.tolist()}

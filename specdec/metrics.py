"""Counters of a run: integers with a zero and an associative merge; rates are computed once, in `summarize`.

The sufficient statistic is `hist[k][j]`: rounds in which k tokens deep was drafted and j of them were accepted.
`hist[0][0]` counts the rounds without a draft. Every acceptance figure of the field is a projection of it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from specdec.rates import rates
from specdec.records import record


@record
class Metrics:
    """Counters by row. `drafted`: tokens submitted (all nodes of a tree but the root), `emitted`: tokens committed,
    `target_forwards`: rounds and prefills, `draft_forwards`: forwards of a draft model, `hist`: see the module."""

    hist: Int[Tensor, "b k k"]
    drafted: Int[Tensor, " b"]
    emitted: Int[Tensor, " b"]
    target_forwards: Int[Tensor, " b"]
    draft_forwards: Int[Tensor, " b"]


def zero(rows: int, max_depth: int, device: torch.device | str = "cpu") -> Metrics:
    """Counters at zero, for drafts up to `max_depth` deep."""
    count = torch.zeros(rows, dtype=torch.int64, device=device)
    hist = torch.zeros(rows, max_depth + 1, max_depth + 1, dtype=torch.int64, device=device)
    return Metrics(hist, count, count, count, count)


def observe(
    metrics: Metrics,
    *,
    depth: Int[Tensor, " b"],
    accepted: Int[Tensor, " b"],
    drafted: Int[Tensor, " b"],
    emitted: Int[Tensor, " b"],
    running: Bool[Tensor, " b"],
    draft_forwards: int,
) -> Metrics:
    """Count one round of the rows that are `running`; `depth` is that of the drafted tree, `accepted` of the path."""
    size = metrics.hist.shape[1]
    index = (depth * size + accepted)[:, None]
    return Metrics(
        hist=metrics.hist.flatten(1).scatter_add(1, index, running.long()[:, None]).view_as(metrics.hist),
        drafted=metrics.drafted + drafted * running,
        emitted=metrics.emitted + emitted,
        target_forwards=metrics.target_forwards + running,
        draft_forwards=metrics.draft_forwards + draft_forwards * running if draft_forwards else metrics.draft_forwards,
    )


def merge(first: Metrics, second: Metrics) -> Metrics:
    """The counters of both runs, row by row; the histogram grows to the deeper of the two."""
    size = max(first.hist.shape[1], second.hist.shape[1])

    def grown(hist: Tensor) -> Tensor:
        missing = size - hist.shape[1]
        return torch.nn.functional.pad(hist, (0, missing, 0, missing))

    return Metrics(
        hist=grown(first.hist) + grown(second.hist),
        drafted=first.drafted + second.drafted,
        emitted=first.emitted + second.emitted,
        target_forwards=first.target_forwards + second.target_forwards,
        draft_forwards=first.draft_forwards + second.draft_forwards,
    )


def summarize(metrics: Metrics, rows: Sequence[int] | None = None) -> dict[str, Any]:
    """Counts and rates over the given rows (all by default), as plain numbers; `specdec.rates` defines them."""
    pick = slice(None) if rows is None else list(rows)
    return rates(
        metrics.hist[pick].sum(0).tolist(),
        drafted=int(metrics.drafted[pick].sum()),
        emitted=int(metrics.emitted[pick].sum()),
        target_forwards=int(metrics.target_forwards[pick].sum()),
        draft_forwards=int(metrics.draft_forwards[pick].sum()),
    )

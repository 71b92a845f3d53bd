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
from specdec_kernels.dispatch import resolve
from specdec_kernels.ops.commit import DRAFT_FORWARDS, DRAFTED, EMITTED, HISTOGRAM, TARGET_FORWARDS


@record
class Metrics:
    """Counters of each row in one array, so that a round adds to them once: `counts [b, 4 + (max_depth + 1) ** 2]`.

    `drafted`: tokens submitted (all nodes of a tree but the root), `emitted`: tokens committed, `target_forwards`:
    rounds and prefills, `draft_forwards`: forwards of a draft model, `hist`: see the module.
    """

    counts: Int[Tensor, "b c"]
    max_depth: int

    @property
    def drafted(self) -> Int[Tensor, " b"]:
        return self.counts[:, DRAFTED]

    @property
    def emitted(self) -> Int[Tensor, " b"]:
        return self.counts[:, EMITTED]

    @property
    def target_forwards(self) -> Int[Tensor, " b"]:
        return self.counts[:, TARGET_FORWARDS]

    @property
    def draft_forwards(self) -> Int[Tensor, " b"]:
        return self.counts[:, DRAFT_FORWARDS]

    @property
    def hist(self) -> Int[Tensor, "b k k"]:
        return self.counts[:, HISTOGRAM:].view(-1, self.max_depth + 1, self.max_depth + 1)


def zero(rows: int, max_depth: int, device: torch.device | str = "cpu") -> Metrics:
    """Counters at zero, for drafts up to `max_depth` deep."""
    return Metrics(torch.zeros(rows, HISTOGRAM + (max_depth + 1) ** 2, dtype=torch.int64, device=device), max_depth)


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
    count = resolve("count_round", metrics.counts.device, metrics.counts.dtype, running.shape)
    options = {"draft_forwards": draft_forwards, "max_depth": metrics.max_depth}
    return Metrics(count(metrics.counts, depth, accepted, drafted, emitted, running, **options), metrics.max_depth)


def add(metrics: Metrics, *, emitted: Int[Tensor, " b"] | int = 0, target_forwards: int = 0) -> Metrics:
    """The counters with these numbers on top."""
    counts = metrics.counts.clone()
    counts[:, EMITTED] += emitted
    counts[:, TARGET_FORWARDS] += target_forwards
    return Metrics(counts, metrics.max_depth)


def merge(first: Metrics, second: Metrics) -> Metrics:
    """The counters of both runs, row by row; the histogram grows to the deeper of the two."""
    depth = max(first.max_depth, second.max_depth)
    return Metrics(_grown(first, depth) + _grown(second, depth), depth)


def _grown(metrics: Metrics, depth: int) -> Int[Tensor, "b c"]:
    missing = depth - metrics.max_depth
    hist = torch.nn.functional.pad(metrics.hist, (0, missing, 0, missing))
    return torch.cat((metrics.counts[:, :HISTOGRAM], hist.flatten(1)), 1)


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

"""Rates of a run from its counters, as plain numbers: the definitions behind `metrics.summarize`, without torch."""

from collections.abc import Sequence
from typing import Any


def rates(
    hist: Sequence[Sequence[int]], *, drafted: int, emitted: int, target_forwards: int, draft_forwards: int
) -> dict[str, Any]:
    """Counts and rates of the rounds that `hist[k][j]` counts (k drafted, j of them accepted).

    - `acceptance_rate`: accepted / drafted; `None` when nothing was drafted.
    - `mean_accepted_length`: emitted / rounds, the corrected or bonus token included, rounds without draft included.
    - `tokens_per_forward`: emitted / target_forwards, prefill included.
    - `per_position[i]`: share of the rounds whose draft reached depth i + 1 in which that depth was accepted.
    - `per_position_conditional[i]`: the same among those in which depth i was accepted.
    """
    rounds = sum(map(sum, hist))
    accepted = sum(number * count for row in hist for number, count in enumerate(row))

    def rounds_with(depth: int, reached: int) -> int:
        return sum(sum(row[reached:]) for row in hist[depth:])

    deepest = max((k for k, row in enumerate(hist) if any(row)), default=0)
    positions = range(1, deepest + 1)
    return {
        "rounds": rounds,
        "drafted": drafted,
        "accepted": accepted,
        "emitted": emitted,
        "target_forwards": target_forwards,
        "draft_forwards": draft_forwards,
        "hist": [list(row[: deepest + 1]) for row in hist[: deepest + 1]],
        "acceptance_rate": _ratio(accepted, drafted),
        "mean_accepted_length": _ratio(emitted, rounds),
        "tokens_per_forward": _ratio(emitted, target_forwards),
        "per_position": [_ratio(rounds_with(i, i), rounds_with(i, 0)) for i in positions],
        "per_position_conditional": [_ratio(rounds_with(i, i), rounds_with(i, i - 1)) for i in positions],
    }


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None

"""The same rows under other systems' definitions; all are projections of `hist[k][j]` and the times.

`vllm`: its engine and `bench serve`. `spec-bench`: the benchmark's own `speed.py`. `speed-bench`: SPEED-Bench.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from specdec.sweep.samples import Run, Sample, used
from specdec.sweep.stats import pooled


def vllm(samples: Sequence[Sample], plain: Sequence[Sample]) -> dict[str, Any]:
    """Rounds without a draft do not count; the acceptance length includes the bonus token; rates are percentages;
    position i counts against all drafts, whether or not they reach it."""
    counts = pooled(used(samples))
    hist, drafted, accepted = counts["hist"], counts["drafted"], counts["accepted"]
    drafts = sum(map(sum, hist[1:]))
    reached = [sum(sum(row[place:]) for row in hist) for place in range(1, len(hist))]
    return {
        "spec_decode_acceptance_length": 1 + accepted / drafts if drafts else None,
        "spec_decode_acceptance_rate": 100 * accepted / drafted if drafted else None,
        "spec_decode_num_drafts": drafts,
        "spec_decode_draft_tokens": drafted,
        "spec_decode_accepted_tokens": accepted,
        "spec_decode_per_position_acceptance_rates": [count / drafts for count in reached] if drafts else [],
    }


def spec_bench(samples: Sequence[Sample], plain: Sequence[Sample]) -> dict[str, Any]:
    """Mean accepted tokens over all rounds pooled, the bonus token included; speed is the mean over questions of their
    tokens by their seconds, all turns together; speedup is the ratio of those means."""
    good = used(samples)
    counts = pooled(good)
    speed, slow = _question_speed(good), _question_speed(used(plain))
    by_category: dict[str, list[Sample]] = defaultdict(list)
    for sample in good:
        by_category[sample.category].append(sample)
    lengths = [pooled(members)["mean_accepted_length"] for members in by_category.values()]
    return {
        "mean_accepted_tokens": counts["mean_accepted_length"],
        "mean_accepted_tokens_macro": sum(lengths) / len(lengths) if lengths and None not in lengths else None,
        "tokens_per_second": speed,
        "speedup": speed / slow if speed and slow else None,
    }


def speed_bench(samples: Sequence[Sample], plain: Sequence[Sample]) -> dict[str, Any]:
    """Acceptance length with the bonus token, and conditional acceptance by position."""
    counts = pooled(used(samples))
    return {
        "acceptance_length": counts["mean_accepted_length"],
        "conditional_acceptance_rate": counts["per_position_conditional"],
    }


Convention = Callable[[Sequence[Sample], Sequence[Sample]], dict[str, Any]]
CONVENTIONS: Mapping[str, Convention] = {"vllm": vllm, "spec-bench": spec_bench, "speed-bench": speed_bench}


def project(run: Run, convention: str) -> dict[str, dict[str, Any]]:
    """The figures of every cell of a run under a convention, by the cell's label."""
    function = CONVENTIONS[convention]
    return {
        cell.label: function(run.samples[cell.id], run.samples.get(run.samples[cell.id][0].baseline, []))
        for cell in run.cells
    }


def _question_speed(samples: Sequence[Sample]) -> float | None:
    tokens: dict[tuple[int, str], int] = defaultdict(int)
    seconds: dict[tuple[int, str], float] = defaultdict(float)
    for sample in samples:
        question = (sample.iteration, sample.prompt_id)
        tokens[question] += sample.emitted
        seconds[question] += sample.wall_s or 0.0
    speeds = [tokens[question] / seconds[question] for question in tokens if seconds[question]]
    return sum(speeds) / len(speeds) if speeds else None

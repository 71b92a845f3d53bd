"""From samples to the figures of a cell, with intervals. Definitions: `specdec.sweep.definitions`."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from specdec.rates import rates
from specdec.sweep.samples import CellInfo, Run, Sample, used

_CONFIDENCE, _RESAMPLES = 0.95, 2000
# Resampling three or four prompts gives intervals that look far too sure.
_FEWEST_UNITS = 5


class Spread(NamedTuple):
    """Of a list of numbers; `std` with n - 1. All `None` when there is none."""

    n: int
    mean: float | None
    median: float | None
    std: float | None
    min: float | None
    max: float | None


class Speedup(NamedTuple):
    """Against plain decoding. `ratio`: geometric mean over prompts; `low`, `high`: its interval, `None` where there
    are too few prompts; `of_means`: ratio of the mean speeds; `pairs`: samples that have a plain partner."""

    ratio: float
    low: float | None
    high: float | None
    of_means: float
    prompts: int
    pairs: int


class CellSummary(NamedTuple):
    """A row of the results. `counts`: see `specdec.rates`, over all samples. `seconds`: share of the time
    by phase."""

    cell: CellInfo
    n: int
    failures: int
    tokens_per_sec: Spread
    latency_ms: Spread
    time_to_first_token_ms: Spread
    per_token_latency_ms: Spread
    acceptance_rate: Spread
    proposed: Spread
    accepted: Spread
    kv_appended_tokens: Spread
    kv_append_time_ms: Spread
    counts: dict[str, Any]
    alpha: float | None
    speedup: Speedup | None
    identical: float | None
    seconds: dict[str, float]
    categories: dict[str, "CategorySummary"]


class CategorySummary(NamedTuple):
    """The same for the prompts of one category."""

    n: int
    tokens_per_sec: float | None
    acceptance_rate: float | None
    mean_accepted_length: float | None
    speedup: Speedup | None


def summarize_run(run: Run) -> list[CellSummary]:
    """A summary of every cell of a run."""
    return [summarize_cell(cell, run.samples[cell.id], _plain_of(cell, run)) for cell in run.cells]


def summarize_cell(cell: CellInfo, samples: Sequence[Sample], plain: Sequence[Sample]) -> CellSummary:
    """The figures of `samples`; `plain`: those of its baseline."""
    good, partners = used(samples), used(plain)
    counts = pooled(good)
    positions = sum(sample.alpha_positions for sample in good)
    total = sum(sample.wall_s or 0.0 for sample in good)
    by_category: dict[str, list[Sample]] = defaultdict(list)
    for sample in good:
        by_category[sample.category].append(sample)
    return CellSummary(
        cell=cell,
        n=len(samples),
        failures=len(samples) - len(good),
        tokens_per_sec=spread(sample.tokens_per_sec for sample in good),
        latency_ms=spread(sample.latency_ms for sample in good),
        time_to_first_token_ms=spread(_milli(sample.time_to_first_token_s) for sample in good),
        per_token_latency_ms=spread(_milli(sample.per_token_latency_s) for sample in good),
        acceptance_rate=spread(sample.accepted / sample.drafted if sample.drafted else None for sample in good),
        proposed=spread(float(sample.drafted) for sample in good),
        accepted=spread(float(sample.accepted) for sample in good),
        kv_appended_tokens=spread(float(sample.kv_appended_tokens) for sample in good),
        kv_append_time_ms=spread(sample.kv_append_time_ms for sample in good),
        counts=counts,
        alpha=(
            sum((sample.alpha or 0.0) * sample.alpha_positions for sample in good) / positions if positions else None
        ),
        speedup=paired_speedup(good, partners),
        identical=_identical(good, partners) if _must_equal(cell) else None,
        seconds={
            phase: sum(getattr(sample, f"{phase}_s") or 0.0 for sample in good) / total if total else 0.0
            for phase in ("prefill", "draft", "verify", "accept", "other")
        },
        categories={
            name: _category(members, [sample for sample in partners if sample.category == name])
            for name, members in by_category.items()
        },
    )


def pooled(samples: Sequence[Sample]) -> dict[str, Any]:
    """Counters and rates over all rounds of `samples`, by the library's own definitions."""
    size = max((len(sample.hist) for sample in samples), default=1)
    hist = np.zeros((size, size), dtype=np.int64)
    for key, times in Counter(sample.hist for sample in samples).items():
        hist[: len(key), : len(key)] += times * np.asarray(key, dtype=np.int64)

    def total(name: str) -> int:
        return sum(getattr(sample, name) for sample in samples)

    return rates(
        hist.tolist(),
        drafted=total("drafted"),
        emitted=total("emitted"),
        target_forwards=total("target_forwards"),
        draft_forwards=total("draft_forwards"),
    )


def spread(values: Iterable[float | None]) -> Spread:
    """Mean, median, standard deviation, extremes of the values that are there."""
    # What is not there becomes not a number.
    found = np.asarray(list(values), dtype=float)
    found = found[~np.isnan(found)]
    if not len(found):
        return Spread(0, None, None, None, None, None)
    std = float(found.std(ddof=1)) if len(found) > 1 else 0.0
    return Spread(len(found), float(found.mean()), float(np.median(found)), std, float(found.min()), float(found.max()))


def paired_speedup(samples: Sequence[Sample], plain: Sequence[Sample]) -> Speedup | None:
    """How much faster `samples` are than their plain partners; `None` without pairs.

    Pairs share prompt, turn and iteration. The repetitions of a prompt are averaged first, in logarithms, because they
    are no independent evidence; the interval resamples prompts.
    """
    speeds = {sample.pair: sample.tokens_per_sec for sample in plain if sample.tokens_per_sec}
    pairs = [
        (sample.prompt_id, sample.tokens_per_sec, speeds[sample.pair])
        for sample in samples
        if sample.tokens_per_sec and sample.pair in speeds
    ]
    if not pairs:
        return None
    logs: dict[str, list[float]] = defaultdict(list)
    for prompt, fast, slow in pairs:
        logs[prompt].append(math.log(fast / slow))
    units = [fmean(values) for values in logs.values()]
    low, high = interval(units)
    return Speedup(
        ratio=math.exp(fmean(units)),
        low=None if low is None else math.exp(low),
        high=None if high is None else math.exp(high),
        of_means=sum(fast for _, fast, _ in pairs) / sum(slow for _, _, slow in pairs),
        prompts=len(units),
        pairs=len(pairs),
    )


def interval(units: Sequence[float]) -> tuple[float | None, float | None]:
    """95 % bootstrap interval of the mean of independent units: bias-corrected and accelerated (scipy), always with the
    same resamples."""
    from scipy.stats import bootstrap

    if len(units) < _FEWEST_UNITS:
        return None, None
    if min(units) == max(units):
        return units[0], units[0]
    found = bootstrap(
        (np.asarray(units),),
        np.mean,
        confidence_level=_CONFIDENCE,
        n_resamples=_RESAMPLES,
        # A matrix of resamples for many prompts at once would not fit in memory.
        batch=max(1, 2_000_000 // len(units)),
        method="BCa" if len(units) <= 1000 else "percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(found.low), float(found.high)


def _plain_of(cell: CellInfo, run: Run) -> list[Sample]:
    return run.samples.get(run.samples[cell.id][0].baseline, [])


def _category(samples: Sequence[Sample], plain: Sequence[Sample]) -> CategorySummary:
    counts = pooled(samples)
    return CategorySummary(
        len(samples),
        spread(sample.tokens_per_sec for sample in samples).mean,
        counts["acceptance_rate"],
        counts["mean_accepted_length"],
        paired_speedup(samples, plain),
    )


def _must_equal(cell: CellInfo) -> bool:
    """Greedy and coupled decoding choose the same token whatever was drafted; others only draw from the same law."""
    return not cell.is_baseline and (cell.temperature == 0 or cell.policy == "coupled")


def _identical(samples: Sequence[Sample], plain: Sequence[Sample]) -> float | None:
    tokens = {sample.pair: sample.tokens for sample in plain}
    same = [sample.tokens == tokens[sample.pair] for sample in samples if sample.pair in tokens]
    return sum(same) / len(same) if same else None


def _milli(seconds: float | None) -> float | None:
    return None if seconds is None else 1000 * seconds

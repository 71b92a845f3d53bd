"""From samples to the figures of a cell, with intervals. Definitions: `specdec.sweep.definitions`."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from specdec.rates import rates
from specdec.sweep.samples import CellInfo, Pair, Run, Sample, columns, used

_CONFIDENCE, _RESAMPLES = 0.95, 2000
# Numbers resampled at a time: 4 MB, which a cache holds; 16 MB take two thirds longer.
_AT_ONCE = 500_000
# Resampling three or four prompts gives intervals that look far too sure.
_FEWEST_UNITS = 5
# Sizes that a row may know, see `specdec_kernels.memory`.
MEMORY = ("rss_peak", "allocated", "allocated_peak", "reserved", "reserved_peak")
PHASES = ("prefill", "draft", "verify", "accept", "other")


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
    by phase, `None` without times. `memory_mib`: the largest of all samples by name, where it is known. `shared`:
    samples whose times are left out, because cells shared a machine."""

    cell: CellInfo
    n: int
    failures: int
    shared: int
    tokens_per_sec: Spread
    latency_ms: Spread
    time_to_first_token_ms: Spread
    per_token_latency_ms: Spread
    acceptance_rate: Spread
    proposed: Spread
    accepted: Spread
    emitted: Spread
    counts: dict[str, Any]
    alpha: float | None
    speedup: Speedup | None
    identical: float | None
    seconds: dict[str, float | None]
    memory_mib: dict[str, float]
    categories: dict[str, "CategorySummary"]


class CategorySummary(NamedTuple):
    """The same for the prompts of one category."""

    n: int
    tokens_per_sec: float | None
    acceptance_rate: float | None
    mean_accepted_length: float | None
    speedup: Speedup | None


class Tally(NamedTuple):
    """Sums over samples, from which `specdec.rates` are made."""

    hist: np.ndarray
    drafted: int
    emitted: int
    target_forwards: int
    draft_forwards: int

    def rates(self) -> dict[str, Any]:
        """Counters and rates by the library's own definitions."""
        return rates(self.hist.tolist(), **{name: getattr(self, name) for name in self._fields[1:]})


class Plain(NamedTuple):
    """What cells are compared with, by what makes a pair: speeds and hashes of the tokens of plain decoding."""

    speeds: Mapping[Pair, float]
    tokens: Mapping[Pair, int]


def summarize_run(run: Run) -> list[CellSummary]:
    """A summary of every cell of a run."""
    baseline = {cell.id: run.samples[cell.id][0].baseline for cell in run.cells}
    plain = {name: _plain(run.samples.get(name, [])) for name in dict.fromkeys(baseline.values())}
    return [_summarize(cell, run.samples[cell.id], plain[baseline[cell.id]]) for cell in run.cells]


def summarize_cell(cell: CellInfo, samples: Sequence[Sample], plain: Sequence[Sample]) -> CellSummary:
    """The figures of `samples`; `plain`: those of its baseline."""
    return _summarize(cell, samples, _plain(plain))


def _summarize(cell: CellInfo, samples: Sequence[Sample], plain: Plain) -> CellSummary:
    good = used(samples)
    column = columns(good)
    total = _sum(column["wall_s"])
    positions = sum(column["alpha_positions"])
    law = zip(column["alpha"], column["alpha_positions"], strict=True)
    ratios = zip(column["accepted"], column["drafted"], strict=True)
    pairs = _pairs(good, plain)
    members = defaultdict(list)
    for sample in good:
        members[sample.category].append(sample)
    tallies = {name: _tally(those) for name, those in members.items()}
    return CellSummary(
        cell=cell,
        n=len(samples),
        failures=len(samples) - len(good),
        shared=sum(column["shared_machine"]),
        tokens_per_sec=spread(column["tokens_per_sec"]),
        latency_ms=spread(column["wall_s"], unit=1000.0),
        time_to_first_token_ms=spread(column["time_to_first_token_s"], unit=1000.0),
        per_token_latency_ms=spread(column["per_token_latency_s"], unit=1000.0),
        acceptance_rate=spread([accepted / drafted if drafted else None for accepted, drafted in ratios]),
        proposed=spread(column["drafted"]),
        accepted=spread(column["accepted"]),
        emitted=spread(column["emitted"]),
        counts=_together(tallies.values()).rates(),
        alpha=sum((alpha or 0.0) * count for alpha, count in law) / positions if positions else None,
        speedup=_speedup(pairs),
        identical=_identical(good, plain) if _must_equal(cell) else None,
        seconds={phase: _sum(column[f"{phase}_s"]) / total if total else None for phase in PHASES},
        memory_mib=_largest(column["memory_mib"]),
        categories=dict(_categories(members, tallies, pairs)),
    )


def pooled(samples: Sequence[Sample]) -> dict[str, Any]:
    """Counters and rates over all rounds of `samples`, by the library's own definitions."""
    return _tally(samples).rates()


def _tally(samples: Sequence[Sample]) -> Tally:
    by_size: dict[int, list[tuple[tuple[int, ...], ...]]] = defaultdict(list)
    for sample in samples:
        by_size[len(sample.hist)].append(sample.hist)
    return Tally(
        _sum_hists([np.asarray(same, dtype=np.int64).sum(0) for same in by_size.values()]),
        drafted=sum([sample.drafted for sample in samples]),
        emitted=sum([sample.emitted for sample in samples]),
        target_forwards=sum([sample.target_forwards for sample in samples]),
        draft_forwards=sum([sample.draft_forwards for sample in samples]),
    )


def _together(tallies: Iterable[Tally]) -> Tally:
    tallies = list(tallies)
    _, *counts = zip(*tallies, strict=True) if tallies else ((),) * len(Tally._fields)
    return Tally(_sum_hists([tally.hist for tally in tallies]), *map(sum, counts))


def _sum_hists(hists: Sequence[np.ndarray]) -> np.ndarray:
    """The sum of square histograms, the small ones at the beginning of the large ones."""
    size = max(map(len, hists), default=1)
    total = np.zeros((size, size), dtype=np.int64)
    for hist in hists:
        total[: len(hist), : len(hist)] += hist
    return total


def spread(values: Sequence[float | int | None], unit: float = 1.0) -> Spread:
    """Mean, median, standard deviation, extremes of the values that are there, times `unit`."""
    # What is not there becomes not a number.
    found = unit * np.asarray(values, dtype=float)
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
    return _speedup(_pairs(samples, _plain(plain)))


def _pairs(samples: Sequence[Sample], plain: Plain) -> list[tuple[str, str, float, float]]:
    """Category, prompt, speed and speed of plain decoding of what has both speeds."""
    return [
        (sample.category, sample.prompt_id, sample.tokens_per_sec, slow)
        for sample in samples
        if sample.tokens_per_sec and (slow := plain.speeds.get(sample.pair))
    ]


def _speedup(pairs: Sequence[tuple[str, str, float, float]]) -> Speedup | None:
    if not pairs:
        return None
    _, prompts, fast, slow = zip(*pairs, strict=True)
    place = {prompt: index for index, prompt in enumerate(dict.fromkeys(prompts))}
    codes = [place[prompt] for prompt in prompts]
    logs = np.log(np.asarray(fast) / np.asarray(slow))
    units = np.bincount(codes, logs) / np.bincount(codes)
    low, high = interval(units.tolist())
    return Speedup(
        ratio=math.exp(units.mean()),
        low=None if low is None else math.exp(low),
        high=None if high is None else math.exp(high),
        of_means=sum(fast) / sum(slow),
        prompts=len(units),
        pairs=len(pairs),
    )


def interval(units: Sequence[float]) -> tuple[float | None, float | None]:
    """95 % bootstrap interval of the mean of independent units: bias-corrected and accelerated (scipy), always with the
    same resamples."""
    if len(units) < _FEWEST_UNITS:
        return None, None
    values = np.asarray(units, dtype=float)
    if values.min() == values.max():
        return float(values[0]), float(values[0])
    # Importing it costs half a second.
    from scipy.stats import bootstrap

    found = bootstrap(
        (values,),
        np.mean,
        confidence_level=_CONFIDENCE,
        n_resamples=_RESAMPLES,
        batch=max(1, _AT_ONCE // len(units)),
        method="BCa" if len(units) <= 1000 else "percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(found.low), float(found.high)


def _plain(samples: Sequence[Sample]) -> Plain:
    good = [(sample.pair, sample) for sample in samples if sample.success]
    return Plain(
        {pair: sample.tokens_per_sec for pair, sample in good if sample.tokens_per_sec},
        {pair: sample.tokens for pair, sample in good},
    )


def _categories(
    members: Mapping[str, Sequence[Sample]],
    tallies: Mapping[str, Tally],
    pairs: Sequence[tuple[str, str, float, float]],
) -> Iterator[tuple[str, CategorySummary]]:
    paired = defaultdict(list)
    for pair in pairs:
        paired[pair[0]].append(pair)
    for name, those in members.items():
        counts = tallies[name].rates()
        yield (
            name,
            CategorySummary(
                len(those),
                spread([sample.tokens_per_sec for sample in those]).mean,
                counts["acceptance_rate"],
                counts["mean_accepted_length"],
                _speedup(paired[name]),
            ),
        )


def _must_equal(cell: CellInfo) -> bool:
    """Greedy and coupled decoding choose the same token whatever was drafted; others only draw from the same law."""
    return not cell.is_baseline and (cell.temperature == 0 or cell.policy == "coupled")


def _identical(samples: Sequence[Sample], plain: Plain) -> float | None:
    same = [sample.tokens == plain.tokens[sample.pair] for sample in samples if sample.pair in plain.tokens]
    return sum(same) / len(same) if same else None


def _largest(sizes: Iterable[Mapping[str, float] | None]) -> dict[str, float]:
    """The largest size of each name."""
    known = [size for size in sizes if size]
    return {name: max(found) for name in MEMORY if (found := [size[name] for size in known if name in size])}


def _sum(seconds: Iterable[float | None]) -> float:
    return math.fsum(second for second in seconds if second)

"""From samples to figures, on rows made by hand."""

import math
from typing import Any

import numpy as np
import pytest

from specdec.sweep.conventions import spec_bench, spec_bench_compat, speed_bench, vllm
from specdec.sweep.samples import CellInfo, Sample
from specdec.sweep.stats import interval, paired_speedup, spread, summarize_cell
from specdec.sweep.summary import columns
from specdec.sweep.tables import memory_table

CELL = CellInfo("a", "a", "run", "m", "ngram", "greedy", "fixed:k=2", 2, 0.0, 9, 1, 0, "cpu", "float32", False)


def sample(prompt: str = "0", speed: float = 10.0, **values: Any) -> Sample:
    defaults: dict[str, Any] = dict.fromkeys(Sample._fields)
    defaults |= {
        "cell": "a",
        "baseline": "plain",
        "is_baseline": False,
        "success": True,
        "iteration": 0,
        "prompt_id": prompt,
        "category": "c",
        "turn": 0,
        "emitted": 6,
        "rounds": 4,
        "drafted": 5,
        "accepted": 2,
        "target_forwards": 5,
        "draft_forwards": 0,
        # One round without a draft, one with one draft, two with two: 0 of 1, 0 of 2 and 2 of 2 accepted.
        "hist": ((1, 0, 0), (1, 0, 0), (1, 0, 1)),
        "alpha_positions": 0,
        "tokens_per_sec": float(speed),
        "wall_s": 6 / speed,
        "shared_machine": False,
        "tokens": 1,
    }
    return Sample(**{**defaults, **values})


def test_memory_is_the_largest_of_all_samples() -> None:
    sizes = [{"rss_peak": 5.0, "reserved_peak": 2.0}, None, {"rss_peak": 7.0}]
    found = summarize_cell(CELL, [sample(memory_mib=size) for size in sizes], [])
    assert found.memory_mib == {"rss_peak": 7.0, "reserved_peak": 2.0}
    assert columns(found)["memory_rss_peak_mib"] == 7.0
    assert columns(found)["memory_allocated_mib"] is None
    assert memory_table([found]) == (["MiB", "process peak", "reserved peak"], [["a", "7", "2"]])
    assert memory_table([summarize_cell(CELL, [sample()], [])])[1] == []


def test_spread_has_the_usual_moments() -> None:
    found = spread([1.0, None, 2.0, 6.0])
    assert found[:3] == (3, 3.0, 2.0)
    assert found.std == pytest.approx(np.std([1, 2, 6], ddof=1))
    assert (found.min, found.max) == (1.0, 6.0)
    assert spread([None]).mean is None
    assert spread([4.0]).std == 0


def test_speedup_pairs_by_prompt_and_iteration() -> None:
    plain = [sample("a", 10, iteration=i) for i in (0, 1)] + [sample("b", 1)]
    fast = [sample("a", 20, iteration=0), sample("a", 80, iteration=1), sample("b", 1), sample("unpaired", 99)]
    found = paired_speedup(fast, plain)
    assert found is not None
    # Prompt a: geometric mean of 2 and 8; prompt b: 1. Repetitions of a prompt count as one.
    assert found.ratio == pytest.approx(math.sqrt(4 * 1))
    assert (found.prompts, found.pairs) == (2, 3)
    assert found.of_means == pytest.approx(101 / 21)
    assert found.low is None
    assert paired_speedup(fast, []) is None


def test_interval_covers_the_mean_and_is_the_same_every_time() -> None:
    units = np.random.default_rng(1).normal(0.3, 0.1, 40)
    low, high = interval(units.tolist())
    assert low is not None
    assert high is not None
    assert low < units.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * units.std(ddof=1) / math.sqrt(40), rel=0.25)
    assert interval(units.tolist()) == (low, high)
    assert interval([1.0] * 9) == (1.0, 1.0)


def test_interval_has_its_coverage() -> None:
    draw = np.random.default_rng(2)
    found = [interval(draw.normal(0, 1, 20).tolist()) for _ in range(60)]
    covered = sum(low is not None and high is not None and low <= 0 <= high for low, high in found)
    assert covered >= 50


def test_summary_pools_rounds_and_counts_failures() -> None:
    rows = [sample("a"), sample("b"), sample("c", success=False, tokens_per_sec=None)]
    summary = summarize_cell(CELL, rows, [sample("a", 5), sample("b", 5, tokens=2)])
    assert (summary.n, summary.failures) == (3, 1)
    assert summary.counts["rounds"] == 8
    assert summary.counts["acceptance_rate"] == pytest.approx(4 / 10)
    assert summary.counts["mean_accepted_length"] == pytest.approx(12 / 8)
    assert summary.counts["per_position"] == [pytest.approx(1 / 3), pytest.approx(1 / 2)]
    assert summary.speedup is not None
    assert summary.speedup.ratio == pytest.approx(2)
    assert summary.identical == 0.5


def test_conventions_are_projections_of_the_histogram() -> None:
    rows = [sample("a"), sample("b", category="d")]
    found = vllm(rows, [])
    # Rounds without a draft do not count.
    assert found["spec_decode_num_drafts"] == 6
    assert found["spec_decode_acceptance_length"] == pytest.approx(1 + 4 / 6)
    assert found["spec_decode_acceptance_rate"] == pytest.approx(40)
    assert found["spec_decode_per_position_acceptance_rates"] == [pytest.approx(1 / 3), pytest.approx(1 / 3)]
    turns = [sample("a", 10), sample("a", 30, turn=1)]
    bench = spec_bench(turns, [sample("a", 5)])
    assert bench["mean_accepted_tokens"] == pytest.approx(1.5)
    assert bench["tokens_per_second"] == pytest.approx(12 / (0.6 + 0.2))
    assert bench["speedup"] == pytest.approx(15 / 5)
    assert speed_bench(rows, [])["conditional_acceptance_rate"] == [pytest.approx(1 / 3), 1.0]


def test_spec_bench_compat_counts_only_the_plain_answers_anew() -> None:
    # The script counts 3 tokens where 6 were decoded: plain decoding looks half as fast, the method twice.
    plain = [sample("a", 5, cell="plain"), sample("b", 5, cell="plain", success=False)]
    found = spec_bench_compat([sample("a", 10)], plain, {("plain", (0, "a", 0)): 3})
    assert found["speedup"] == pytest.approx(2)
    assert found["speedup_retokenised"] == pytest.approx(4)

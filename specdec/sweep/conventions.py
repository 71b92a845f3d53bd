"""The same rows under other systems' definitions; all are projections of `hist[k][j]` and the times.

`vllm`: its engine and `bench serve`. `spec-bench`: the benchmark's own `speed.py`. `speed-bench`: SPEED-Bench.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from specdec.sweep.journal import ROWS, read_rows
from specdec.sweep.samples import Pair, Run, Sample, used
from specdec.sweep.stats import pooled

# Tokens of an answer, by cell and sample.
Counts = Mapping[tuple[str, Pair], int]
COMPAT = "spec-bench; speedup_retokenised counts the tokens of plain decoding as its script does, from the text"


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


def spec_bench_compat(samples: Sequence[Sample], plain: Sequence[Sample], counts: Counts) -> dict[str, Any]:
    """`spec_bench`, and beside its `speedup` the one that the benchmark's script prints.

    `speed.py` takes the number of tokens that the method reports, and for plain decoding counts those of its answers
    anew, less one a turn (`len(tokenizer(answer).input_ids) - 1`). Where the count differs from what was decoded, its
    speedup is off by that much; `speedup` counts both sides alike.
    """
    recounted = [sample._replace(emitted=counts[sample.cell, sample.pair]) for sample in used(plain)]
    return {**spec_bench(samples, plain), "speedup_retokenised": spec_bench(samples, recounted)["speedup"]}


def retokenise(run: Run, tokenizers: Mapping[str, Callable[[str], Mapping[str, Any]]]) -> Counts:
    """How many tokens Spec-Bench's script counts in every answer of the plain cells. `tokenizers`: by cell."""
    return {
        (row["cell"], (row["iteration"], row["prompt_id"], row["turn"])): len(
            tokenizers[row["cell"]](row["completion_text"])["input_ids"]
        )
        - 1
        for row in read_rows(run.folder / ROWS)
        if row["is_baseline"] and row["success"]
    }


def plain_tokenizers(run: Run) -> dict[str, Any]:
    """The tokenizers of the plain cells, from the models that the manifest names; raises `ValueError` without one."""
    from specdec.sweep.bench import DRY_MODEL
    from specdec.target import load_tokenizer

    if run.manifest is None:
        raise ValueError(f"{run.name} has no MANIFEST.json, which names the tokenizer that --spec-bench-compat needs")
    config = run.manifest.config
    models = {cell["id"]: DRY_MODEL if config["dry_run"] else cell["model"] for cell in run.manifest.cells}
    found = {
        name: load_tokenizer(name, trust_remote_code=config["trust_remote_code"])
        for name in dict.fromkeys(models.values())
    }
    return {cell.id: found[models[cell.id]] for cell in run.cells if cell.is_baseline}


def speed_bench(samples: Sequence[Sample], plain: Sequence[Sample]) -> dict[str, Any]:
    """Acceptance length with the bonus token, and conditional acceptance by position."""
    counts = pooled(used(samples))
    return {
        "acceptance_length": counts["mean_accepted_length"],
        "conditional_acceptance_rate": counts["per_position_conditional"],
    }


Convention = Callable[[Sequence[Sample], Sequence[Sample]], dict[str, Any]]
CONVENTIONS: Mapping[str, Convention] = {"vllm": vllm, "spec-bench": spec_bench, "speed-bench": speed_bench}


def project(run: Run, convention: str, *, compat: bool = False) -> dict[str, dict[str, Any]]:
    """The figures of every cell of a run under a convention, by the cell's label. `compat`: `spec_bench_compat`."""
    function = CONVENTIONS[convention]
    if compat:
        function = partial(spec_bench_compat, counts=retokenise(run, plain_tokenizers(run)))
    return {
        cell.label: function(run.samples[cell.id], run.samples.get(run.samples[cell.id][0].baseline, []))
        for cell in run.cells
    }


def _question_speed(samples: Sequence[Sample]) -> float | None:
    tokens: dict[tuple[int, str], int] = defaultdict(int)
    seconds: dict[tuple[int, str], float] = defaultdict(float)
    for sample in samples:
        if sample.wall_s is None:
            continue
        question = (sample.iteration, sample.prompt_id)
        tokens[question] += sample.emitted
        seconds[question] += sample.wall_s
    speeds = [tokens[question] / seconds[question] for question in tokens if seconds[question]]
    return sum(speeds) / len(speeds) if speeds else None

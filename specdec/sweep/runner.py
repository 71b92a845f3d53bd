"""Running a sweep: every sample of every cell once, in an order that is fair to all cells, into a run folder."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from specdec.models.report import Progress, silent
from specdec.run import warm_up
from specdec.sweep.bench import Bench, Prepared, prepare
from specdec.sweep.config import Config, differences
from specdec.sweep.grid import Cell, expand
from specdec.sweep.journal import Journal
from specdec.sweep.manifest import (
    MANIFEST,
    build_manifest,
    changed_code,
    read_manifest,
    write_manifest,
    write_setting,
)
from specdec.sweep.measure import Sample, decode_samples, encode_sample
from specdec.sweep.prompts import Prompt, hash_prompts, load_prompts
from specdec.sweep.row import Key, Row, row_key

Answers = dict[Key, str | None]


class Plan(NamedTuple):
    """What a sweep is about to do: `total` samples, of which `done` are in the folder already."""

    cells: tuple[Cell, ...]
    prompts: tuple[Prompt, ...]
    total: int
    done: int
    torn: int


class Work(NamedTuple):
    """A batch of samples for a cell."""

    cell: int
    samples: tuple[Sample, ...]


def run_sweep(
    config: Config,
    folder: Path,
    *,
    environ: Mapping[str, str] | None = None,
    prompts: Sequence[Prompt] | None = None,
    costs: Mapping[str, Mapping[int, float]] | None = None,
    started: Callable[[Plan], None] | None = None,
    finished: Callable[[Row], None] | None = None,
    progress: Progress = silent,
) -> Plan:
    """Run what is missing of a sweep in `folder`, and return what there was to do.

    `started` hears the plan, then `finished` every new row, once it is on the disk. Whatever ends the process, the same
    call goes on behind the last row. `prompts` and `costs` stand for the configuration's own (`reproduce`). Raises
    `ValueError` for a folder that was made by another configuration, or other prompts or weights.
    """
    cells = expand(config)
    chosen = list(prompts) if prompts is not None else load_prompts(config.prompts, config.limit)
    with Journal(folder) as journal:
        stored = read_manifest(folder) if (folder / MANIFEST).is_file() else None
        answers: Answers = {row_key(row): _answer(row) for row in journal.rows()}
        if stored is None and answers:
            raise ValueError(f"{folder} holds rows and no {MANIFEST}; choose another folder")
        if stored is not None:
            _check_same(folder, stored.config, config.effective())
            _check_same(folder, {"prompts": stored.prompts_sha256}, {"prompts": hash_prompts(chosen)})
        known = costs if costs is not None else stored.costs if stored is not None else None
        bench = prepare(config, cells, costs=known, progress=progress)
        manifest = build_manifest(config, bench, chosen, environ=environ or {}, folder=folder)
        if stored is None:
            write_setting(folder, config, chosen)
            write_manifest(folder, manifest)
        else:
            _check_same(folder, _weights(stored.models_loaded), _weights(manifest.models_loaded))
            if (note := changed_code(stored, manifest)) is not None:
                write_manifest(folder, stored.model_copy(update={"resumed": [*stored.resumed, note]}))
        total = config.iterations * len(cells) * sum(len(prompt.turns) for prompt in chosen)
        plan = Plan(tuple(cells), tuple(chosen), total, len(answers), journal.torn)
        if started is not None:
            started(plan)
        if plan.done < plan.total:
            _warm_up(bench, chosen, config, progress)
        for work in schedule(cells, chosen, config.iterations):
            _run(work, bench, config, answers, journal, finished)
    return plan


def schedule(cells: Sequence[Cell], prompts: Sequence[Prompt], iterations: int) -> Iterator[Work]:
    """All batches in order: the cells take turns on the same prompts (A B C, A B C), so that a machine that slows down
    or warms up does so for all of them. The cell that begins moves on by one every time."""
    widest = max(cell.batch_size for cell in cells)
    turn_of = 0
    for iteration in range(iterations):
        for begin in range(0, len(prompts), widest):
            block = list(enumerate(prompts))[begin : begin + widest]
            for turn in range(max(len(prompt.turns) for _, prompt in block)):
                for place in range(len(cells)):
                    index = (place + turn_of) % len(cells)
                    size = cells[index].batch_size
                    there = [Sample(at, prompt, turn, iteration) for at, prompt in block if turn < len(prompt.turns)]
                    for first in range(0, len(there), size):
                        yield Work(index, tuple(there[first : first + size]))
                turn_of += 1


def _run(
    work: Work,
    bench: Bench,
    config: Config,
    answers: Answers,
    journal: Journal,
    finished: Callable[[Row], None] | None,
) -> None:
    """Decode a batch unless all its rows are there. A batch of which some are missing is decoded whole, so that it is
    the same batch, and only the missing rows are added."""
    prepared = bench.cells[work.cell]
    keys = [(prepared.cell.id, sample.iteration, sample.prompt.id, sample.turn) for sample in work.samples]
    if all(key in answers for key in keys):
        return
    samples = [_with_answers(sample, prepared.cell.id, answers) for sample in work.samples]
    rows = [row for row in decode_samples(prepared, samples, config) if row.key not in answers]
    journal.append([row.model_dump_json() for row in rows])
    for row in rows:
        answers[row.key] = row.completion_text if row.success else None
        if finished is not None:
            finished(row)


def _with_answers(sample: Sample, cell: str, answers: Answers) -> Sample:
    """The sample behind the answers that its own cell gave to the turns before; a turn that failed left none."""
    earlier = [answers.get((cell, sample.iteration, sample.prompt.id, turn)) for turn in range(sample.turn)]
    return sample._replace(earlier=tuple(answer or "" for answer in earlier))


def _warm_up(bench: Bench, prompts: Sequence[Prompt], config: Config, progress: Progress) -> None:
    """A few rounds of every cell that nobody counts, `warmup` times; a cell that cannot run says so in its rows."""
    for turn in range(config.warmup):
        for index, prepared in enumerate(bench.cells):
            progress("warming up", turn * len(bench.cells) + index, config.warmup * len(bench.cells))
            _warm_up_cell(prepared, prompts[0], config)


def _warm_up_cell(prepared: Prepared, prompt: Prompt, config: Config) -> None:
    try:
        tokens = encode_sample(prepared, Sample(0, prompt, 0, 0), config)
        warm_up(prepared.job._replace(prompts=[tokens] * prepared.cell.batch_size))
    except Exception:
        # The same failure comes again with the first sample, and is recorded there.
        return


def _answer(row: Mapping[str, Any]) -> str | None:
    return str(row["completion_text"]) if row["success"] else None


def _weights(models: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {f"weights of {name}": model["file_hashes"] for name, model in models.items()}


def _check_same(folder: Path, stored: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    found = differences(stored, now)
    if found:
        raise ValueError(f"{folder} was made by another sweep ({'; '.join(found)}); choose another folder for this one")

"""Running a sweep: every sample of every cell once, in an order that is fair to all cells, into a run folder."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from specdec.models.report import Progress, silent
from specdec.run import warm_up
from specdec.sweep.bench import Bench, Prepared, prepare
from specdec.sweep.config import Config, differences
from specdec.sweep.contexts import Context, read_contexts
from specdec.sweep.detailed import profile_cell, read_operations, write_operations
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
from specdec.sweep.traces import list_traces, trace_file
from specdec.trace.records import Trace, write_trace

Answers = Mapping[Key, str | None]


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


class Done(NamedTuple):
    """What came of a batch. `contexts`: of its rows. `traces`: by the key of their row, where the configuration asks
    for them."""

    rows: list[Row]
    contexts: list[Context]
    traces: list[tuple[Key, Trace]]


# What decodes batches: it takes the parts of all cells, the configuration, the prompts, the batches in order, and the
# answers that are stored, to which every batch it yields is added before the next is asked for.
Execute = Callable[[Bench, Config, Sequence[Prompt], Iterable[Work], Answers], Iterator[Done]]


def run_here(
    bench: Bench,
    config: Config,
    prompts: Sequence[Prompt],
    works: Iterable[Work],
    answers: Answers,
    progress: Progress = silent,
) -> Iterator[Done]:
    """Decode what is missing of the batches one after the other, in this process."""
    missing = (work for work in works if not is_done(work, bench.cells[work.cell].cell, answers))
    first = next(missing, None)
    if first is None:
        return
    for turn in range(config.warmup):
        for index, prepared in enumerate(bench.cells):
            progress("warming up", turn * len(bench.cells) + index, config.warmup * len(bench.cells))
            warm_up_cell(prepared, prompts[0], config)
    for work in chain([first], missing):
        yield decode_work(bench.cells[work.cell], work, config, answers)


def run_sweep(
    config: Config,
    folder: Path,
    *,
    environ: Mapping[str, str] | None = None,
    prompts: Sequence[Prompt] | None = None,
    costs: Mapping[str, Mapping[int, float]] | None = None,
    execute: Execute | None = None,
    started: Callable[[Plan], None] | None = None,
    finished: Callable[[Row], None] | None = None,
    progress: Progress = silent,
) -> Plan:
    """Run what is missing of a sweep in `folder`, and return what there was to do.

    `started` hears the plan, then `finished` every new row, once it is on the disk, which it gets to while the next
    batch is decoded. Whatever ends the process, the same call goes on behind the last row. `prompts` and `costs` stand
    for the configuration's own (`reproduce`). `execute`: what decodes, in place of this process
    (`specdec.sweep.cluster`). Raises `ValueError` for a folder that was made by another configuration, or other prompts
    or weights.
    """
    cells = expand(config)
    chosen = list(prompts) if prompts is not None else load_prompts(config.prompts, config.limit)
    with Journal(folder) as journal:
        stored = read_manifest(folder) if (folder / MANIFEST).is_file() else None
        answers = {row_key(row): _answer(row) for row in journal.rows()}
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
        known_contexts = set(read_contexts(folder))
        total = config.iterations * len(cells) * sum(len(prompt.turns) for prompt in chosen)
        plan = Plan(tuple(cells), tuple(chosen), total, len(answers), journal.torn)
        if started is not None:
            started(plan)
        if config.detailed_metrics:
            _record_operations(folder, bench, chosen[0], config, progress)
        run = execute or partial(run_here, progress=progress)
        begun: list[tuple[Future[None], list[Row]]] = []

        def settle() -> None:
            """Wait for what was begun to be written, and tell of it."""
            while begun:
                written, rows = begun.pop()
                written.result()
                for row in rows:
                    if finished is not None:
                        finished(row)

        for done in run(bench, config, chosen, schedule(cells, chosen, config.iterations), answers):
            for key, trace in done.traces:
                # Before its row: a row that is there has its trace.
                write_trace(trace, trace_file(folder, *key))
            # A batch of which some rows were there is decoded whole, and a worker that is lost decodes twice.
            rows = [row for row in done.rows if row.key not in answers]
            fresh = {context.id: context for context in done.contexts if context.id not in known_contexts}
            lines = [row.model_dump_json() for row in rows], [context.line() for context in fresh.values()]
            # The rows before are on the disk before these are begun, which keeps an order and ends the run at an error.
            settle()
            begun.append((journal.append(*lines), rows))
            known_contexts |= fresh.keys()
            answers |= {row.key: answer_of(row) for row in rows}
        settle()
        if config.trace:
            stored = read_manifest(folder)
            write_manifest(folder, stored.model_copy(update={"artifacts": stored.artifacts | list_traces(folder)}))
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


def is_done(work: Work, cell: Cell, answers: Answers) -> bool:
    """Whether every row of a batch is there."""
    return all(_key(cell, sample) in answers for sample in work.samples)


def decode_work(prepared: Prepared, work: Work, config: Config, answers: Answers) -> Done:
    """Decode a batch whole, also when some of its rows are there, so that it is the same batch."""
    samples = [_with_answers(sample, prepared.cell.id, answers) for sample in work.samples]
    traces: list[tuple[Key, Trace]] = []

    def traced(sample: Sample, trace: Trace) -> None:
        traces.append((_key(prepared.cell, sample), trace))

    decoded = decode_samples(prepared, samples, config, traced)
    return Done([one.row for one in decoded], [one.context for one in decoded], traces)


def _key(cell: Cell, sample: Sample) -> Key:
    return (cell.id, sample.iteration, sample.prompt.id, sample.turn)


def _with_answers(sample: Sample, cell: str, answers: Answers) -> Sample:
    """The sample behind the answers that its own cell gave to the turns before; a turn that failed left none."""
    earlier = [answers.get((cell, sample.iteration, sample.prompt.id, turn)) for turn in range(sample.turn)]
    return sample._replace(earlier=tuple(answer or "" for answer in earlier))


def warm_up_cell(prepared: Prepared, prompt: Prompt, config: Config) -> None:
    """A few rounds that nobody counts; a cell that cannot run says so in its rows."""
    # The same failure comes again with the first sample, and is recorded there.
    with suppress(Exception):
        tokens = encode_sample(prepared, Sample(0, prompt, 0, 0), config)
        warm_up(prepared.job._replace(prompts=[tokens] * prepared.cell.batch_size))


def _record_operations(folder: Path, bench: Bench, prompt: Prompt, config: Config, progress: Progress) -> None:
    """Profile a few rounds of every cell that has none in the folder, apart from the rounds that are measured."""
    known = read_operations(folder)
    for place, prepared in enumerate(bench.cells):
        if prepared.cell.id not in known:
            progress("profiling", place, len(bench.cells))
            warm_up_cell(prepared, prompt, config)
            # What fails here fails again with the first sample, and is recorded there.
            with suppress(Exception):
                known[prepared.cell.id] = profile_cell(prepared, prompt, config)
    write_operations(folder, known)


def answer_of(row: Row) -> str | None:
    """What later turns see of a row; a turn that failed left nothing."""
    return row.completion_text if row.success else None


def _answer(row: Mapping[str, Any]) -> str | None:
    return str(row["completion_text"]) if row["success"] else None


def _weights(models: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {f"weights of {name}": model["file_hashes"] for name, model in models.items()}


def _check_same(folder: Path, stored: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    found = differences(stored, now)
    if found:
        raise ValueError(f"{folder} was made by another sweep ({'; '.join(found)}); choose another folder for this one")

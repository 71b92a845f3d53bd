"""Reading rows back, as little of each as figures need: a hundred thousand rows are a hundred megabytes."""

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from pydantic_core import SchemaValidator, core_schema

from specdec.sweep.journal import ROWS, read_rows
from specdec.sweep.manifest import MANIFEST, Manifest, read_manifest

# Iteration, prompt, turn.
Pair = tuple[int, str, int]


class Sample(NamedTuple):
    """A row without its texts. `tokens`: hash of the new tokens, to compare outputs. Fields are those of `Row`.

    Times that were measured while cells shared a machine are `None`: no figure is made of them.
    """

    cell: str
    baseline: str
    is_baseline: bool
    success: bool
    iteration: int
    prompt_id: str
    category: str
    turn: int
    emitted: int
    rounds: int
    drafted: int
    accepted: int
    target_forwards: int
    draft_forwards: int
    hist: tuple[tuple[int, ...], ...]
    alpha: float | None
    alpha_positions: int
    tokens_per_sec: float | None
    time_to_first_token_s: float | None
    per_token_latency_s: float | None
    wall_s: float | None
    prefill_s: float | None
    draft_s: float | None
    verify_s: float | None
    accept_s: float | None
    other_s: float | None
    memory_mib: dict[str, float] | None
    shared_machine: bool
    tokens: int

    @property
    def pair(self) -> Pair:
        """What it shares with the plain sample it is compared with."""
        return (self.iteration, self.prompt_id, self.turn)


class CellInfo(NamedTuple):
    """A cell as its rows describe it. `label`: its name, with the run's when there are several."""

    id: str
    label: str
    run: str
    model: str
    drafter: str
    policy: str
    controller: str
    k: int | None
    temperature: float
    max_new_tokens: int
    batch_size: int
    seed: int
    device: str
    dtype: str
    is_baseline: bool


class Run(NamedTuple):
    """Rows of one folder, by cell, in the order of the manifest."""

    name: str
    folder: Path
    manifest: Manifest | None
    synthetic: bool
    cells: tuple[CellInfo, ...]
    samples: dict[str, list[Sample]]


def read_run(folder: Path) -> Run:
    """The rows of a run folder, or of a lone `rows.jsonl`; raises `ValueError` when there are none or they mix
    synthetic and real rows."""
    file = folder if folder.is_file() else folder / ROWS
    folder = file.parent
    if not file.is_file():
        raise ValueError(f"{folder} is no run folder: it has no {ROWS}")
    manifest = read_manifest(folder) if (folder / MANIFEST).is_file() else None
    samples: dict[str, list[Sample]] = {}
    cells: dict[str, CellInfo] = {}
    kinds: set[bool] = set()
    hists: dict[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]] = {}
    texts: dict[str, str] = {}
    try:
        for row in read_rows(file, _parse):
            kinds.add(bool(row["synthetic"]))
            sample = _sample(row, hists, texts)
            if sample.cell not in cells:
                cells[sample.cell] = _cell(row, folder.name)
            samples.setdefault(sample.cell, []).append(sample)
    except KeyError as error:
        raise ValueError(f"{file} has a row without {error}; it was not written by this version of specdec") from error
    if not samples:
        raise ValueError(f"{file} holds no rows yet; run the sweep")
    if len(kinds) > 1:
        raise ValueError(f"{file} mixes synthetic and real rows; no figure can be made of both")
    order = [str(cell["id"]) for cell in manifest.cells] if manifest is not None else list(cells)
    known = [cells[name] for name in order if name in cells]
    return Run(folder.resolve().name, folder, manifest, kinds.pop(), tuple(known), samples)


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Several runs to be shown side by side, their cells labelled with the run; refuses synthetic among real ones, and
    one folder given twice. Folders of the same name are called by as much of their paths as tells them apart."""
    places = [folder.resolve() for folder in folders]
    if len(set(places)) < len(places):
        raise ValueError("a run is given twice; name each folder once")
    runs = [read_run(folder)._replace(name=name) for folder, name in zip(folders, _tell_apart(places), strict=True)]
    if len({run.synthetic for run in runs}) > 1:
        names = ", ".join(run.name for run in runs if run.synthetic)
        raise ValueError(f"{names} is synthetic (a dry run) and is never shown among real runs; report it alone")
    if len(runs) == 1:
        return runs
    return [
        run._replace(cells=tuple(cell._replace(run=run.name, label=f"{run.name}: {cell.label}") for cell in run.cells))
        for run in runs
    ]


def _tell_apart(places: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths of run folders that differ, all with as many parts."""
    folders = [place.parent if place.is_file() else place for place in places]
    for parts in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-parts:]) for folder in folders]
        if len(set(names)) == len(names):
            break
    return names


@contextmanager
def uncollected() -> Iterator[None]:
    """Without Python's search for cycles: rows hold none, and looking for them in a hundred thousand takes a third of
    the time of a report."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


def used(samples: Iterable[Sample]) -> list[Sample]:
    """The samples that succeeded."""
    return [sample for sample in samples if sample.success]


def columns(samples: Sequence[Sample]) -> dict[str, tuple[Any, ...]]:
    """The samples by field."""
    return dict(zip(Sample._fields, zip(*samples, strict=True) if samples else [()] * len(Sample._fields), strict=True))


def _sample(row: dict[str, Any], hists: dict[Any, Any], texts: dict[str, str]) -> Sample:
    # Rows repeat their names and histograms; one object each is enough.
    for name in ("cell", "baseline", "prompt_id", "category"):
        row[name] = texts.setdefault(row[name], row[name])
    hist = tuple(map(tuple, row["hist"]))
    row["hist"] = hists.setdefault(hist, hist)
    if row["shared_machine"]:
        row.update(_UNTIMED)
    return Sample._make((*_fields(row), hash(tuple(row["completion_token_ids"]))))


def _cell(row: dict[str, Any], run: str) -> CellInfo:
    return CellInfo(row["cell"], row["cell"], run, **{name: row[name] for name in _CELL})


_fields: Callable[[dict[str, Any]], tuple[Any, ...]] = itemgetter(*Sample._fields[:-1])
_CELL = tuple(name for name in CellInfo._fields if name not in ("id", "label", "run"))
_UNTIMED = dict.fromkeys(("tokens_per_sec", *(name for name in Sample._fields if name.endswith("_s"))))
_NEEDED = {*Sample._fields[:-1], *_CELL, "synthetic", "completion_token_ids"}
# Objects are made of the needed fields only, which saves two fifths of the time of reading everything.
_parse = SchemaValidator(
    core_schema.typed_dict_schema(
        {name: core_schema.typed_dict_field(core_schema.any_schema(), required=False) for name in _NEEDED},
        extra_behavior="ignore",
    )
).validate_json

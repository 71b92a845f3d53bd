"""Running a sweep again from its manifest, and saying sample by sample whether the tokens are the same."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from specdec.models.report import Progress, silent
from specdec.sweep.config import parse_config
from specdec.sweep.contexts import read_contexts
from specdec.sweep.journal import ROWS, read_rows
from specdec.sweep.manifest import CONFIG, PROMPTS, read_manifest
from specdec.sweep.prompts import hash_prompts, load_prompts
from specdec.sweep.row import Key, Row, row_key
from specdec.sweep.runner import Plan, run_sweep


class Comparison(NamedTuple):
    """A sample of the stored run and of the new one. `same`: outcome and tokens are identical. `ratio`: new wall time /
    stored. `where`: what is known about the first difference, in one sentence."""

    key: Key
    same: bool
    ratio: float | None
    where: str | None


def reproduce_run(
    stored: Path,
    folder: Path,
    *,
    started: Callable[[Plan], None] | None = None,
    finished: Callable[[Row], None] | None = None,
    progress: Progress = silent,
) -> list[Comparison]:
    """Run what `stored` says again into `folder`, and compare every sample that both have.

    The configuration, the prompts and the measured costs are the stored ones. Raises `ValueError` when prompts or
    weights are others than those of the manifest.
    """
    manifest = read_manifest(stored)
    config = parse_config(manifest.config, str(stored / CONFIG))
    prompts = load_prompts(str(stored / PROMPTS))
    if hash_prompts(prompts) != manifest.prompts_sha256:
        raise ValueError(f"{stored / PROMPTS} was changed: its hash is not the manifest's; restore the file")
    before = {row_key(row): row for row in read_rows(stored / ROWS)}
    run_sweep(
        config,
        folder,
        prompts=prompts,
        costs=manifest.costs,
        started=started,
        finished=finished,
        progress=progress,
    )
    made = read_manifest(folder)
    weights = {name: model["file_hashes"] for name, model in manifest.models_loaded.items()}
    for name, model in made.models_loaded.items():
        if weights.get(name) != model["file_hashes"]:
            raise ValueError(f"the weights of {name} are not those of {stored}: their hashes differ")
    after = {row_key(row): row for row in read_rows(folder / ROWS)}
    explain = _explainer(stored, manifest.config)
    return list(_compare(before, after, explain))


def _compare(
    before: Mapping[Key, Mapping[str, Any]],
    after: Mapping[Key, Mapping[str, Any]],
    explain: Callable[[Mapping[str, Any], Mapping[str, Any]], str],
) -> Iterator[Comparison]:
    for key, old in before.items():
        new = after.get(key)
        if new is None:
            yield Comparison(key, False, None, "the new run has no such sample")
            continue
        fields = ("success", "context", "completion_token_ids", "stop_reason")
        same = all(old[name] == new[name] for name in fields)
        ratio = new["wall_s"] / old["wall_s"] if old["wall_s"] and new["wall_s"] else None
        yield Comparison(key, same, ratio, None if same else explain(old, new))


def _explainer(folder: Path, config: Mapping[str, Any]) -> Callable[[Mapping[str, Any], Mapping[str, Any]], str]:
    """What tells where two rows part; it loads a model only when it must."""
    loaded: dict[tuple[str, str], Any] = {}

    def explain(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
        if old["success"] != new["success"]:
            failed, when = (old, "failed before") if not old["success"] else (new, "fails now")
            return f"{when}: {failed['error']}"
        if old["context"] != new["context"]:
            return "the prompts' tokens differ: other tokenizer, template, or answers to earlier turns"
        one, other = old["completion_token_ids"], new["completion_token_ids"]
        pairs = enumerate(zip(one, other, strict=False))
        place = next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))
        where = f"in round {round_of(place, old['accept_lengths'])}"
        if old["temperature"] > 0:
            return (
                f"{where}, outputs part at new token {place}; sampled with the same seed, so a probability moved "
                "or the algorithm changed"
            )
        from specdec.divergence import first_divergence
        from specdec.sampling import Sampling

        model = _load(config, old, loaded)
        sampling = Sampling(repetition_penalty=config["repetition_penalty"])
        given = read_contexts(folder)[old["context"]].prompt_token_ids
        found = first_divergence(model, given, one, other, sampling)
        return f"{where}, {found}" if found is not None else f"only the stop reason differs: {old['stop_reason']}"

    return explain


def round_of(place: int, accept_lengths: list[int]) -> int:
    """The round, from 1, that committed the new token at `place`."""
    end = 0
    for number, length in enumerate(accept_lengths, 1):
        end += length
        if place < end:
            return number
    return len(accept_lengths) + 1


def _load(config: Mapping[str, Any], row: Mapping[str, Any], loaded: dict[tuple[str, str], Any]) -> Any:
    from specdec.sweep.bench import prepare
    from specdec.sweep.grid import expand

    parsed = parse_config(config)
    cell = next(cell for cell in expand(parsed) if cell.id == row["baseline"])
    key = (cell.model, cell.dtype)
    if key not in loaded:
        loaded[key] = prepare(parsed, [cell]).cells[0].loaded.model
    return loaded[key]

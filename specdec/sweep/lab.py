"""Reading the earlier lab's result files, with the corrections that its stored rows allow.

Its tables rest on known faults: the requested K did not reach the controller, acceptance was averaged per row after a
clamp at 1, there was no plain baseline, and latency meant two things. What the rows hold is computed again; what they
do not hold is said to be unknown, not guessed.
"""

import csv
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

# Stored means are rounded, and means of rates differ a little from rates of sums.
_TOLERANCE = 0.02
_MISSING = "model names and revisions, K really used, token limit, prompts hash, seed, commit"


class LabLine(NamedTuple):
    """The samples of one requested `k`. `stated_*`: as the lab has it; the others again from its rows, `None` where it
    kept none. `used_k`: what every drafted count is a multiple of. `tokens_per_sec`: sum of tokens / sum of times."""

    k: int
    samples: int
    failures: int
    used_k: int | None
    stated_tokens_per_sec: float | None
    tokens_per_sec: float | None
    stated_acceptance: float | None
    acceptance: float | None
    latency_ms: float | None


class LabRun(NamedTuple):
    """One result file. `notes`: corrections and doubts, in sentences."""

    file: Path
    about: str
    lines: tuple[LabLine, ...]
    notes: tuple[str, ...]


def read_lab(folder: Path) -> list[LabRun]:
    """Every sweep result in `folder` (or the one file): JSON where there is one, else CSV; raises `ValueError` when
    there is none."""
    files = [folder] if folder.is_file() else sorted([*folder.rglob("*.json"), *folder.rglob("*.csv")])
    runs = [run for file in files if (run := _read(file)) is not None]
    detailed = {run.file.with_suffix("") for run in runs if run.file.suffix == ".json"}
    runs = [run for run in runs if run.file.suffix == ".json" or run.file.with_suffix("") not in detailed]
    if not runs:
        raise ValueError(f"{folder} holds no result of the lab: no sweep CSV, and no JSON with 'summary_results'")
    return runs


def _read(file: Path) -> LabRun | None:
    try:
        if file.suffix == ".csv":
            with file.open(newline="", encoding="utf-8") as lines:
                rows = list(csv.DictReader(lines))
            of_the_lab = rows and {"k", "tokens_per_sec_mean"} <= rows[0].keys() and "cell" not in rows[0]
            return _from_summary(file, rows) if of_the_lab else None
        stored = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {file} ({error.strerror})") from error
    except ValueError:
        return None
    if not isinstance(stored, dict) or not isinstance(stored.get("summary_results"), list):
        return None
    # Our own summaries have the lab's columns, but several cells with the same K.
    if "metric_definitions" in stored:
        return None
    return _from_json(file, stored)


def _from_json(file: Path, stored: Mapping[str, Any]) -> LabRun:
    details: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for row in stored.get("detailed_results") or []:
        details[int(row["k"])].append(row)
    if not details:
        return _from_summary(file, stored["summary_results"], stored.get("system_info") or {})
    summary = {int(float(line["k"])): line for line in stored["summary_results"]}
    lines = [_line(k, rows, summary.get(k, {})) for k, rows in sorted(details.items())]
    info = stored.get("system_info") or {}
    return LabRun(file, _about(info), tuple(lines), tuple(_notes(lines, details)))


def _from_summary(file: Path, rows: Sequence[Mapping[str, Any]], info: Mapping[str, Any] | None = None) -> LabRun:
    lines = [
        LabLine(
            int(float(row["k"])),
            int(_float(row.get("n_samples")) or 0),
            int(_float(row.get("n_failures")) or 0),
            None,
            _float(row.get("tokens_per_sec_mean")),
            None,
            _share(_float(row.get("acceptance_rate_mean"))),
            _ratio(_float(row.get("accepted_mean")), _float(row.get("proposed_mean"))),
            _float(row.get("latency_ms_mean")),
        )
        for row in rows
    ]
    notes = ["only means were kept: speeds cannot be computed again, acceptance only from the mean counts"]
    drafted = [value for row in rows if (value := _float(row.get("proposed_mean"))) is not None]
    if _same_for_all(drafted) and len({line.k for line in lines}) > 1:
        notes.append("every K drafted the same number of tokens: K did not reach the controller")
    about = info or (rows[0] if rows else {})
    return LabRun(file, _about(about), tuple(lines), (*notes, *_always(lines)))


def _line(k: int, rows: Sequence[Mapping[str, Any]], stated: Mapping[str, Any]) -> LabLine:
    good = [row for row in rows if row.get("success", True)]
    tokens = sum(int(row.get("completion_token_count") or 0) for row in good)
    seconds = sum((_float(row.get("latency_ms")) or 0.0) / 1000 for row in good)
    drafted = [int(row.get("proposed") or 0) for row in good]
    accepted = sum(int(row.get("accepted") or 0) for row in good)
    latencies = [value for row in good if (value := _float(row.get("latency_ms"))) is not None]
    return LabLine(
        k,
        len(rows),
        len(rows) - len(good),
        math.gcd(*drafted) or None,
        _float(stated.get("tokens_per_sec_mean")),
        tokens / seconds if tokens and seconds else None,
        _share(_float(stated.get("acceptance_rate_mean"))),
        _ratio(float(accepted), float(sum(drafted))),
        fmean(latencies) if latencies else None,
    )


def _notes(lines: Sequence[LabLine], details: Mapping[int, Sequence[Mapping[str, Any]]]) -> list[str]:
    notes = []
    for line in lines:
        if line.used_k is not None and line.used_k not in (1, line.k):
            notes.append(
                f"K = {line.k}: all drafted counts are multiples of {line.used_k}, so K = {line.used_k} was used"
            )
        if _far(line.stated_acceptance, line.acceptance):
            notes.append(
                f"K = {line.k}: acceptance was stated as {line.stated_acceptance:.1%}; "
                f"accepted / drafted over all rows is {line.acceptance:.1%}"
            )
        if _far(line.stated_tokens_per_sec, line.tokens_per_sec):
            notes.append(
                f"K = {line.k}: {line.stated_tokens_per_sec:.2f} tokens/s were stated; "
                f"all tokens by all seconds are {line.tokens_per_sec:.2f}"
            )
        over = sum(int(row.get("accepted") or 0) > int(row.get("proposed") or 0) for row in details[line.k])
        if over:
            notes.append(
                f"K = {line.k}: {over} rows accept more tokens than they drafted: bonus tokens were counted, "
                "so acceptance is an upper bound"
            )
    used = {line.used_k for line in lines}
    if len(lines) > 1 and len(used) == 1 and None not in used and used != {1}:
        notes.append("all requested K drafted alike: differences between their lines are noise")
    return [*notes, *_always(lines)]


def _always(lines: Sequence[LabLine]) -> list[str]:
    notes = [f"not recorded: {_MISSING}"]
    if all(line.k for line in lines):
        notes.append("there is no plain baseline (K = 0), so no speedup can be stated")
    return notes


def _about(info: Mapping[str, Any]) -> str:
    parts = [str(info[name]) for name in ("device_name", "device", "dtype", "pytorch_version") if info.get(name)]
    return " · ".join(dict.fromkeys(parts)) or "unknown machine"


def _same_for_all(values: Sequence[float]) -> bool:
    return len(values) > 1 and max(values) - min(values) <= _TOLERANCE * max(values)


def _far(stated: float | None, found: float | None) -> bool:
    return stated is not None and found is not None and abs(stated - found) > _TOLERANCE * max(abs(stated), abs(found))


def _ratio(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None


def _share(value: float | None) -> float | None:
    """A rate, whether it was written as 0.2 or as 20 (percent)."""
    return None if value is None else value / 100 if value > 1.5 else value


def _float(value: Any) -> float | None:
    try:
        found = float(value)
    except (TypeError, ValueError):
        return None
    return found if math.isfinite(found) else None

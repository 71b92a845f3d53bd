"""Rows for other programs: Parquet, CSV, Spec-Bench answer files, and the lab's profiler JSON."""

import csv
import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from itertools import islice
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from specdec.sweep.contexts import Context, whole_rows
from specdec.sweep.journal import ROWS, read_rows
from specdec.sweep.samples import Run

# Fields that hold names, and are written as JSON.
_JSON = ("round_seconds", "memory_mib")
# Rows held in memory at a time.
_CHUNK = 2000


def write_parquet(runs: Sequence[Run], file: Path) -> None:
    """All rows of all runs in one typed table, with the run's name as a column."""
    import pyarrow as pa
    from pyarrow import parquet

    schema = arrow_schema()
    with parquet.ParquetWriter(file, schema, compression="zstd") as writer:
        for run in runs:
            rows = whole_rows(run.folder)
            while chunk := list(islice(rows, _CHUNK)):
                table = [{**row, "run": run.name, **{name: json.dumps(row[name]) for name in _JSON}} for row in chunk]
                writer.write_table(pa.Table.from_pylist(table, schema=schema))


def arrow_schema() -> Any:
    """The columns of the Parquet table: the fields of `Row` and of its context; those of `_JSON` as text."""
    import pyarrow as pa

    from specdec.sweep.row import Row

    kinds = {"boolean": pa.bool_(), "integer": pa.int64(), "number": pa.float64(), "string": pa.string()}
    fields = [("run", pa.string())]
    for name, field in Row.model_json_schema()["properties"].items():
        options = field.get("anyOf", [field])
        kind = next(option for option in options if option.get("type") != "null")
        if name in _JSON:
            fields.append((name, pa.string()))
        elif kind["type"] == "array":
            items = kind["items"]
            inner = pa.list_(pa.int64()) if items["type"] == "array" else kinds[items["type"]]
            fields.append((name, pa.list_(inner)))
        elif name == "sample_seed":
            fields.append((name, pa.uint64()))
        else:
            fields.append((name, kinds[kind["type"]]))
    text, tokens = pa.string(), pa.list_(pa.int64())
    return pa.schema([*fields, ("prompt", text), ("prompt_text", text), ("prompt_token_ids", tokens)])


def write_rows_csv(runs: Sequence[Run], file: Path) -> None:
    """All rows as CSV; lists are JSON."""
    from specdec.sweep.row import Row

    with file.open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, ["run", *Row.model_fields, *Context._fields])
        writer.writeheader()
        for run in runs:
            for row in whole_rows(run.folder):
                nested = {name: value for name, value in row.items() if isinstance(value, list | tuple | dict)}
                as_json = {name: json.dumps(value) for name, value in nested.items()}
                writer.writerow({"run": run.name, **row, **as_json})


def write_spec_bench(run: Run, folder: Path) -> list[Path]:
    """Spec-Bench answer files, one a cell and iteration: what `evaluation/speed.py` of that benchmark reads.

    A question with a failed turn is left out. Keys that the benchmark does not know (`specdec_*`) it ignores.
    """
    folder.mkdir(parents=True, exist_ok=True)
    questions: dict[tuple[str, int], dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in read_rows(run.folder / ROWS):
        questions[row["cell"], row["iteration"]][row["prompt_id"]].append(_answer_part(row))
    several = len({iteration for _, iteration in questions}) > 1
    files = []
    for (cell, iteration), answers in questions.items():
        model = f"{_slug(cell)}{f'-{iteration + 1}' if several else ''}"
        file = folder / f"{model}.jsonl"
        lines = [
            _answer(run, model, name, parts) for name, parts in answers.items() if all(p["success"] for p in parts)
        ]
        lines.sort(key=lambda line: str(line["question_id"]).zfill(20))
        file.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
        files.append(file)
    return files


def write_profile(run: Run, file: Path) -> bool:
    """The lab's profiler JSON over every recorded round; `False` when no row has any (see `profile`)."""
    steps: list[dict[str, Any]] = []
    first: Mapping[str, Any] | None = None
    for row in read_rows(run.folder / ROWS):
        first = first or row
        for seconds in row.get("round_seconds") or []:
            steps.append(
                {
                    "step": len(steps),
                    "cell": row["cell"],
                    "draft_forward_time_ms": 1000 * seconds.get("draft", 0.0),
                    "verify_forward_time_ms": 1000 * seconds.get("verify", 0.0),
                    "acceptance_check_time_ms": 1000 * seconds.get("accept", 0.0),
                    "kv_append_time_ms": 1000 * seconds.get("cache", 0.0),
                    "sampling_time_ms": 1000 * seconds.get("sampling", 0.0),
                    "host_time_ms": 1000 * seconds.get("host", 0.0),
                    "total_time_ms": 1000 * seconds.get("total", 0.0),
                    "accepted_len": int(seconds["accepted"]),
                    "proposed_len": int(seconds["proposed"]),
                }
            )
    if first is None or not steps:
        return False
    models = run.manifest.models if run.manifest is not None else {}
    found: dict[str, Any] = {
        "synthetic": run.synthetic,
        "metadata": {
            "device": first["device"],
            "dtype": first["dtype"],
            "base_model": first["model"],
            "draft_model": models.get("draft"),
            "k": sorted({cell.k for cell in run.cells if cell.k is not None}),
            "max_tokens": first["max_new_tokens"],
        },
        "aggregated_metrics": {**_aggregates(steps), "total_steps": len(steps), "memory_stats": _memory()},
        "step_metrics": steps,
    }
    file.write_text(json.dumps(found) + "\n", encoding="utf-8")
    return True


def _aggregates(steps: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name in [name for name in steps[0] if name.endswith("_time_ms")]:
        values = [step[name] for step in steps]
        found |= {f"{name}_mean": fmean(values), f"{name}_std": stdev(values) if len(values) > 1 else 0.0}
    return found


def _memory() -> dict[str, float]:
    """What this process has used, in MiB, where the platform tells it."""
    import torch

    from specdec_kernels.memory import memory

    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    found = {f"{name}_mb": size for name, size in memory(device).items()}
    return {**found, "max_rss_mb": found["rss_peak_mb"]} if "rss_peak_mb" in found else found


_ANSWER_FIELDS = (
    "success",
    "category",
    "turn",
    "completion_text",
    "rounds",
    "emitted",
    "wall_s",
    "accept_lengths",
    "is_baseline",
    "finished_at",
)


def _answer_part(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in _ANSWER_FIELDS} | {"shared_machine": row.get("shared_machine", False)}


def _answer(run: Run, model: str, question: str, parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    turns = sorted(parts, key=lambda part: int(part["turn"]))
    number: int | str = int(question) if question.isdigit() else question
    return {
        "question_id": number,
        "category": turns[0]["category"],
        "answer_id": hashlib.sha256(f"{run.name}/{model}/{question}".encode()).hexdigest()[:22],
        "model_id": model,
        "choices": [
            {
                "index": 0,
                "turns": [turn["completion_text"] for turn in turns],
                "decoding_steps": [turn["rounds"] for turn in turns],
                "new_tokens": [turn["emitted"] for turn in turns],
                "wall_time": [turn["wall_s"] for turn in turns],
                "accept_lengths": list(_lengths(turns)),
            }
        ],
        "tstamp": datetime.fromisoformat(turns[-1]["finished_at"]).timestamp(),
        "specdec_synthetic": run.synthetic,
        "specdec_shared_machine": any(turn["shared_machine"] for turn in turns),
    }


def _lengths(turns: Sequence[Mapping[str, Any]]) -> Iterator[int]:
    for turn in turns:
        yield from turn["accept_lengths"]


def _slug(text: str) -> str:
    return re.sub(r"[^\w.=-]+", "-", text).strip("-")

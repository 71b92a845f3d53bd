"""`summary.csv` and `summary.json`: the lab's columns under their exact names, and what it lacked."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from specdec.sweep.contexts import whole_rows
from specdec.sweep.definitions import DEFINITIONS
from specdec.sweep.samples import Run
from specdec.sweep.stats import MEMORY, CellSummary, Spread, spread

# The lab's columns, in its order.
LAB_COLUMNS = (
    "k",
    "n_samples",
    "n_failures",
    "success_rate",
    "latency_ms_mean",
    "latency_ms_std",
    "tokens_per_sec_mean",
    "tokens_per_sec_std",
    "acceptance_rate_mean",
    "acceptance_rate_std",
    "kv_appended_tokens_mean",
    "kv_appended_tokens_std",
    "kv_append_time_ms_mean",
    "kv_append_time_ms_std",
    "proposed_mean",
    "proposed_std",
    "accepted_mean",
    "accepted_std",
    "device",
    "dtype",
)
# The lab's detailed row.
LAB_DETAILS = (
    "k",
    "iteration",
    "prompt_idx",
    "prompt_name",
    "prompt",
    "prompt_text",
    "completion_text",
    "full_text",
    "completion_token_count",
    "latency_ms",
    "tokens_per_sec",
    "acceptance_rate",
    "proposed",
    "accepted",
    "kv_appended_tokens",
    "kv_append_time_ms",
    "kv_append_enabled",
    "kv_append_backend",
    "text",
    "success",
    "device",
    "dtype",
    "batch_size",
)
_FAILURE = ("error", "error_type", "traceback")


def columns(summary: CellSummary) -> dict[str, Any]:
    """A cell as a line of the summary."""
    cell, speedup, counts = summary.cell, summary.speedup, summary.counts
    lab: dict[str, Any] = {
        "k": cell.k,
        "n_samples": summary.n,
        "n_failures": summary.failures,
        "success_rate": 1 - summary.failures / summary.n,
    }
    for name in ("latency_ms", "tokens_per_sec", "acceptance_rate"):
        lab |= _mean_std(name, getattr(summary, name))
    # Every new token is a slot of the cache, written inside the forward and not timed apart.
    lab |= _mean_std("kv_appended_tokens", summary.emitted) | _mean_std("kv_append_time_ms", spread([]))
    lab |= _mean_std("proposed", summary.proposed) | _mean_std("accepted", summary.accepted)
    lab |= {"device": cell.device, "dtype": cell.dtype}
    more: dict[str, Any] = {
        "run": cell.run,
        "cell": cell.id,
        "is_baseline": cell.is_baseline,
        "model": cell.model,
        "drafter": cell.drafter,
        "policy": cell.policy,
        "controller": cell.controller,
        "temperature": cell.temperature,
        "max_new_tokens": cell.max_new_tokens,
        "batch_size": cell.batch_size,
        "seed": cell.seed,
        "n_shared_machine": summary.shared,
        "speedup": speedup and speedup.ratio,
        "speedup_low": speedup and speedup.low,
        "speedup_high": speedup and speedup.high,
        "speedup_of_means": speedup and speedup.of_means,
        "speedup_pairs": speedup and speedup.pairs,
        "acceptance_rate": counts["acceptance_rate"],
        "mean_accepted_length": counts["mean_accepted_length"],
        "tokens_per_forward": counts["tokens_per_forward"],
        "alpha": summary.alpha,
        "identical_to_plain": summary.identical,
        **{name: counts[name] for name in ("rounds", "drafted", "accepted", "emitted")},
        **{name: counts[name] for name in ("target_forwards", "draft_forwards")},
        "per_position": counts["per_position"],
        "per_position_conditional": counts["per_position_conditional"],
        "hist": counts["hist"],
    }
    for name in ("tokens_per_sec", "latency_ms", "time_to_first_token_ms", "per_token_latency_ms"):
        found: Spread = getattr(summary, name)
        more |= {f"{name}_{part}": getattr(found, part) for part in ("mean", "median", "std", "min", "max")}
    more |= {f"{phase}_share": share for phase, share in summary.seconds.items()}
    more |= {f"memory_{name}_mib": summary.memory_mib.get(name) for name in MEMORY}
    return {**lab, **{name: value for name, value in more.items() if name not in lab}}


def write_csv(summaries: Sequence[CellSummary], file: Path, *, synthetic: bool) -> None:
    """`summary.csv`; lists are written as JSON, what does not apply is empty."""
    lines = [{**columns(summary), "synthetic": synthetic} for summary in summaries]
    with file.open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, list(lines[0]))
        writer.writeheader()
        for line in lines:
            writer.writerow(
                {name: json.dumps(value) if isinstance(value, list) else value for name, value in line.items()}
            )


def write_json(run: Run, summaries: Sequence[CellSummary], file: Path) -> None:
    """`summary.json` in the lab's layout; its detailed rows are made of `rows.jsonl` one by one."""
    manifest = run.manifest
    head = {
        "synthetic": run.synthetic,
        "system_info": manifest.system_info if manifest is not None else {},
        "summary_results": [columns(summary) for summary in summaries],
        "categories": {summary.cell.id: _categories(summary) for summary in summaries},
        "metric_definitions": dict(DEFINITIONS),
    }
    detailed: dict[str, Any] = {}
    with file.open("w", encoding="utf-8") as out:
        out.write(json.dumps(head, indent=1)[:-2] + ',\n "detailed_results": [')
        separator = "\n  "
        for row in whole_rows(run.folder):
            out.write(separator + json.dumps(_detail(row)))
            separator = ",\n  "
            if row.get("round_seconds"):
                detailed[_name(row)] = row["round_seconds"]
        out.write(f'\n ],\n "detailed_metrics": {json.dumps(detailed)}\n}}\n')


def _detail(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as the lab's detailed results have it, under its names."""
    text = row["completion_text"]
    lab = {
        **row,
        "prompt_name": row["prompt_id"],
        "full_text": row["prompt_text"] + text,
        "text": text,
        "completion_token_count": row["emitted"],
        "latency_ms": None if row["wall_s"] is None else 1000 * row["wall_s"],
        "proposed": row["drafted"],
        "kv_appended_tokens": row["emitted"],
        "kv_append_time_ms": None,
        "kv_append_enabled": True,
        "kv_append_backend": "in-place",
    }
    names = LAB_DETAILS if row["success"] else (*LAB_DETAILS, *_FAILURE)
    return {"cell": row["cell"], **{name: lab[name] for name in names}}


def _categories(summary: CellSummary) -> dict[str, Any]:
    return {
        name: {**part._asdict(), "speedup": part.speedup and part.speedup._asdict()}
        for name, part in summary.categories.items()
    }


def _mean_std(name: str, spread: Spread) -> dict[str, float | None]:
    return {f"{name}_mean": spread.mean, f"{name}_std": spread.std}


def _name(row: Mapping[str, Any]) -> str:
    return f"{row['cell']} / {row['prompt_id']} / turn {row['turn']} / iteration {row['iteration']}"

"""A run's derived files, all made from its rows: tables, figures and one page that needs nothing else."""

import base64
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from specdec.sweep import tables
from specdec.sweep.definitions import DEFINITIONS
from specdec.sweep.figures import draw_figures
from specdec.sweep.samples import Run
from specdec.sweep.stats import CellSummary, summarize_run
from specdec.sweep.summary import write_csv

_CAPTIONS = {
    "throughput_vs_k": "Tokens per second; bars: one standard deviation over samples; lines: plain decoding.",
    "speedup_vs_k": "Speedup over plain decoding, paired by prompt; bars: 95 % interval, from five prompts.",
    "acceptance_vs_k": "Accepted drafts / drafted tokens, all rounds pooled.",
    "per_position_acceptance": "Acceptance by position, for the deepest drafts of each drafter.",
    "category_speedup": "Speedup by category of prompts; bars: 95 % interval, from five prompts of a category.",
}


def write_report(runs: Sequence[Run], folder: Path) -> list[CellSummary]:
    """Write `summary.csv`, `results.md`, `results.tex`, `figures/` and `report.html` to `folder`; returns the
    summaries."""
    folder.mkdir(parents=True, exist_ok=True)
    summaries = [summary for run in runs for summary in summarize_run(run)]
    synthetic = runs[0].synthetic
    write_csv(summaries, folder / "summary.csv", synthetic=synthetic)
    for form, name in (("markdown", "results.md"), ("latex", "results.tex")):
        text = tables.render(summaries, form, synthetic=synthetic)  # type: ignore[arg-type]
        (folder / name).write_text(text, encoding="utf-8")
    drawn = draw_figures(summaries, folder / "figures", synthetic=synthetic)
    (folder / "report.html").write_text(page(runs, summaries, drawn), encoding="utf-8")
    return summaries


def page(runs: Sequence[Run], summaries: Sequence[CellSummary], drawn: Sequence[Path]) -> str:
    """`report.html`: tables, figures and manifests in one file that asks nothing of the network."""
    from jinja2 import Environment, StrictUndefined

    template = files("specdec.sweep").joinpath("templates/report.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    several = any(len(summary.categories) > 1 for summary in summaries)
    shown = [
        (
            "Acceptance by position",
            "in brackets: given that all positions before it were accepted",
            tables.positions_table,
        ),
        ("Where the time goes", "shares of the wall time; latency with its standard deviation", tables.times_table),
        ("Memory", DEFINITIONS["memory_mib"], tables.memory_table),
    ]
    if several:
        shown.insert(0, ("Speedup by category", "paired by prompt and iteration", tables.categories_table))
    return environment.from_string(template).render(
        title=" · ".join(run.manifest.name if run.manifest is not None else run.name for run in runs),
        synthetic=runs[0].synthetic,
        best=_best(summaries),
        facts=[_facts(run) for run in runs],
        compared=sum(not summary.cell.is_baseline for summary in summaries),
        results=tables.results_table(summaries),
        untimed=tables.untimed(summaries),
        others=[(title, note, make(summaries)) for title, note, make in shown],
        figures=[(path.stem, _CAPTIONS[path.stem], _embedded(path.with_suffix(".svg"))) for path in drawn],
        definitions=DEFINITIONS,
        manifests=[(run.name, _manifest_text(run)) for run in runs],
    )


def _best(summaries: Sequence[CellSummary]) -> dict[str, Any] | None:
    ranked = [
        (summary.speedup.ratio, summary)
        for summary in summaries
        if summary.speedup is not None and not summary.cell.is_baseline
    ]
    if not ranked:
        return None
    _, summary = max(ranked, key=lambda item: item[0])
    return {"label": summary.cell.label, "speedup": summary.speedup}


def _facts(run: Run) -> dict[str, str]:
    """What a reader must know to believe the numbers."""
    cells = list(run.cells)
    manifest = run.manifest

    def each(name: str) -> str:
        return ", ".join(dict.fromkeys(str(getattr(cell, name)) for cell in cells))

    rows = sum(map(len, run.samples.values()))
    facts = {
        "run": run.name,
        "model": each("model"),
        "type of the weights": each("dtype"),
        "device": each("device"),
        "temperature": each("temperature"),
        "new tokens at most": each("max_new_tokens"),
        "batch": each("batch_size"),
        "rows": f"{rows:,}",
    }
    if manifest is not None:
        git = manifest.git
        commit = f"{git['commit'][:10]}{' with changes' if git['dirty'] else ''}" if git else "not recorded"
        facts |= {
            "prompts": f"{manifest.num_prompts} ({manifest.prompts_sha256[:12]})",
            "iterations": str(manifest.iterations_per_k),
            "machine": str(manifest.system_info.get("device_name", "")),
            "made": manifest.export_created_at,
            "commit": commit,
        }
        if manifest.notices:
            facts["not available"] = "; ".join(manifest.notices)
    return facts


def _manifest_text(run: Run) -> str:
    if run.manifest is None:
        return "this run has no manifest"
    return json.dumps(run.manifest.model_dump(mode="json"), indent=1, ensure_ascii=False)


def _embedded(file: Path) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(file.read_bytes()).decode()

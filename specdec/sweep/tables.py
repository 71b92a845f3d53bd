"""Results as markdown, LaTeX (booktabs) and CSV."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from tabulate import tabulate

from specdec.sweep.definitions import DEFINITIONS
from specdec.sweep.stats import MEMORY, PHASES, CellSummary, Speedup, Spread
from specdec.sweep.summary import columns

Format = Literal["markdown", "latex", "csv"]
FORMATS: tuple[Format, ...] = ("markdown", "latex", "csv")
Table = tuple[list[str], list[list[str]]]

_SHOWN = ("speedup", "tokens_per_sec", "acceptance_rate", "mean_accepted_length", "tokens_per_forward", "alpha")
_MORE = ("time_to_first_token_ms", "per_token_latency_ms", "identical_to_plain")
_SYNTHETIC = "SYNTHETIC: a dry run on a toy model; these numbers say nothing about any real one."


def render(summaries: Sequence[CellSummary], form: Format, *, synthetic: bool) -> str:
    """The table of results with the definitions of its columns (markdown, LaTeX), or every figure (CSV)."""
    if form == "csv":
        return _csv([{**columns(summary), "synthetic": synthetic} for summary in summaries])
    absent = {"alpha"} if all(part.alpha is None for part in summaries) else set()
    absent |= {"identical_to_plain"} if all(part.identical is None for part in summaries) else set()
    names = [name for name in (*_SHOWN, *_MORE) if name not in absent]
    table = _grid(results_table(summaries), form, numbers_from=2)
    notes = [*untimed(summaries), *(f"{name}: {DEFINITIONS[name]}" for name in names)]
    return _with_notes(table, notes, form, synthetic=synthetic)


def untimed(summaries: Sequence[CellSummary]) -> list[str]:
    """What a reader must be told when times are left out."""
    shared, total = sum(summary.shared for summary in summaries), sum(summary.n for summary in summaries)
    return [f"{shared} of {total} samples shared the machine with other cells: their times are left out"] * (shared > 0)


def render_projection(
    figures: Mapping[str, Mapping[str, Any]], form: Format, convention: str, *, synthetic: bool
) -> str:
    """The cells under another system's definitions."""
    if form == "csv":
        return _csv([{"cell": cell, **values, "synthetic": synthetic} for cell, values in figures.items()])
    names = list(next(iter(figures.values())))
    rows = [[cell, *(_value(values[name]) for name in names)] for cell, values in figures.items()]
    notes = [f"names and definitions of {convention}"]
    return _with_notes(_grid((["cell", *names], rows), form, numbers_from=1), notes, form, synthetic=synthetic)


def results_table(summaries: Sequence[CellSummary]) -> Table:
    """The columns that a reader compares; empty where a figure does not apply."""
    laws = any(summary.alpha is not None for summary in summaries)
    same = any(summary.identical is not None for summary in summaries)
    head = ["cell", "K", "tokens/s", "speedup", "95 %", "accepted", "length", "per forward"]
    head += ["alpha"] if laws else []
    head += ["first token, ms", "per token, ms", *(["= plain"] if same else []), "samples"]
    return head, [_result(summary, laws, same) for summary in summaries]


def categories_table(summaries: Sequence[CellSummary]) -> Table:
    """Speedup by category of prompts, as Spec-Bench arranges it: a cell a line."""
    names = list(dict.fromkeys(name for summary in summaries for name in summary.categories))
    rows = []
    for summary in summaries:
        parts = [summary.categories.get(name) for name in names]
        rows.append([summary.cell.label, *(_ratio(part.speedup if part is not None else None) for part in parts)])
    return ["speedup", *names], rows


def positions_table(summaries: Sequence[CellSummary]) -> Table:
    """Acceptance by position: among drafts that reach it, and in brackets given all before it."""
    drafting = [summary for summary in summaries if summary.counts["per_position"]]
    deepest = max((len(summary.counts["per_position"]) for summary in drafting), default=0)
    rows = []
    for summary in drafting:
        pairs = zip(summary.counts["per_position"], summary.counts["per_position_conditional"], strict=True)
        cells = [_percent(share) + (f" ({_percent(given)})" if given is not None else "") for share, given in pairs]
        rows.append([summary.cell.label, *cells, *[""] * (deepest - len(cells))])
    return ["accepted at", *(str(place) for place in range(1, deepest + 1))], rows


def times_table(summaries: Sequence[CellSummary]) -> Table:
    """Where the time goes."""
    rows = [
        [summary.cell.label, *(_percent(summary.seconds[phase]) for phase in PHASES), _spread(summary.latency_ms, 0)]
        for summary in summaries
    ]
    return ["share of time", *PHASES, "latency, ms"], rows


def memory_table(summaries: Sequence[CellSummary]) -> Table:
    """What each cell needed, where the platform tells."""
    names = [name for name in MEMORY if any(name in summary.memory_mib for summary in summaries)]
    rows = [
        [summary.cell.label, *(_number(summary.memory_mib.get(name), 0) for name in names)] for summary in summaries
    ]
    return ["MiB", *(name.replace("_", " ").replace("rss", "process") for name in names)], rows if names else []


def _result(summary: CellSummary, laws: bool, same: bool) -> list[str]:
    speedup, counts = summary.speedup, summary.counts
    k = summary.cell.k
    cells = [
        summary.cell.label,
        "" if k is None else str(k),
        _spread(summary.tokens_per_sec, 1),
        _ratio(speedup),
        _interval(None if summary.cell.is_baseline else speedup),
        _percent(counts["acceptance_rate"]),
        _number(counts["mean_accepted_length"]),
        _number(counts["tokens_per_forward"]),
    ]
    cells += [_percent(summary.alpha)] if laws else []
    failed = f" ({summary.failures} failed)" if summary.failures else ""
    return [
        *cells,
        _number(summary.time_to_first_token_ms.mean, 1),
        _number(summary.per_token_latency_ms.mean, 2),
        *([_percent(summary.identical)] if same else []),
        f"{summary.n}{failed}",
    ]


def _grid(table: Table, form: Format, numbers_from: int) -> str:
    head, rows = table
    align = ["left" if place < numbers_from else "right" for place in range(len(head))]
    return tabulate(
        rows,
        headers=head,
        tablefmt={"markdown": "github", "latex": "latex_booktabs"}[form],
        colalign=align if rows else None,
        disable_numparse=True,
    )


def _with_notes(table: str, notes: Sequence[str], form: Format, *, synthetic: bool) -> str:
    marked = [_SYNTHETIC] if synthetic else []
    if form == "latex":
        return "\n".join(f"% {line}" for line in (*marked, *notes)) + f"\n{table}\n"
    lines = [f"**{_SYNTHETIC}**\n\n"] if synthetic else []
    return "".join(lines) + table + "\n\n" + "\n".join(f"- {note}" for note in notes) + "\n"


def _csv(lines: Sequence[Mapping[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {name: json.dumps(value) if isinstance(value, list) else value for name, value in line.items()}
        for line in lines
    )
    return out.getvalue()


def _interval(speedup: Speedup | None) -> str:
    return "" if speedup is None or speedup.low is None else f"{speedup.low:.2f} to {speedup.high:.2f}"


def _ratio(speedup: Speedup | None) -> str:
    return "" if speedup is None else f"{speedup.ratio:.2f}"


def _spread(spread: Spread, digits: int) -> str:
    return "" if spread.mean is None else f"{spread.mean:.{digits}f} ± {spread.std:.{digits}f}"


def _number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def _value(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(_value(item) for item in value)
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)

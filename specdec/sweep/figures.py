"""Figures of a summary, as PNG and SVG: told apart by marker, line and hatch as well as by colour.

Colours are those of Okabe and Ito, which colour-blind readers can tell apart; in grey the markers do.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from specdec.sweep.stats import CellSummary

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
_HATCHES = ("", "///", "...", "\\\\\\", "xxx", "---", "ooo")
# More bars of a group than this cannot be told apart.
_MOST_BARS = 6
_STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    # The same rows give the same file.
    "svg.hashsalt": "specdec",
    "svg.fonttype": "path",
    "hatch.linewidth": 0.6,
}
Point = Callable[[CellSummary], tuple[float | None, float | None, float | None]]


def draw_figures(summaries: Sequence[CellSummary], folder: Path, *, synthetic: bool) -> list[Path]:
    """Write every figure that the summaries have data for to `folder`; returns the PNG files, SVG lies beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    with mpl.rc_context(_STYLE):
        for name, draw in FIGURES.items():
            figure = draw(summaries)
            if figure is None:
                continue
            if synthetic:
                figure.text(
                    0.5, 0.5, "SYNTHETIC", fontsize=48, color="0.5", alpha=0.35, ha="center", va="center", rotation=25
                )
            figure.savefig(folder / f"{name}.png", dpi=150, metadata={"Software": None})
            # The layout of the first file is that of the second, and costs as much as drawing.
            figure.set_layout_engine("none")
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": None})
            drawn.append(folder / f"{name}.png")
    return drawn


def throughput_vs_k(summaries: Sequence[CellSummary]) -> Figure | None:
    """Tokens per second over the draft depth; bars: one standard deviation."""

    def point(summary: CellSummary) -> tuple[float | None, float | None, float | None]:
        spread = summary.tokens_per_sec
        return spread.mean, spread.std, spread.std

    figure, axes = _frame("tokens per second", "Throughput by draft depth")
    _plain_lines(axes, summaries, lambda summary: summary.tokens_per_sec.mean)
    return _lines_over_k(figure, axes, summaries, point, from_zero=True)


def acceptance_vs_k(summaries: Sequence[CellSummary]) -> Figure | None:
    """The pooled acceptance rate over the draft depth."""
    figure, axes = _frame("accepted / drafted", "Acceptance by draft depth")
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    return _lines_over_k(
        figure, axes, summaries, lambda summary: (summary.counts["acceptance_rate"], None, None), from_zero=True
    )


def speedup_vs_k(summaries: Sequence[CellSummary]) -> Figure | None:
    """Paired speedup over the draft depth; bars: 95 % interval."""

    def point(summary: CellSummary) -> tuple[float | None, float | None, float | None]:
        speedup = summary.speedup
        if speedup is None:
            return None, None, None
        if speedup.low is None or speedup.high is None:
            return speedup.ratio, None, None
        return speedup.ratio, speedup.ratio - speedup.low, speedup.high - speedup.ratio

    figure, axes = _frame("speedup over plain decoding", "Speedup by draft depth")
    axes.axhline(1, color="0.35", linewidth=1)
    return _lines_over_k(figure, axes, summaries, point, from_zero=False)


def per_position_acceptance(summaries: Sequence[CellSummary]) -> Figure | None:
    """Acceptance by position of the deepest cell of each series: overall, and given everything before it."""
    deepest = {name: cells[-1] for name, cells in _series(summaries).items() if cells[-1].counts["per_position"]}
    if not deepest:
        return None
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    figure.suptitle("Acceptance by position in the draft", fontsize="large")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, name, title in (
        (left, "per_position", "accepted among drafts that reach it"),
        (right, "per_position_conditional", "given that all before it were"),
    ):
        for index, summary in enumerate(deepest.values()):
            shares = [float("nan") if share is None else share for share in summary.counts[name]]
            places = [place + _aside(index, len(deepest)) for place in range(1, len(shares) + 1)]
            axes.plot(places, shares, label=summary.cell.label, **_look(index))
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("position")
        axes.set_ylim(0, 1.02)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    left.set_ylabel("accepted")
    _legend(figure, left)
    return figure


def category_speedup(summaries: Sequence[CellSummary]) -> Figure | None:
    """Speedup by category of prompts, of the fastest cell of each series; bars: 95 % interval."""
    best = [
        max(cells, key=lambda cell: cell.speedup.ratio if cell.speedup else 0) for cells in _series(summaries).values()
    ][:_MOST_BARS]
    names = list(dict.fromkeys(name for summary in best for name in summary.categories))
    if not best or len(names) < 2:
        return None
    figure = Figure(figsize=(max(6.4, 0.28 * len(names) * len(best) + 2), 4.2), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(best)
    for index, summary in enumerate(best):
        parts = [summary.categories.get(name) for name in names]
        speedups = [part.speedup if part is not None else None for part in parts]
        heights = [float("nan") if speedup is None else speedup.ratio for speedup in speedups]
        errors = [
            [0.0 if s is None or s.low is None else s.ratio - s.low for s in speedups],
            [0.0 if s is None or s.high is None else s.high - s.ratio for s in speedups],
        ]
        places = [place + (index - (len(best) - 1) / 2) * width for place in range(len(names))]
        axes.bar(
            places,
            heights,
            width,
            yerr=errors if any(map(any, errors)) else None,
            capsize=2,
            error_kw={"elinewidth": 0.8},
            color=_COLOURS[index],
            edgecolor="black",
            linewidth=0.6,
            hatch=_HATCHES[index],
            label=summary.cell.label,
        )
    axes.axhline(1, color="0.35", linewidth=1)
    axes.set_xticks(range(len(names)), [name.replace("_", " ") for name in names])
    if len(names) > 4:
        axes.tick_params(axis="x", rotation=30)
        for label in axes.get_xticklabels():
            label.set_horizontalalignment("right")
    axes.grid(visible=False, axis="x")
    axes.set_ylabel("speedup over plain decoding")
    axes.set_title("Speedup by category, fastest depth of each drafter")
    _legend(figure, axes)
    return figure


FIGURES: dict[str, Callable[[Sequence[CellSummary]], Figure | None]] = {
    "throughput_vs_k": throughput_vs_k,
    "speedup_vs_k": speedup_vs_k,
    "acceptance_vs_k": acceptance_vs_k,
    "per_position_acceptance": per_position_acceptance,
    "category_speedup": category_speedup,
}


def _frame(ylabel: str, title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel("K, tokens drafted in a round (hollow: mean depth of an adaptive controller)")
    axes.set_ylabel(ylabel)
    axes.set_title(title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, axes


def _lines_over_k(
    figure: Figure, axes: Axes, summaries: Sequence[CellSummary], point: Point, *, from_zero: bool
) -> Figure | None:
    drawn = adaptive = False
    series = _series(summaries)
    for index, (name, cells) in enumerate(series.items()):
        found = [(_depth(cell) + _aside(index, len(series)), not _fixed(cell), *point(cell)) for cell in cells]
        shown = [(x, hollow, y, low, high) for x, hollow, y, low, high in found if y is not None]
        if not shown:
            continue
        xs, hollow, ys, lows, highs = zip(*shown, strict=True)
        bars = None if None in lows or None in highs else [list(lows), list(highs)]
        look = _look(index) | ({"markerfacecolor": "white"} if all(hollow) else {})
        axes.errorbar(xs, ys, yerr=bars, label=name, capsize=2.5, elinewidth=0.8, **look)
        drawn, adaptive = True, adaptive or any(hollow)
    if not drawn:
        return None
    if not adaptive:
        axes.set_xlabel("K, tokens drafted in a round")
    if from_zero:
        axes.set_ylim(bottom=0)
    _legend(figure, axes)
    return figure


def _plain_lines(axes: Axes, summaries: Sequence[CellSummary], value: Callable[[CellSummary], float | None]) -> None:
    plain = [(summary.cell.label, value(summary)) for summary in summaries if summary.cell.is_baseline]
    for index, (label, height) in enumerate(plain):
        if height is not None:
            axes.axhline(
                height, color=f"{0.3 + 0.15 * (index % 4)}", linewidth=1.2, linestyle=_LINES[index % 4], label=label
            )


def _series(summaries: Sequence[CellSummary]) -> dict[str, list[CellSummary]]:
    """Cells that differ in K only, by depth."""
    series: dict[str, list[CellSummary]] = {}
    for summary in summaries:
        if not summary.cell.is_baseline:
            series.setdefault(re.sub(r" k=\d+", "", summary.cell.label), []).append(summary)
    return {name: sorted(cells, key=_depth) for name, cells in series.items()}


def _depth(summary: CellSummary) -> float:
    if _fixed(summary):
        return float(summary.cell.k or 0)
    hist = summary.counts["hist"]
    rounds = summary.counts["rounds"]
    return sum(depth * sum(row) for depth, row in enumerate(hist)) / rounds if rounds else 0.0


def _fixed(summary: CellSummary) -> bool:
    """Whether the depth was asked for, and not chosen round by round."""
    return summary.cell.controller.startswith("fixed:")


def _aside(index: int, count: int) -> float:
    """A little to the left or right, so that equal values are seen side by side; never half way to the next depth."""
    return (index - (count - 1) / 2) * min(0.14, 0.6 / count)


def _look(index: int) -> dict[str, Any]:
    turn = index % len(_COLOURS)
    return {
        "color": _COLOURS[turn],
        "marker": _MARKERS[turn],
        "linestyle": _LINES[turn],
        "markersize": 5.5,
        "linewidth": 1.5,
    }


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    # Characters of this size that fit into a line; a handle takes eight, and columns are as wide as their widest label.
    room = 13.2 * figure.get_figwidth()
    one_line = sum(map(len, labels)) + 8 * len(labels) <= room
    columns = len(labels) if one_line else max(1, int(room // (max(map(len, labels)) + 8)))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=9, handlelength=3)

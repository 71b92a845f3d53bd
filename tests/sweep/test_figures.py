"""Figures can be read: legends are inside, and equal values stand side by side."""

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from specdec.sweep.figures import per_position_acceptance, throughput_vs_k
from specdec.sweep.samples import CellInfo, Sample
from specdec.sweep.stats import CellSummary, summarize_cell


def summaries(names: list[str]) -> list[CellSummary]:
    """Two depths of each drafter, all with the same figures."""
    given = dict.fromkeys(Sample._fields) | {"success": True, "category": "c", "alpha_positions": 0}
    given |= {"iteration": 0, "prompt_id": "p", "turn": 0}
    given |= dict.fromkeys(("emitted", "drafted", "accepted", "target_forwards", "draft_forwards"), 4)
    given |= {"hist": ((1, 0, 0), (1, 0, 0), (1, 0, 1)), "tokens_per_sec": 9.0, "shared_machine": False}
    sample = Sample(**given)  # type: ignore[arg-type]
    found = []
    for name in names:
        for k in (1, 2):
            label = f"{name} k={k}"
            cell = CellInfo(label, label, "run", "m", name, "greedy", f"fixed:k={k}", k, 0.0, 9, 1, 0, "", "", False)
            found.append(summarize_cell(cell, [sample, sample], []))
    return found


@pytest.mark.parametrize("names", [["ngram", "suffix"], [f"model:name=a-rather-long-name-{n}" for n in range(7)]])
@pytest.mark.parametrize("draw", [throughput_vs_k, per_position_acceptance])
def test_the_legend_is_inside_the_figure(draw: object, names: list[str]) -> None:
    figure = draw(summaries(names))  # type: ignore[operator]
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    (legend,) = figure.legends
    assert len(legend.get_texts()) == len(names)
    box, whole = legend.get_window_extent(), figure.bbox
    assert box.x0 >= whole.x0
    assert box.x1 <= whole.x1
    assert box.y0 >= whole.y0
    assert box.y1 <= min(axes.get_window_extent().y0 for axes in figure.axes)


def test_equal_values_are_drawn_beside_each_other() -> None:
    figure = throughput_vs_k(summaries(["ngram", "suffix", "early_exit"]))
    assert figure is not None
    FigureCanvasAgg(figure).draw()
    (axes,) = figure.axes
    at = [axes.transData.transform((line.get_xdata()[0], 0))[0] for line in axes.lines if len(line.get_xdata()) == 2]
    gaps = [right - left for left, right in zip(sorted(set(at)), sorted(set(at))[1:], strict=False)]
    # A marker is 5.5 points wide, of 72 an inch.
    assert min(gaps) >= 5.5 * figure.dpi / 72

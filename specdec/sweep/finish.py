"""What stands in a run folder beside its rows, made again from them whenever asked."""

from pathlib import Path

from specdec.sweep.detailed import DETAILED, write_detailed
from specdec.sweep.export import write_profile
from specdec.sweep.report import write_report
from specdec.sweep.samples import read_run, uncollected
from specdec.sweep.stats import CellSummary
from specdec.sweep.summary import write_json


def finish_folder(folder: Path) -> list[CellSummary]:
    """Write summary, tables, figures, page, and the profile when rounds were recorded; returns the summaries."""
    with uncollected():
        run = read_run(folder)
        write_profile(run, folder / "profile.json")
        if run.manifest is not None and run.manifest.config["detailed_metrics"]:
            write_detailed(run, folder / DETAILED)
        summaries = write_report([run], folder)
        write_json(run, summaries, folder / "summary.json")
        return summaries

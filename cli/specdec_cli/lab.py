"""`specdec import-lab`: the earlier lab's results, with what its rows correct."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from specdec_cli.options import refusals

if TYPE_CHECKING:
    from specdec.sweep.lab import LabRun


@click.command("import-lab")
@click.argument("folder", type=click.Path(path_type=Path))
def import_lab(folder: Path) -> None:
    """Print the lab's CSV and JSON results in FOLDER (or one such file), with the corrections their rows allow."""
    with refusals():
        from specdec.sweep.lab import read_lab

        runs = read_lab(folder)
    for place, run in enumerate(runs):
        click.echo(("\n" if place else "") + _render(run))


def _render(run: "LabRun") -> str:
    from tabulate import tabulate

    head = ["K asked", "K used", "samples", "failed", "tokens/s stated", "from rows", "accepted stated", "from rows"]
    rows = [
        [
            line.k,
            _show(line.used_k, "d"),
            line.samples,
            line.failures,
            _show(line.stated_tokens_per_sec, ".2f"),
            _show(line.tokens_per_sec, ".2f"),
            _show(line.stated_acceptance, ".1%"),
            _show(line.acceptance, ".1%"),
            _show(line.latency_ms, ".0f"),
        ]
        for line in run.lines
    ]
    table = tabulate(rows, headers=[*head, "latency, ms"], tablefmt="github", disable_numparse=True)
    notes = "\n".join(f"- {note}" for note in run.notes)
    return f"## {run.file} ({run.about})\n\n{table}\n\n{notes}"


def _show(value: float | None, spec: str) -> str:
    return "unknown" if value is None else format(value, spec)

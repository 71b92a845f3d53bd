"""`specdec reproduce`: run a sweep again and compare the tokens."""

import tempfile
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import click

from specdec_cli.options import refusals

if TYPE_CHECKING:
    from specdec.sweep.reproduce import Comparison


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Keep the new run there.  [default: a temporary folder]")
@click.pass_context
def reproduce(ctx: click.Context, run: Path, out: Path | None) -> None:
    """Run RUN again from its manifest and compare every sample.

    Exit code 1 when any sample has other tokens. Times may differ; how much is said at the end.
    """
    from specdec_cli.progress import SweepMonitor

    with tempfile.TemporaryDirectory() as temporary, SweepMonitor() as monitor, refusals():
        from specdec.sweep.reproduce import reproduce_run

        found = reproduce_run(
            run,
            out or Path(temporary) / "again",
            started=monitor.started,
            finished=monitor.finished,
            progress=monitor,
        )
    _print(found)
    if not all(comparison.same for comparison in found):
        ctx.exit(1)


def _print(found: list["Comparison"]) -> None:
    for comparison in found:
        cell, iteration, prompt, turn = comparison.key
        time = "" if comparison.ratio is None else f"time x{comparison.ratio:.2f}"
        verdict = "identical" if comparison.same else "DIFFERENT"
        click.echo(f"{verdict}  {cell} / {prompt} / turn {turn} / iteration {iteration}  {time}".rstrip())
        if comparison.where is not None:
            click.echo(f"    {comparison.where}")
    same = sum(comparison.same for comparison in found)
    ratios = [comparison.ratio for comparison in found if comparison.ratio is not None]
    speed = f"; median time x{median(ratios):.2f}" if ratios else ""
    click.echo(f"{same} of {len(found)} samples have identical tokens{speed}")

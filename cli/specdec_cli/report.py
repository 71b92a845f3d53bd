"""`specdec report`: tables and figures of finished runs, from their rows alone."""

from pathlib import Path
from typing import Any

import click

from specdec_cli.options import refusals, spec_bench_only


@click.command()
@click.argument("runs", type=click.Path(path_type=Path), nargs=-1, required=True, metavar="RUN...")
@click.option(
    "--format",
    "form",
    type=click.Choice(("markdown", "latex", "csv")),
    default="markdown",
    show_default=True,
    help="Of the table on standard output.",
)
@click.option(
    "--metrics",
    type=click.Choice(("vllm", "spec-bench", "speed-bench")),
    help="Another system's names and definitions.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder for summary, figures and report.html.  [default: the run's own, if it is one run]",
)
@click.option("--no-files", is_flag=True, help="Print the table only.")
@click.option("--csv", "csv_file", type=click.Path(path_type=Path), help="Write all rows as CSV.")
@click.option("--parquet", type=click.Path(path_type=Path), help="Write all rows as Parquet.")
@click.option(
    "--spec-bench-compat", is_flag=True, help="Spec-Bench's metrics, beside the speedup that its script prints."
)
@click.option("--spec-bench-out", type=click.Path(path_type=Path), help="Write Spec-Bench answer files there.")
def report(runs: tuple[Path, ...], form: Any, metrics: str | None, out: Path | None, **options: Any) -> None:
    """Print the results of RUN folders, side by side, and draw their figures. Needs no model;
    --spec-bench-compat needs its tokenizer.

    \b
    specdec report runs/lab
    specdec report runs/a runs/b --out compared --format latex
    """
    with refusals():
        from specdec.sweep import tables
        from specdec.sweep.conventions import COMPAT, project
        from specdec.sweep.export import write_parquet, write_rows_csv, write_spec_bench
        from specdec.sweep.samples import read_runs, uncollected
        from specdec.sweep.stats import summarize_run

        with uncollected():
            found = read_runs(list(runs))
            target = out or (found[0].folder if len(found) == 1 else None)
            if options["no_files"] or target is None:
                summaries = [summary for run in found for summary in summarize_run(run)]
            else:
                from specdec.sweep.report import write_report

                summaries = write_report(found, target)
                click.echo(f"Report: {target / 'report.html'}", err=True)
        synthetic = found[0].synthetic
        compat = options["spec_bench_compat"]
        if compat:
            metrics = spec_bench_only(metrics)
        if metrics is None:
            text = tables.render(summaries, form, synthetic=synthetic)
        else:
            figures = {cell: values for run in found for cell, values in project(run, metrics, compat=compat).items()}
            text = tables.render_projection(figures, form, COMPAT if compat else metrics, synthetic=synthetic)
        click.echo(text, nl=False)
        if options["csv_file"] is not None:
            write_rows_csv(found, options["csv_file"])
        if options["parquet"] is not None:
            write_parquet(found, options["parquet"])
        if options["spec_bench_out"] is not None:
            for run in found:
                folder = options["spec_bench_out"]
                write_spec_bench(run, folder if len(found) == 1 else folder / run.name)

"""`specdec sweep`: compare ways of decoding over a prompt set, into a folder that can be resumed and reproduced."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from specdec_cli.options import ADAPTERS, DTYPES, SPELLING, given, refusals, spec_bench_only, spellings

if TYPE_CHECKING:
    from specdec.sweep.config import Config
    from specdec.sweep.runner import Execute

F = TypeVar("F", bound=Callable[..., Any])

# Options that are no keys of the configuration.
_OWN = ("config", "out", "metrics", "spec_bench_compat", "spec_bench_out", "ray", "ray_cpus", "ray_gpus")
_AXES: tuple[tuple[str, Any, str], ...] = (
    ("model", str, "Folder, hub id, .gguf file, built-in name, or tabular, a toy."),
    ("drafter", str, f"How to draft: {SPELLING}."),
    ("policy", str, "How to verify.  [default: greedy at temperature 0, else lossless]"),
    ("controller", str, "How much to draft.  [default: fixed]"),
    ("k", str, "Depths to draft: 4, 1,2,4 or 0-8."),
    ("temperature", float, "0 takes the most likely token."),
    ("max-new-tokens", int, "Limit of a sample."),
    ("dtype", click.Choice(DTYPES), "Type of the weights; SPECDEC_DTYPE."),
    ("batch-size", int, "Prompts decoded together."),
    ("seed", int, "Seed of all randomness."),
)


def axes(command: F) -> F:
    """An option for every axis; repeated, it takes several values."""
    for name, kind, about in reversed(_AXES):
        command = click.option(f"--{name}", type=kind, multiple=True, help=about)(command)
    return command


@click.command(epilog=spellings())
@click.argument("config", type=click.Path(path_type=Path), required=False)
@click.option("--out", type=click.Path(path_type=Path), help="Run folder.  [default: runs/NAME-HASH]")
@axes
@click.option("--name", help="Name of the sweep.")
@click.option("--prompts", metavar="FILE", help="builtin, a text file, JSONL, or Spec-Bench's question.jsonl.")
@click.option("--limit", type=int, help="Only so many prompts, of all categories in turn.")
@click.option("--iterations", type=int, help="Repetitions of every sample.  [default: 3]")
@click.option("--warmup", type=int, help="Uncounted turns of every cell before the first.  [default: 1]")
@click.option("--draft-model", metavar="NAME", help="The model of drafter 'model'.")
@click.option("--top-k", type=int, help="Keep the k most likely tokens.")
@click.option("--top-p", type=float, help="Keep the smallest set of this probability.")
@click.option("--min-p", type=float, help="Keep tokens of this share of the best one's.")
@click.option("--repetition-penalty", type=float, help="Divide the logits of tokens that stand in the text.")
@click.option("--chat/--raw", "chat", default=None, help="Use the chat template or not.  [default: if there is one]")
@click.option("--system", metavar="TEXT", help="System message of the chat.")
@click.option("--ignore-eos", is_flag=True, help="Go on behind the end of the text.")
@click.option("--alpha/--no-alpha", default=None, help="Compute sum min(p, q) where both laws exist.  [default: yes]")
@click.option("--device", help="auto, cpu, cuda, cuda:N or mps.")
@click.option("--adapter", type=click.Choice(ADAPTERS), help="What runs the model.")
@click.option("--trust-remote-code", is_flag=True, help="Let transformers run code that comes with the model.")
@click.option("--deterministic", is_flag=True, help="Same rows in every process; SPECDEC_DETERMINISTIC.")
@click.option(
    "--detailed-metrics",
    is_flag=True,
    help="Every round's times, histograms, seconds by operation; SPECDEC_DETAILED_METRICS.",
)
@click.option("--profile", is_flag=True, help="Write profile.json; SPECDEC_PROFILE.")
@click.option("--trace", is_flag=True, help="Write what every round decided to traces/, for specdec replay.")
@click.option("--trace-limit", type=int, help="Rounds kept of a sample.  [default: 10000]")
@click.option("--dry-run", is_flag=True, help="Run the whole path on a toy model; SPECDEC_DRY_RUN.")
@click.option(
    "--metrics", type=click.Choice(("vllm", "spec-bench", "speed-bench")), help="Print another system's metrics, too."
)
@click.option(
    "--spec-bench-compat", is_flag=True, help="Spec-Bench's metrics, beside the speedup that its script prints."
)
@click.option("--spec-bench-out", type=click.Path(path_type=Path), help="Write Spec-Bench answer files there.")
@click.option(
    "--ray",
    is_flag=False,
    flag_value="local",
    metavar="[ADDRESS]",
    help="Decode on a Ray cluster; without address, on one of this machine's own.",
)
@click.option("--ray-cpus", type=click.FloatRange(0, min_open=True), default=1.0, help="Cores of a task.  [default: 1]")
@click.option(
    "--ray-gpus", type=click.FloatRange(0), help="GPUs of a task, or a share of one.  [default: 1 if models are on one]"
)
@click.pass_context
def sweep(ctx: click.Context, /, **options: Any) -> None:
    """Run every cell of CONFIG (YAML) and the options over the prompts, beside plain decoding.

    The same command goes on where it stopped. Rows, tables, figures and report.html are left in the run folder; the
    table goes to standard output.

    \b
    specdec sweep --drafter ngram --drafter suffix --k 1-8
    specdec sweep examples/sweeps/lab.yaml --out runs/lab
    """
    with refusals():
        if options["spec_bench_compat"]:
            options["metrics"] = spec_bench_only(options["metrics"])
        from specdec.sweep.config import load_config

        chosen = {name: _value(name, options[name]) for name in options if name not in _OWN and given(ctx, name)}
        config = load_config(options["config"], environ=os.environ, overrides=chosen)
        folder = options["out"] or default_folder(config)
        execute = _cluster(**{name: options[name] for name in ("ray", "ray_cpus", "ray_gpus")})
    _run(config, folder, execute)
    if not _show(folder, options):
        ctx.exit(1)


def default_folder(config: "Config") -> Path:
    """A folder of the configuration's own, so that the same command finds its rows again."""
    text = json.dumps(config.effective(), sort_keys=True)
    return Path("runs") / f"{config.name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _cluster(ray: str | None, ray_cpus: float, ray_gpus: float | None) -> "Execute | None":
    """What decodes in place of this process, when `--ray` asks for it."""
    if ray is None:
        return None
    if Path(ray).is_file():
        raise ValueError(f"--ray takes {ray} for the address of a cluster; write the configuration before --ray")
    from specdec.sweep.cluster import Cluster, on_ray

    return on_ray(Cluster(ray, ray_cpus, ray_gpus))


def _value(name: str, value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _run(config: "Config", folder: Path, execute: "Execute | None") -> None:
    from specdec.sweep.flags import notices
    from specdec_cli.progress import SweepMonitor

    for notice in notices(config, os.environ):
        click.echo(f"Note: {notice}", err=True)
    with SweepMonitor() as monitor, refusals():
        monitor("starting", 0, 0)
        # Only now: torch takes its time.
        from specdec.sweep.journal import ROWS, read_rows
        from specdec.sweep.runner import run_sweep

        try:
            plan = run_sweep(
                config,
                folder,
                environ=os.environ,
                execute=execute,
                started=monitor.started,
                finished=monitor.finished,
                progress=monitor,
            )
        except KeyboardInterrupt:
            monitor.stop()
            if monitor.plan is not None:
                # The last row may have reached the disk and not the monitor.
                done = sum(1 for _ in read_rows(folder / ROWS))
                click.echo(
                    f"Stopped: {done} of {monitor.plan.total} samples are in {folder}; "
                    "the same command goes on from there.",
                    err=True,
                )
            raise
    if plan.torn:
        click.echo("Note: a torn last row of an earlier process was set aside in rows.torn and run again", err=True)
    if monitor.failed:
        click.echo(f"Note: {monitor.failed} samples failed; their rows say why (success is false)", err=True)


def _show(folder: Path, options: Any) -> bool:
    """Write what is made of the rows and print the table; `False` when every sample failed."""
    from specdec.sweep import tables
    from specdec.sweep.conventions import COMPAT, project
    from specdec.sweep.export import write_spec_bench
    from specdec.sweep.finish import finish_folder
    from specdec.sweep.samples import read_run

    with refusals():
        summaries = finish_folder(folder)
        run = read_run(folder)
        click.echo(tables.render(summaries, "markdown", synthetic=run.synthetic), nl=False)
        if options["metrics"]:
            compat = options["spec_bench_compat"]
            projected = project(run, options["metrics"], compat=compat)
            title = COMPAT if compat else options["metrics"]
            text = tables.render_projection(projected, "markdown", title, synthetic=run.synthetic)
            click.echo("\n" + text, nl=False)
        if options["spec_bench_out"]:
            write_spec_bench(run, options["spec_bench_out"])
    click.echo(f"Report: {folder / 'report.html'}", err=True)
    return any(summary.n > summary.failures for summary in summaries)

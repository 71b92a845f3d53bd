"""The command group, and what every command does with mistakes and interrupts."""

import gc
import sys
from collections.abc import Sequence
from typing import Any

import click

import specdec
from specdec_cli.decode import decode
from specdec_cli.doctor import doctor
from specdec_cli.lab import import_lab
from specdec_cli.models import models
from specdec_cli.quantize import quantize
from specdec_cli.replay import replay
from specdec_cli.report import report
from specdec_cli.reproduce import reproduce
from specdec_cli.sweep import sweep
from specdec_cli.what_if import what_if

# What a shell reports for a process that an interrupt ended: 128 + SIGINT.
_INTERRUPTED = 130


class Commands(click.Group):
    """A group that answers a mistake with one line, `Error: ...`, and exit code 2.

    A reader who closes the pipe ends the command quietly with 1, which is click's own way.
    """

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        try:
            code = super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        except click.Abort:
            code = _INTERRUPTED
        except click.ClickException as error:
            click.echo(f"Error: {error.format_message()}", err=True)
            code = 2
        sys.exit(code if isinstance(code, int) else 0)


@click.group(cls=Commands, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(specdec.__version__, prog_name="specdec")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Speculative decoding: several tokens for one forward of the model, with the same output.

    \b
    specdec decode "Explain KV cache simply."
    specdec decode "Explain KV cache simply." --compare
    specdec doctor
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


cli.add_command(decode)
cli.add_command(doctor)
cli.add_command(models)
cli.add_command(quantize)
cli.add_command(sweep)
cli.add_command(report)
cli.add_command(reproduce)
cli.add_command(replay)
cli.add_command(what_if)
cli.add_command(import_lab)


def run() -> None:
    """The `specdec` script: a process of its own, where the collector of garbage has little to find.

    Importing torch and loading a model makes hundreds of thousands of objects that stay. At its usual pace the
    collector looks through them again and again meanwhile, and once more before the process ends.
    """
    gc.set_threshold(100_000, 20, 20)
    try:
        cli(prog_name="specdec")
    finally:
        gc.freeze()

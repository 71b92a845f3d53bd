"""`specdec what-if`: what another controller, depth, drafter or policy would have done with a traced sample."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from specdec.grammar import Choice
from specdec.registry import parse_controller, parse_drafter, parse_policy
from specdec_cli.options import SPELLING, refusals, spelled

if TYPE_CHECKING:
    from specdec.trace.what_if import Estimate, Outcome


_WIDE = 400


@click.command(name="what-if")
@click.argument("trace", type=click.Path(path_type=Path))
@click.option(
    "--drafter", metavar=SPELLING, callback=spelled(parse_drafter), help="Another drafter that reads text only."
)
@click.option("--policy", metavar=SPELLING, callback=spelled(parse_policy), help="Another verification rule.")
@click.option(
    "--controller",
    metavar=SPELLING,
    callback=spelled(parse_controller),
    help="Another controller.  [default: the trace's]",
)
@click.option("--k", type=click.IntRange(0), multiple=True, help="Depth; may be repeated for a line each.")
@click.option(
    "--costs", type=click.Path(path_type=Path), help="JSON of seconds by tokens of a forward, for controller expected."
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
def what_if(
    trace: Path,
    drafter: Choice | None,
    policy: Choice | None,
    controller: Choice | None,
    k: tuple[int, ...],
    costs: Path | None,
    as_json: bool,
) -> None:
    """Say how the sample of TRACE would have gone otherwise. Needs no model.

    Rounds are exact for greedy and coupled traces, else estimates with a 95 % interval. Speeds are predictions.

    \b
    specdec what-if run/traces/a.npz --k 2 --k 4 --k 8
    specdec what-if run/traces/a.npz --drafter ngram --controller aimd
    """
    with refusals():
        from specdec.trace import read_trace
        from specdec.trace.what_if import what_if as ask

        recorded = read_trace(trace)
        curve = None if costs is None else _read_costs(costs)
        spelled_parts = {
            name: None if choice is None else str(choice)
            for name, choice in {"drafter": drafter, "policy": policy, "controller": controller}.items()
        }
        found = [ask(recorded, **spelled_parts, k=depth, costs=curve) for depth in k or (None,)]
    if as_json:
        click.echo(json.dumps([_plain(outcome) for outcome in found]))
    else:
        _print(found)


def _read_costs(file: Path) -> dict[int, float]:
    try:
        return {int(n): float(seconds) for n, seconds in json.loads(file.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{file} is no cost curve ({error}); write {{'1': 0.04, '8': 0.06}} as JSON") from error


def _plain(outcome: "Outcome") -> dict[str, object]:
    return {name: value._asdict() if hasattr(value, "_asdict") else value for name, value in outcome._asdict().items()}


def _print(found: list["Outcome"]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("drafter", "policy", "controller", "", "rounds", "tokens/round", "tokens/s (predicted)"):
        table.add_column(column)
    first = found[0]
    speed = first.recorded_tokens_per_s
    mean = first.tokens / first.recorded_rounds
    table.add_row(
        "as recorded", "", "", "measured", f"{first.recorded_rounds}", f"{mean:.2f}", f"{speed:.1f}" if speed else ""
    )
    for outcome in found:
        table.add_row(
            outcome.drafter,
            outcome.policy,
            outcome.controller,
            outcome.kind,
            _spell(outcome.rounds, 0 if outcome.kind == "exact" else 1),
            _spell(outcome.mean_accepted_length, 2),
            "" if outcome.tokens_per_s is None else _spell(outcome.tokens_per_s, 1),
        )
    # A file or a pipe has no width that a column could be cut to.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _WIDE)
    console.print(table, soft_wrap=True)
    for reason in dict.fromkeys(f"{outcome.kind}: {outcome.reason}" for outcome in found):
        console.print(reason, soft_wrap=True)


def _spell(value: "Estimate", digits: int) -> str:
    if value.low == value.high:
        return f"{value.value:.{digits}f}"
    return f"{value.value:.{digits}f} ({value.low:.{digits}f} to {value.high:.{digits}f})"

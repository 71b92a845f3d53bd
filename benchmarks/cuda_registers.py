"""Registers, spills and shared memory of every CUDA kernel, as its assembler reports them; needs nvcc or NVRTC, no GPU.

python benchmarks/cuda_registers.py --out docs/results/cuda_registers.json
"""

import json
from pathlib import Path

import click

from specdec_kernels.cuda.build import BuildError, compile_all, find_compiler


@click.command()
@click.option("--architecture", "architectures", multiple=True, default=("sm_80", "sm_90a"), show_default=True)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="JSON file for the report.")
def main(architectures: tuple[str, ...], out: Path | None) -> None:
    """Compile every CUDA source and say what its kernels use."""
    try:
        compiler = find_compiler()
        reports = [report._asdict() for report in compile_all(architectures, compiler)]
    except BuildError as error:
        raise click.ClickException(f"the CUDA sources: {error}") from error
    if not reports:
        raise click.ClickException(f"{compiler.name} {compiler.version} reports nothing")
    columns = list(reports[0])
    click.echo(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for kernel in reports:
        click.echo(f"| {' | '.join(str(value) for value in kernel.values())} |")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(
            json.dumps({"compiler": f"{compiler.name} {compiler.version}", "kernels": reports}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()

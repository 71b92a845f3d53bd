"""Aggregate speed of several rows at once: plain greedy decoding of batches of 1, 4 and 16 on the same kernels.

Batches take turns, so that a machine that slows down meanwhile slows them all. Every row of a batch must write what it
writes alone, bit for bit; a run where one does not fails. Prefill is not counted: a batch pads its prompts.

python benchmarks/batches.py --out docs/results/batches.jsonl
"""

import statistics
import time
from pathlib import Path
from typing import Any

import click
import torch
from common import Rows, chat_prompt, origin, read_questions, read_rows, replace_section

from specdec import build_step, controllers, drafters, init_state, iterate, output_tokens, policies
from specdec.models.loading import Loaded, load
from specdec.transforms import Parts

MODEL = "smollm2-135m"
BATCHES = (1, 4, 16)
FORMATS = ("fp32", "int8", "int4")


def decode_rows(loaded: Loaded, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
    parts = Parts(loaded.model, drafters.none(), policies.greedy(), controllers.fixed(0))
    step = build_step(*parts)
    state = init_state(
        prompts, model=parts.model, drafter=parts.drafter, controller=parts.controller, max_new_tokens=new_tokens
    )
    begin = time.perf_counter()
    last = state
    for last, _ in iterate(step, state):
        pass
    seconds = time.perf_counter() - begin
    return {"seconds": seconds, "tokens": output_tokens(last)}


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Rows, as JSON lines.")
@click.option("--questions-file", type=click.Path(path_type=Path))
@click.option("--new-tokens", default=64, show_default=True)
@click.option("--repeats", default=5, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--report", type=click.Path(path_type=Path), help="Write the table of --out into this document instead.")
def main(
    out: Path, questions_file: Path | None, new_tokens: int, repeats: int, threads: int, report: Path | None
) -> None:
    if report is not None:
        replace_section(report, "batches", section(*read_rows(out)))
        return
    torch.set_num_threads(threads)
    rows = Rows(out, model=MODEL, new_tokens=new_tokens, formats=FORMATS, batches=BATCHES)
    models = {name: load(MODEL, device="cpu", quantize=None if name == "fp32" else name) for name in FORMATS}
    questions = read_questions(questions_file, max(BATCHES), spread=True)
    prompts = [chat_prompt(models["fp32"].tokenizer, question["turns"][0], limit=128) for question in questions]
    for loaded in models.values():
        decode_rows(loaded, prompts[:2], 4)
    alone: dict[tuple[str, int], list[int]] = {}
    for repeat in range(repeats):
        for name, loaded in models.items():
            for batch in BATCHES:
                if rows.has(format=name, batch=batch, repeat=repeat):
                    continue
                result = decode_rows(loaded, prompts[:batch], new_tokens)
                count = sum(map(len, result["tokens"]))
                rows.add(format=name, batch=batch, repeat=repeat, seconds=result["seconds"], tokens=count)
                click.echo(f"{name:5s} batch {batch:2d}: {count / result['seconds']:6.1f} tok/s", err=True)
                for index, tokens in enumerate(result["tokens"]):
                    if alone.setdefault((name, index), tokens) != tokens:
                        raise SystemExit(f"{name}: row {index} of a batch of {batch} differs from another batch's")
    click.echo(section(rows.about, rows.rows))


def section(about: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    lines = [
        f"Tokens per second of all rows together, median of the repeats, {about['settings']['new_tokens']} new tokens "
        f"a row, without prefill. {origin(about)}",
        "",
        f"| format | {' | '.join(f'batch {batch}' for batch in BATCHES)} | {max(BATCHES)} over {min(BATCHES)} |",
        "|---" * (len(BATCHES) + 2) + "|",
    ]
    for name in dict.fromkeys(row["format"] for row in rows):
        speeds = [
            statistics.median(
                row["tokens"] / row["seconds"] for row in rows if (row["format"], row["batch"]) == (name, batch)
            )
            for batch in BATCHES
        ]
        cells = " | ".join(f"{speed:.0f}" for speed in speeds)
        lines.append(f"| {name} | {cells} | {speeds[-1] / speeds[0]:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

"""Cost of `specdec report` on many rows: seconds, processor seconds and peak memory of the command in its own process.

The rows are synthetic, marked as such, and stay in a temporary folder unless `--rows` names a place to keep them.

python benchmarks/report_scale.py --rows 100000 --out docs/results/report_scale.json
"""

import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from common import provenance

from specdec.sweep.journal import ROWS
from specdec.sweep.row import Row

DRAFTERS, DEPTHS, CATEGORIES = ("ngram", "suffix", "early_exit"), range(1, 9), 8
NEW_TOKENS = 64


def synthetic_rows(count: int, seed: int = 0) -> Iterator[str]:
    """`count` rows of a plain cell and 24 drafting ones, with the lengths of real rows: 64 new tokens."""
    draw = random.Random(seed)
    cells = [("plain", "none", 0), *((f"{name} k={k}", name, k) for name in DRAFTERS for k in DEPTHS)]
    for number in range(count):
        yield row(draw, cells[number % len(cells)], number // len(cells)) + "\n"


def row(draw: random.Random, cell: tuple[str, str, int], sample: int) -> str:
    """A row in which every draft is accepted with probability 0.6, token by token."""
    name, drafter, k = cell
    prompt, iteration = sample % 1000, sample // 1000
    lengths: list[int] = []
    depths: list[int] = []
    hist = [[0] * (k + 1) for _ in range(k + 1)]
    while (left := NEW_TOKENS - sum(lengths)) > 0:
        depth = min(k, left - 1)
        accepted = next((place for place in range(depth) if draw.random() > 0.6), depth)
        depths.append(depth)
        lengths.append(accepted + 1)
        hist[depth][accepted] += 1
    drafted, rounds = sum(depths), len(lengths)
    wall = rounds * draw.uniform(0.03, 0.04) + 0.05
    text = "".join(draw.choice(" etaoinshrdlu") for _ in range(4 * NEW_TOKENS))
    return Row(
        cell=name,
        baseline="plain",
        is_baseline=k == 0,
        synthetic=True,
        iteration=iteration,
        prompt_id=str(prompt),
        prompt_idx=prompt,
        category=f"category {prompt % CATEGORIES}",
        turn=0,
        model="synthetic",
        drafter=drafter,
        policy="greedy",
        controller=f"fixed:k={k}",
        k=k,
        temperature=0.0,
        max_new_tokens=NEW_TOKENS,
        batch_size=1,
        dtype="float32",
        device="none",
        seed=0,
        sample_seed=sample,
        success=True,
        context=f"{prompt:016x}",
        completion_token_ids=[draw.randrange(50_000) for _ in range(NEW_TOKENS)],
        completion_text=text,
        stop_reason="length",
        rounds=rounds,
        drafted=drafted,
        accepted=NEW_TOKENS - rounds,
        emitted=NEW_TOKENS,
        target_forwards=rounds + 1,
        hist=hist,
        accept_lengths=lengths,
        drafted_depths=depths,
        acceptance_rate=(NEW_TOKENS - rounds) / drafted if drafted else None,
        batch_tokens=NEW_TOKENS,
        wall_s=wall,
        prefill_s=0.05,
        draft_s=0.0,
        verify_s=wall - 0.06,
        accept_s=0.005,
        other_s=0.005,
        time_to_first_token_s=0.09,
        per_token_latency_s=(wall - 0.09) / NEW_TOKENS,
        tokens_per_sec=NEW_TOKENS / wall,
        batch_wall_s=wall,
        memory_mib={"rss_peak": draw.uniform(800, 900)},
    ).model_dump_json()


def measure(folder: Path) -> dict[str, Any]:
    """Run `specdec report` on `folder` and say what it took."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-m", "specdec_cli", "report", str(folder)], check=True, stdout=subprocess.DEVNULL)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "wall_s": time.perf_counter() - begin,
        "cpu_s": used.ru_utime + used.ru_stime,
        # Kilobytes on Linux.
        "peak_mb": used.ru_maxrss / 1024,
    }


@click.command()
@click.option("--rows", default=100_000, show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), help="Keep the rows here, and use those that are there.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the measurement and its provenance as JSON.")
def main(rows: int, folder: Path | None, out: Path | None) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        place = folder or Path(temporary)
        place.mkdir(parents=True, exist_ok=True)
        if not (place / ROWS).is_file():
            # Not held in memory: a process counts what its parent had when it was started.
            with (place / ROWS).open("w", encoding="utf-8") as file:
                file.writelines(synthetic_rows(rows))
        size = (place / ROWS).stat().st_size
        found = {"rows": rows, "megabytes": size / 1e6, **measure(place)}
    click.echo(json.dumps(found))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({**provenance(synthetic=True, rows=rows), **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()

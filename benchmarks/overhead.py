"""What measuring costs, on the real model: a timed step against one without a timer, the phases against an outer clock,
and a sweep against the decoding in it.

Contenders take turns prompt by prompt; ratios are paired. `off again` is the step without a timer once more: its ratio
to itself is the noise of the machine.

python benchmarks/overhead.py --out docs/results/overhead.jsonl
"""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import click
import torch
from common import ROOT, Rows, questions_path
from decode_cpu import default_parts

from specdec import build_step, init_state, iterate
from specdec.models.loading import load
from specdec.sweep.journal import ROWS, read_rows
from specdec.sweep.prompts import SUITE
from specdec.target import encode_messages
from specdec.transforms import Parts, timed_parts, with_timing
from specdec_kernels.clock import Clock

MODEL = "smollm2-135m"


def rounds(parts: Parts, prompt: Sequence[int], new_tokens: int, clock: Clock | None) -> tuple[float, dict[str, float]]:
    """Seconds of all rounds by an outer clock, and by phase where `clock` times the step."""
    parts = parts if clock is None else timed_parts(parts, clock)
    step = build_step(*parts)
    step = step if clock is None else with_timing(step, clock)
    state = init_state(
        [prompt], model=parts.model, drafter=parts.drafter, controller=parts.controller, max_new_tokens=new_tokens
    )
    phases: dict[str, float] = {}
    begin = time.perf_counter()
    for _, info in iterate(step, state):
        for name, seconds in (info.timing or {}).items():
            phases[name] = phases.get(name, 0.0) + seconds
    return time.perf_counter() - begin, phases


def timing_cost(new_tokens: int, repeats: int) -> dict[str, Any]:
    """A timed step against one without a timer; the shares of the outer clock that the phases hold."""
    loaded = load(MODEL)
    parts = default_parts(loaded)
    prompts = [encode_messages(loaded, [{"role": "user", "content": text}], chat=None) for text in SUITE]
    contenders: Mapping[str, Callable[[], Clock | None]] = {"off": lambda: None, "on": Clock, "off again": lambda: None}
    ratios: dict[str, list[float]] = {"on": [], "off again": []}
    parted, named = [], []
    for _ in range(2):
        rounds(parts, prompts[0], new_tokens, None)
    order = list(contenders)
    for _ in range(repeats):
        for prompt in prompts:
            found = {name: rounds(parts, prompt, new_tokens, contenders[name]()) for name in order}
            order = [*order[1:], order[0]]
            for name, values in ratios.items():
                values.append(found[name][0] / found["off"][0])
            wall, phases = found["on"]
            whole = sum(seconds for name, seconds in phases.items() if name != "total")
            parted.append(whole / wall)
            named.append((whole - phases["host"]) / wall)
    return {
        "pairs": len(parted),
        **{f"{name.replace(' ', '_')}_over_off": _spread(values) for name, values in ratios.items()},
        "phases_over_wall": _spread(parted),
        "phases_without_host_over_wall": _spread(named),
    }


def sweep_cost(*words: str) -> dict[str, Any]:
    """Seconds of `specdec sweep WORDS`, from before its process begins to when it has ended. `overhead`: the share of
    all but the decoding of samples; `before_s` holds imports, loading and warming up, `after_s` figures and report."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "run")
        command = [sys.executable, "-m", "specdec_cli", "sweep", *words, f"--out={folder}"]
        begin = time.time()
        subprocess.run(command, capture_output=True, check=True)
        end = time.time()
        rows = list(read_rows(folder / ROWS))
    first, last = (datetime.fromisoformat(rows[place]["finished_at"]).timestamp() for place in (0, -1))
    first -= rows[0]["batch_wall_s"]
    decoding = sum(row["batch_wall_s"] for row in rows)
    return {
        "samples": len(rows),
        "process_s": end - begin,
        "decoding_s": decoding,
        "before_s": first - begin,
        "loop_s": last - first - decoding,
        "after_s": end - last,
        "overhead": 1 - decoding / (end - begin),
        "overhead_of_loop": 1 - decoding / (last - first),
        "loop_ms_per_sample": 1000 * (last - first - decoding) / len(rows),
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    quartiles = statistics.quantiles(values, n=4)
    return {"median": quartiles[1], "low": quartiles[0], "high": quartiles[2], "min": min(values), "max": max(values)}


def measure(new_tokens: int, repeats: int, iterations: int, questions: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """What was asked for, one after the other; nothing takes no time."""
    if repeats:
        with torch.inference_mode():
            yield "timing", timing_cost(new_tokens, repeats)
    if iterations:
        cells = ("--drafter=ngram", "--drafter=suffix", "--k=2,4")
        yield (
            "sweep",
            sweep_cost(f"--model={MODEL}", *cells, f"--max-new-tokens={new_tokens}", f"--iterations={iterations}"),
        )
    if questions:
        asked = f"--prompts={questions_path(None)}", f"--limit={questions}"
        yield "k sweep", sweep_cost(str(ROOT / "benchmarks" / "k_sweep.yaml"), *asked)


@click.command()
@click.option("--new-tokens", default=64, show_default=True)
@click.option("--repeats", default=3, show_default=True, help="Of the ten prompts, for the step; 0 leaves it out.")
@click.option("--iterations", default=3, show_default=True, help="Of a sweep of five cells; 0 leaves it out.")
@click.option("--questions", default=20, show_default=True, help="Of the K sweep; 0 leaves it out.")
@click.option("--out", type=click.Path(path_type=Path), help="Append the rows and their provenance there.")
def main(out: Path | None, **settings: int) -> None:
    for kind, found in measure(**settings):
        click.echo(f"{kind}: {found}")
        if out is not None:
            Rows(out, model=MODEL, **settings).add(kind=kind, **found)


if __name__ == "__main__":
    main()

"""Kill a sweep on the real model at random moments, resume it every time, and compare with an undisturbed run.

SIGKILL, as a machine that loses power would do to a process: every fourth before the process has added a row (loading
included), the others up to two seconds behind its first one. Rows must then be those of the undisturbed run, in their
order, apart from times and memory. A row of the result is a kill; the last one is the comparison.

python benchmarks/kill_sweep.py --out docs/results/kill_sweep.jsonl
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
from common import ROOT, Rows

from specdec.sweep.contexts import whole_rows
from specdec.sweep.journal import ROWS, TORN
from specdec.sweep.row import without_timing

SETTINGS = {
    "drafter": "ngram,suffix",
    "k": "3",
    "temperature": "0.8",
    "batch-size": "2",
    "max-new-tokens": "8",
    "limit": "5",
    "iterations": "8",
    "warmup": "0",
}


def start(folder: Path) -> subprocess.Popen[bytes]:
    """The command of a user, writing to `folder`."""
    chosen = [("drafter", name) for name in SETTINGS["drafter"].split(",")]
    chosen += [(name, value) for name, value in SETTINGS.items() if name != "drafter"]
    options = [word for name, value in chosen for word in (f"--{name}", value)]
    command = [sys.executable, "-m", "specdec_cli", "sweep", *options, "--out", str(folder)]
    path = os.pathsep.join(str(ROOT / part) for part in ("", "kernels", "cli"))
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, **quiet)


def size(folder: Path) -> int:
    file = folder / ROWS
    return file.stat().st_size if file.is_file() else 0


def lines(folder: Path) -> int:
    return (folder / ROWS).read_bytes().count(b"\n") if size(folder) else 0


def kill(folder: Path, early: bool, seconds: float) -> dict[str, Any]:
    """Start the sweep and kill it after `seconds`, counted from its start (`early`) or its first new row."""
    before, rows = size(folder), lines(folder)
    process = start(folder)
    while not early and process.poll() is None and size(folder) == before:
        time.sleep(0.002)
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    killed = process.wait() == -signal.SIGKILL
    return {"killed": killed, "early": early, "after_s": seconds, "rows_before": rows, "rows_after": lines(folder)}


def stable(folder: Path) -> list[str]:
    return [json.dumps(without_timing(row)) for row in whole_rows(folder)]


@click.command()
@click.option("--kills", default=20, show_default=True)
@click.option("--seed", default=0, show_default=True, help="Of the moments.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the rows and their provenance there.")
def main(kills: int, seed: int, out: Path | None) -> None:
    pick, rows = random.Random(seed), []
    with tempfile.TemporaryDirectory() as temporary:
        whole, cut = Path(temporary) / "whole", Path(temporary) / "cut"
        begin = time.perf_counter()
        if start(whole).wait() != 0:
            raise SystemExit("the undisturbed sweep failed; run it by hand")
        loading = (time.perf_counter() - begin) / 3
        while sum(row["killed"] for row in rows) < kills:
            early = len(rows) % 4 == 0
            rows.append(kill(cut, early, pick.uniform(0, loading if early else 2)))
            click.echo(rows[-1])
        if start(cut).wait() != 0:
            raise SystemExit("the resumed sweep failed; run it by hand")
        expected, found = stable(whole), stable(cut)
        torn = (cut / TORN).read_bytes().count(b"\n") if (cut / TORN).is_file() else 0
    end = {"kills": kills, "samples": len(expected), "torn": torn, "identical": found == expected}
    click.echo(end)
    if out is not None:
        stored = Rows(out, kills=kills, seed=seed, **SETTINGS)
        for row in [*rows, end]:
            stored.add(**row)
    if not end["identical"]:
        raise SystemExit("rows differ from those of the undisturbed run")


if __name__ == "__main__":
    main()

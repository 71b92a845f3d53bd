"""What ran for how long, by torch.profiler: a Chrome trace to look at, and seconds by operation."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


class Profile:
    """Filled when the profiled block has ended. `kernels`: seconds and calls by operation or kernel, longest first."""

    def __init__(self) -> None:
        self.kernels: list[dict[str, Any]] = []


@contextmanager
def profiled(device: torch.device | str, trace: Path | None = None, *, most: int = 40) -> Iterator[Profile]:
    """Profile a block. `trace`: write a Chrome trace there, which Perfetto opens. Seconds are those of the device where
    it is one, and of the host otherwise, each without what an operation called; at most `most` of them.

    Raises `OSError` when the trace cannot be written, before anything runs.
    """
    from torch.profiler import ProfilerActivity, profile

    if trace is not None:
        trace.parent.mkdir(parents=True, exist_ok=True)
        trace.touch()
    accelerated = torch.device(device).type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if accelerated else [])]
    found = Profile()
    with profile(activities=activities) as profiler:
        yield found
    if trace is not None:
        profiler.export_chrome_trace(str(trace))
    rows = [
        {
            "name": average.key,
            "calls": int(average.count),
            "seconds": _microseconds(average, accelerated) / 1e6,
        }
        for average in profiler.key_averages()
    ]
    found.kernels = sorted((row for row in rows if row["seconds"] > 0), key=lambda row: -row["seconds"])[:most]


def _microseconds(average: Any, accelerated: bool) -> float:
    return float(average.self_device_time_total if accelerated else average.self_cpu_time_total)

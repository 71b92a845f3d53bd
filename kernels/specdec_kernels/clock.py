"""Wall time by phase: the only place that reads a clock."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Adds up seconds by name. On an accelerator every span waits for the device, so that it times work and not
    launches; that costs overlap, and is why timing is a wrapper and not part of the step."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.seconds: dict[str, float] = {}

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        begin = self.now()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + self.now() - begin

    def now(self) -> float:
        """Seconds, after the device has finished what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()
        return time.perf_counter()

    def drain(self) -> dict[str, float]:
        """The seconds since the last drain."""
        seconds, self.seconds = self.seconds, {}
        return seconds

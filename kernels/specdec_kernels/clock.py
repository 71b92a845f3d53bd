"""Time by phase: the only place that reads a clock."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Clock:
    """Adds up seconds by name; `drain` gives them.

    On CUDA a span is a pair of events in the queue of work, read when the clock is drained, so that timing a round
    stops nothing; a span then lasts from the end of the work before it to the end of its own. Elsewhere it reads a
    monotonic clock, on MPS after the device has finished.
    """

    def __init__(self, device: torch.device | str = "cpu", timer: "Timer | None" = None) -> None:
        self.device = torch.device(device)
        self.timer = timer or (EventTimer() if self.device.type == "cuda" else HostTimer(self.device))
        self._spans: list[tuple[str, Any, Any]] = []

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        begin = self.timer.mark()
        try:
            yield
        finally:
            self._spans.append((name, begin, self.timer.mark()))

    def now(self) -> float:
        """Seconds, after the device has finished what it was given."""
        synchronize(self.device)
        return time.perf_counter()

    def drain(self) -> dict[str, float]:
        """The seconds since the last drain."""
        spans, self._spans = self._spans, []
        if not spans:
            return {}
        self.timer.settle(spans[-1][2])
        seconds: dict[str, float] = {}
        for name, begin, end in spans:
            seconds[name] = seconds.get(name, 0.0) + self.timer.between(begin, end)
        self.timer.release([mark for _, begin, end in spans for mark in (begin, end)])
        return seconds


class Timer:
    """How a clock tells time: `mark` notes a moment, `settle` waits until a mark has come, and `between` gives the
    seconds from one mark to another once the later has; `release` gives marks back."""

    def mark(self) -> Any:
        raise NotImplementedError

    def settle(self, mark: Any) -> None:
        pass

    def between(self, begin: Any, end: Any) -> float:
        return float(end - begin)

    def release(self, marks: list[Any]) -> None:
        pass


class HostTimer(Timer):
    """The monotonic clock of the host."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)

    def mark(self) -> float:
        synchronize(self.device)
        return time.perf_counter()


class EventTimer(Timer):
    """Events of the current stream; `make` makes one. They are used again: making one costs more than recording it."""

    def __init__(self, make: Callable[[], Any] | None = None) -> None:
        self.make = make or (lambda: torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]
        self.free: list[Any] = []

    def mark(self) -> Any:
        event = self.free.pop() if self.free else self.make()
        event.record()
        return event

    def settle(self, mark: Any) -> None:
        mark.synchronize()

    def between(self, begin: Any, end: Any) -> float:
        return float(begin.elapsed_time(end)) / 1000

    def release(self, marks: list[Any]) -> None:
        self.free += marks


def synchronize(device: torch.device) -> None:
    """Wait until `device` has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()

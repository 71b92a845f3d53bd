"""Work beside work: a second queue, and reading a number back without stopping the device."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
SYNC_MODES = ("event", "barrier")


class Readback:
    """Reads a small tensor back while the device goes on: `request` a copy, `wait` for its values."""

    def __init__(self, like: Tensor) -> None:
        accelerated = like.device.type == "cuda"
        self.host = torch.empty(like.shape, dtype=like.dtype, pin_memory=accelerated)
        self.event = torch.cuda.Event() if accelerated else None  # type: ignore[no-untyped-call]

    def request(self, tensor: Tensor) -> None:
        """Copy `tensor` as it is after the work queued so far."""
        self.host.copy_(tensor, non_blocking=self.event is not None)
        if self.event is not None:
            self.event.record()

    def wait(self) -> list[Any]:
        """The values of the last request, once they are there."""
        if self.event is not None:
            self.event.synchronize()
        values: list[Any] = self.host.tolist()
        return values


class Lane:
    """A second queue of device work. `fork` marks the place in the first one that it starts from, `run` puts work into
    it, and `join` makes all later work of the first queue wait for it.

    `sync`: with `event` the device itself keeps that order, with `barrier` the host waits until the lane is empty.
    What `run` reads must be kept alive until `join`: memory that is given back belongs to the first queue again. On a
    device without queues the work is done at once, in order, with the same results.
    """

    def __init__(self, device: torch.device, sync: str = "event") -> None:
        if sync not in SYNC_MODES:
            raise ValueError(f"sync must be {' or '.join(SYNC_MODES)}, got {sync!r}")
        self.sync, self.device = sync, device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def fork(self) -> None:
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))

    def run(self, function: Callable[[], T]) -> T:
        if self.stream is None:
            return function()
        with torch.cuda.stream(self.stream):
            return function()

    def join(self) -> None:
        if self.stream is None:
            return
        if self.sync == "barrier":
            self.stream.synchronize()
        torch.cuda.current_stream(self.device).wait_stream(self.stream)

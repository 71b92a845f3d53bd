"""Recording device work once and playing it back: what a CUDA graph is, and nothing about decoding.

A recorder takes a function without arguments that reads and writes fixed buffers, and returns what repeats it and
what it returned; the tensors returned are rewritten in place by every repetition.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

T = TypeVar("T")
Recorder = Callable[[Callable[[], T]], tuple[Callable[[], None], T]]

# Libraries choose algorithms and allocate their workspaces, and kernels are compiled, in the runs before.
_WARM_UP = 2


class CaptureError(RuntimeError):
    """The work could not be captured: it asks the device something, or does what a graph cannot hold."""


def refuse_graphs(device: torch.device) -> str | None:
    """Why nothing can be captured on `device`, or `None` when it can."""
    return None if device.type == "cuda" else f"CUDA graphs run on NVIDIA GPUs, not on {device.type}"


def cuda_recorder(device: torch.device) -> Recorder[Any]:
    """Capture as CUDA graphs that share one memory pool.

    What a graph returned is valid until any graph of the recorder is replayed: copy it first. The function runs
    `_WARM_UP` times before it is captured, so its effects must not depend on how often it ran.
    Raises `CaptureError` when the capture fails.
    """
    pool = torch.cuda.graph_pool_handle()
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def record(work: Callable[[], T]) -> tuple[Callable[[], None], T]:
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                work()
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                outputs = work()
        except RuntimeError as error:
            raise CaptureError(" ".join(str(error).split())[:300]) from error
        return graph.replay, outputs

    return record


def eager_recorder(work: Callable[[], T]) -> tuple[Callable[[], None], T]:
    """What a graph does, done by running the function again: the definition, for any device."""
    outputs = work()
    kept = _tensors(outputs)

    def replay() -> None:
        for old, new in zip(kept, _tensors(work()), strict=True):
            if old is not new:
                old.copy_(new)

    return replay, outputs


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, tuple | list) else []

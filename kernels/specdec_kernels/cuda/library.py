"""The compiled CUDA sources as Python sees them: whether they can run, and their kernels by name."""

from functools import cache

import torch

from specdec_kernels.cuda.build import BuildError, cubin_path
from specdec_kernels.cuda.driver import Kernel, Module


def available(source: str, device: torch.device) -> str | None:
    """`None` when `{source}.cu` runs on `device`, else the reason why not; compiles it on first use."""
    if torch.version.cuda is None:
        return "needs a torch built for CUDA"
    if device.type != "cuda":
        return f"runs on NVIDIA GPUs, not on {device.type}"
    if not torch.cuda.is_available():
        return "needs a GPU, and torch sees none"
    return _open(source, _index(device))[1]


@cache
def load(
    source: str, kernel: str, parameters: str, threads: int, device: torch.device, *, early: bool = False
) -> Kernel:
    """A kernel of `{source}.cu` on `device`, which is named with its index; see `driver.Kernel`.

    Raises `BuildError` where `available` has a reason.
    """
    module, reason = _open(source, _index(device))
    if module is None:
        raise BuildError(f"{source}: cuda {reason}")
    return Kernel(module, kernel, parameters, threads, early=early)


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


@cache
def _open(source: str, index: int) -> tuple[Module | None, str | None]:
    major, minor = torch.cuda.get_device_capability(index)
    try:
        return Module(cubin_path(source, f"sm_{major}{minor}"), index), None
    except BuildError as error:
        return None, str(error)

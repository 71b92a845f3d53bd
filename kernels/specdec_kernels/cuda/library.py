"""The compiled CUDA sources as Python sees them: whether they can run, and their kernels by name."""

from functools import cache

import torch

from specdec_kernels.cuda.build import BuildError, architecture_of, cubin_path
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
    source: str, kernel: str, parameters: str, threads: int, device: torch.device, **options: bool | int
) -> Kernel:
    """A kernel of `{source}.cu` on `device`, which is named with its index; `options` as in `driver.Kernel`.

    Raises `BuildError` where `available` has a reason.
    """
    return Kernel(module(source, device), kernel, parameters, threads, **options)  # type: ignore[arg-type]


def module(source: str, device: torch.device) -> Module:
    """What `{source}.cu` compiles to, on `device`; raises `BuildError` where `available` has a reason."""
    found, reason = _open(source, _index(device))
    if found is None:
        raise BuildError(f"{source}: cuda {reason}")
    return found


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


@cache
def _open(source: str, index: int) -> tuple[Module | None, str | None]:
    try:
        return Module(cubin_path(source, architecture_of(*torch.cuda.get_device_capability(index))), index), None
    except BuildError as error:
        return None, str(error)

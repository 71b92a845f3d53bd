"""Which implementation of an operation runs, and why: a rule over a table, without state."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from specdec_kernels import linear

Refuse = Callable[[torch.device, torch.dtype], str | None]

FORCE_TORCH = "SPECDEC_FORCE_PY"


@dataclass(frozen=True)
class Choice:
    """`implementation` to run, the `reason` it was chosen, and the better ones that cannot run, each with why."""

    implementation: str
    reason: str
    rejected: tuple[tuple[str, str], ...] = ()


def _runs_everywhere(device: torch.device, dtype: torch.dtype) -> str | None:
    return None


def _refuse_cpu_stack(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return f"runs on the CPU, not on {device.type}"
    if dtype != torch.float32:
        return f"computes in float32, not in {str(dtype).removeprefix('torch.')}"
    # Compiles the kernels on first use.
    from specdec_kernels.cpu import library

    return library.available()


# Fastest first, the definition last. An entry says why it cannot run on a device with a type, or `None` when it can.
OPERATIONS: Mapping[str, tuple[tuple[str, Refuse], ...]] = {
    "decoder_stack": (("cpu", _refuse_cpu_stack), ("torch", _runs_everywhere)),
    "linear": (("onednn", linear.refuse_onednn), ("torch", _runs_everywhere)),
}


def choose(
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    requested: str = "auto",
    environ: Mapping[str, str] = os.environ,
) -> Choice:
    """The implementation of `op` for tensors of `dtype` on `device`.

    `auto` takes the first of the table that can run and records why the ones before it cannot. A name is taken at
    its word: `ValueError` when it cannot run. `SPECDEC_FORCE_PY=1` in `environ` leaves only the torch definition.
    """
    if op not in OPERATIONS:
        raise ValueError(f"unknown operation {op!r}; known: {', '.join(OPERATIONS)}")
    table = OPERATIONS[op]
    names = [name for name, _ in table]
    if requested not in ("auto", *names):
        raise ValueError(f"{op} has no implementation {requested!r}; use auto, {', '.join(names)}")
    forced = environ.get(FORCE_TORCH) == "1"
    rejected: list[tuple[str, str]] = []
    for name, refuse in table:
        if requested not in ("auto", name):
            continue
        problem = f"is ruled out by {FORCE_TORCH}=1" if forced and name != "torch" else refuse(device, dtype)
        if problem is None:
            return Choice(name, _reason(name, requested, forced, rejected), tuple(rejected))
        rejected.append((name, problem))
    raise ValueError(f"{op}: {rejected[-1][0]} {rejected[-1][1]}; use auto")


def _reason(name: str, requested: str, forced: bool, rejected: list[tuple[str, str]]) -> str:
    if requested == name:
        return "asked for"
    if forced:
        return f"{FORCE_TORCH}=1"
    if rejected:
        return "; ".join(f"{other} {problem}" for other, problem in rejected)
    return "fastest that runs here"

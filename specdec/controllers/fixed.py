"""The controller that always asks for the same depth, and the bound that all controllers share."""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from specdec.types import Controller, Plan, StepInfo


def fixed(k: int = 4) -> Controller:
    """Draft k tokens in every round that can use them; 0 drafts nothing."""
    if k < 0:
        raise ValueError(f"k must be at least 0, got {k}")

    def init(rows: int, device: torch.device) -> None:
        return None

    def plan(state: None, room: Tensor) -> Plan:
        # The bound is k itself on an accelerator: static shapes, and no number to wait for.
        depth = room.clamp(0, k)
        return Plan(depth, max(depth.tolist()) if depth.device.type == "cpu" else k)

    def update(state: None, info: StepInfo) -> None:
        return None

    return Controller(f"fixed:k={k}", init, plan, update, k)


def bounded(depth: Int[Tensor, " b"], room: Int[Tensor, " b"]) -> Plan:
    """A plan for `depth`, never more than a row has room for."""
    depth = torch.minimum(depth, room)
    return Plan(depth, max(depth.tolist()))


def check_range(name: str, low: int, initial: int, high: int) -> None:
    """Raise `ValueError` unless 1 <= low <= initial <= high."""
    if not 1 <= low <= initial <= high:
        raise ValueError(f"{name} needs 1 <= min_k <= k <= max_k, got min_k={low}, k={initial}, max_k={high}")


def judged(info: StepInfo) -> Any:
    """Rows whose round says something about acceptance: running, with at least one draft."""
    return info.running & (info.proposal.drafted > 0)

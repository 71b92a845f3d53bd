"""Feedback rules on the depth: a band around a target acceptance, and additive increase and decrease."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from specdec.controllers.fixed import bounded, check_range, judged
from specdec.records import record
from specdec.types import Controller, Plan, StepInfo


@record
class AdaptiveState:
    """`depth`: the next depth. `recent [b w]`: acceptance of the last rounds, newest first, NaN where none yet."""

    depth: Int[Tensor, " b"]
    recent: Float[Tensor, "b w"]


def adaptive(
    k: int = 4,
    *,
    min_k: int = 1,
    max_k: int = 8,
    step: int = 1,
    target: float = 0.7,
    band: float = 0.1,
    window: int = 4,
) -> Controller:
    """Raise the depth by `step` when the mean acceptance of the last `window` rounds is above target + band, lower it
    below target - band. Acceptance of a round is accepted / drafted; rounds without a draft do not count."""
    check_range("adaptive", min_k, k, max_k)
    if window < 1 or step < 1:
        raise ValueError(f"adaptive needs window >= 1 and step >= 1, got window={window}, step={step}")

    def init(rows: int, device: torch.device) -> AdaptiveState:
        depth = torch.full((rows,), k, dtype=torch.int64, device=device)
        return AdaptiveState(depth, torch.full((rows, window), torch.nan, device=device))

    def plan(state: AdaptiveState, room: Tensor) -> Plan:
        return bounded(state.depth, room)

    def update(state: AdaptiveState, info: StepInfo) -> AdaptiveState:
        counts = judged(info)
        drafted = info.proposal.shape.deepest.clamp_min(1)
        rate = info.verdict.num_accepted / drafted
        recent = torch.cat([rate[:, None], state.recent[:, :-1]], dim=1)
        recent = torch.where(counts[:, None], recent, state.recent)
        mean = recent.nanmean(-1)
        change = step * ((mean > target + band).long() - (mean < target - band).long())
        depth = torch.where(counts, (state.depth + change).clamp(min_k, max_k), state.depth)
        return AdaptiveState(depth, recent)

    return Controller(f"adaptive:k={k},max_k={max_k}", init, plan, update, max_k)


@record
class DepthState:
    """`depth`: the next depth."""

    depth: Int[Tensor, " b"]


def aimd(k: int = 4, *, min_k: int = 1, max_k: int = 16) -> Controller:
    """Two more after a round in which everything was accepted, one less after any other: Hugging Face's heuristic."""
    check_range("aimd", min_k, k, max_k)

    def init(rows: int, device: torch.device) -> DepthState:
        return DepthState(torch.full((rows,), k, dtype=torch.int64, device=device))

    def plan(state: DepthState, room: Tensor) -> Plan:
        return bounded(state.depth, room)

    def update(state: DepthState, info: StepInfo) -> DepthState:
        everything = info.verdict.num_accepted == info.proposal.shape.deepest
        depth = (state.depth + torch.where(everything, 2, -1)).clamp(min_k, max_k)
        return DepthState(torch.where(judged(info), depth, state.depth))

    return Controller(f"aimd:k={k},max_k={max_k}", init, plan, update, max_k)

"""The depth that maximizes expected tokens per second, given what a forward of n tokens costs."""

from collections.abc import Mapping
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from specdec import tree
from specdec.arrays import iota
from specdec.controllers.fixed import bounded, judged
from specdec.records import record
from specdec.types import Controller, Plan, StepInfo


@record
class ExpectedState:
    """Discounted counts by depth, with a prior: `tried [b k]` (drafts whose predecessors were accepted) and `accepted
    [b k]`. Depth 0 is the root, which is always tried and always accepted."""

    tried: Float[Tensor, "b k"]
    accepted: Float[Tensor, "b k"]


def expected(
    cost: Mapping[int, float],
    *,
    max_k: int = 8,
    draft_cost: float = 0.0,
    overhead: float = 0.0,
    prior: float = 0.7,
    weight: float = 2.0,
    discount: float = 0.95,
) -> Controller:
    """Choose the k that maximizes (1 + sum_i prod_{j<=i} a_j) / (t(k+1) + k * draft_cost + overhead).

    `cost[n]`: measured seconds of a target forward over n tokens, interpolated between the sizes given; `draft_cost`:
    seconds per drafted token; `overhead`: seconds of a round outside both. a_j, the probability that depth j is
    accepted when j - 1 was, is a discounted mean with a prior of mean `prior` and `weight` observations. The discount
    runs in rounds without a draft, too, so an estimate that switched speculation off fades and is tried again.
    The criterion is that of TurboSpec (arXiv:2406.14066) with the cost of a forward measured. `Plan.worth` is the cost
    of a node times the speed so expected: a node that is accepted less often slows decoding down.
    """
    if max_k < 1:
        raise ValueError(f"max_k must be at least 1, got {max_k}")
    if 1 not in cost or min(cost.values()) <= 0:
        raise ValueError("cost must give positive seconds for n = 1 and further n, for example {1: 0.04, 8: 0.06}")
    seconds = torch.tensor([_interpolate(cost, n + 1) + n * draft_cost + overhead for n in range(max_k + 1)])
    slope = float(seconds[-1] - seconds[0]) / max_k
    hits = torch.tensor([weight] + [prior * weight] * max_k)
    on_device = cache(lambda device: (seconds.to(device), hits.to(device)))

    def init(rows: int, device: torch.device) -> ExpectedState:
        none = torch.zeros(rows, max_k + 1, device=device)
        return ExpectedState(none, none)

    def plan(state: ExpectedState, room: Tensor) -> Plan:
        time, before = on_device(room.device)
        rate = (state.accepted + before) / (state.tried + weight)
        speed, depth = (rate.cumprod(-1).cumsum(-1) / time).max(-1)
        return bounded(depth, room, speed * slope)

    def update(state: ExpectedState, info: StepInfo) -> ExpectedState:
        index = iota(max_k + 1, info.running.device)
        fade = (info.running * (discount - 1) + 1)[:, None]
        counts, passed = judged(info)[:, None], info.verdict.num_accepted[:, None]
        accepted = counts & (index <= passed)
        tried = counts & (index <= torch.minimum(passed + 1, tree.tree_depth(info.proposal)[:, None]))
        return ExpectedState(state.tried * fade + tried, state.accepted * fade + accepted)

    return Controller(f"expected:max_k={max_k}", init, plan, update, max_k)


def _interpolate(cost: Mapping[int, float], n: int) -> float:
    """Piecewise linear between measured sizes, constant below the first and with the last slope beyond the last."""
    sizes = sorted(cost)
    if n <= sizes[0] or len(sizes) == 1:
        return cost[sizes[0]]
    upper = next((size for size in sizes if size >= n), sizes[-1])
    lower = sizes[sizes.index(upper) - 1]
    return cost[lower] + (cost[upper] - cost[lower]) * (n - lower) / (upper - lower)

"""The depth that maximizes expected tokens per second, given what a forward of n tokens costs."""

from collections.abc import Mapping
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from specdec.records import record
from specdec.types import Controller, Plan, StepInfo
from specdec_kernels.dispatch import resolve


@record
class ExpectedState:
    """Discounted counts by depth on top of a prior, `counts[:, 0]` of drafts that were accepted and `counts[:, 1]` of
    those that were tried, because their predecessors were accepted. Depth 0 is the root, always tried and accepted. In
    float64 where the device has it, so that devices differ in nothing but their last places."""

    counts: Float[Tensor, "b 2 k"]


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
    seconds = [_interpolate(cost, n + 1) + n * draft_cost + overhead for n in range(max_k + 1)]
    slope = (seconds[-1] - seconds[0]) / max_k
    before = [[weight] + [prior * weight] * max_k, [weight] * (max_k + 1)]

    @cache
    def on_device(device: torch.device) -> tuple[Tensor, Tensor]:
        dtype = torch.float32 if device.type == "mps" else torch.float64
        return torch.tensor(seconds, dtype=dtype, device=device), torch.tensor(before, dtype=dtype, device=device)

    def init(rows: int, device: torch.device) -> ExpectedState:
        return ExpectedState(on_device(device)[1].repeat(rows, 1, 1))

    def plan(state: ExpectedState, room: Tensor) -> Plan:
        choose = resolve("best_depth", room.device, state.counts.dtype, room.shape)
        depth, speed = choose(state.counts, on_device(room.device)[0], room)
        return Plan(depth, max(depth.tolist()), speed * slope)

    def update(state: ExpectedState, info: StepInfo) -> ExpectedState:
        # Rows that are done go on fading: nobody asks them again.
        learn = resolve("learn_depth", state.counts.device, state.counts.dtype, info.running.shape)
        verdict, deepest = info.verdict, info.proposal.shape.deepest
        before = on_device(deepest.device)[1]
        return ExpectedState(learn(state.counts, before, deepest, verdict.num_accepted, discount=discount))

    return Controller(f"expected:max_k={max_k}", init, plan, update, max_k)


def _interpolate(cost: Mapping[int, float], n: int) -> float:
    """Piecewise linear between measured sizes, constant below the first and with the last slope beyond the last."""
    sizes = sorted(cost)
    if n <= sizes[0] or len(sizes) == 1:
        return cost[sizes[0]]
    upper = next((size for size in sizes if size >= n), sizes[-1])
    lower = sizes[sizes.index(upper) - 1]
    return cost[lower] + (cost[upper] - cost[lower]) * (n - lower) / (upper - lower)

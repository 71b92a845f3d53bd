"""How deep a draft pays, from counts of what was tried and accepted at each depth (see `controllers.expected`)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def best_depth(
    counts: Float[Tensor, "b 2 k"], seconds: Float[Tensor, " k"], room: Int[Tensor, " b"]
) -> tuple[Int[Tensor, " b"], Float[Tensor, " b"]]:
    """The depth with the most expected tokens per second, at most `room`, and that speed.

    `counts`: accepted and tried, their ratio being the chance that a depth is accepted when the one before was; the
    root's is 1. Expected tokens are one for each depth that is reached; `seconds[d]`: of a round drafting d deep.
    """
    accepted, tried = counts.unbind(1)
    speed, depth = ((accepted / tried).cumprod(-1).cumsum(-1) / seconds).max(-1)
    return torch.minimum(depth, room), speed


def learn_depth(
    counts: Float[Tensor, "b 2 k"],
    prior: Float[Tensor, "2 k"],
    deepest: Int[Tensor, " b"],
    num_accepted: Int[Tensor, " b"],
    *,
    discount: float,
) -> Float[Tensor, "b 2 k"]:
    """The counts after a round: what stands above `prior` fades by `discount`, and each depth that was looked at is
    added, the root's with them; rounds without a draft say nothing."""
    depth = torch.arange(counts.shape[2], device=counts.device)
    passed, drew = num_accepted[:, None], deepest[:, None]
    accepted = (depth <= passed) & (drew > 0)
    tried = (depth <= torch.minimum(passed + 1, drew)) & (drew > 0)
    return prior + discount * (counts - prior) + torch.stack((accepted, tried), 1)

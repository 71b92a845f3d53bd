"""Walks over draft trees: who is whose ancestor, which nodes a path takes, and what a verification returns."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from specdec_kernels.arrays import iota


class Verification(NamedTuple):
    """What every verification returns.

    `path [b n]`: accepted nodes in order, root excluded, padded with -1. `num_accepted [b]`: their number.
    `next_token [b]`: the one token that follows them. `accept_prob [b n]`: for each node that was looked at, the
    probability over its own coin that it is accepted; 0 elsewhere.
    """

    path: Int[Tensor, "b n"]
    num_accepted: Int[Tensor, " b"]
    next_token: Int[Tensor, " b"]
    accept_prob: Float[Tensor, "b n"]


class TreeShape(NamedTuple):
    """What follows from a tree's parents and which nodes are `valid`.

    `visible`: `[b, i, j]` says that node j is node i or one of its ancestors; `None` for a chain, where all before it
    are. `depth`: distance of each node from the root. `drafted`: valid nodes without the root. `deepest`: the depth of
    the deepest valid node.
    """

    visible: Bool[Tensor, "b n n"] | None
    depth: Int[Tensor, "b n"]
    drafted: Int[Tensor, " b"]
    deepest: Int[Tensor, " b"]


def tree_shape(parents: Int[Tensor, "b n"], valid: Bool[Tensor, "b n"], *, chain: bool = False) -> TreeShape:
    """See `TreeShape`. `chain`: `parents[:, i] == i - 1` in every row, which needs no algebra."""
    drafted = valid.sum(-1) - 1
    if chain:
        return TreeShape(None, iota(parents.shape[1], parents.device).expand_as(parents), drafted, drafted)
    visible = ancestors(parents)
    depth = visible.sum(-1) - 1
    return TreeShape(visible, depth, drafted, (depth * valid).amax(-1))


def pack_path(accepted: Bool[Tensor, "b n"]) -> tuple[Int[Tensor, "b n"], Int[Tensor, " b"]]:
    """The marked nodes in index order, which on a path is its order, padded with -1; and their number."""
    n = accepted.shape[1]
    count = accepted.sum(-1)
    index = torch.arange(n, device=accepted.device)
    # Unmarked nodes sort behind the marked ones.
    order = torch.where(accepted, index, index + n).sort(-1).values
    return torch.where(index < count[:, None], order, -1), count


def ancestors(parents: Int[Tensor, "b n"]) -> Bool[Tensor, "b n n"]:
    """`[b, i, j]`: node j is node i or one of its ancestors. Squaring the one-step relation: log2(n) products."""
    n = parents.shape[1]
    index = torch.arange(n, device=parents.device)
    reach = ((parents[:, :, None] == index) | (index[:, None] == index)).float()
    span = 1
    while span < n - 1:
        reach = (reach @ reach).clamp_max(1)
        span *= 2
    return reach > 0


def repeated_siblings(
    tokens: Int[Tensor, "b n"], parents: Int[Tensor, "b n"], valid: Bool[Tensor, "b n"]
) -> Bool[Tensor, "b n"]:
    """Nodes that carry the token of an earlier valid sibling."""
    n = tokens.shape[1]
    same = (tokens[:, :, None] == tokens[:, None, :]) & (parents[:, :, None] == parents[:, None, :])
    earlier = torch.ones(n, n, dtype=torch.bool, device=tokens.device).tril(-1)
    return (same & earlier & valid[:, None, :]).any(-1)


def follow(
    choice: Int[Tensor, "b n"],
    tokens: Int[Tensor, "b n"],
    parents: Int[Tensor, "b n"],
    valid: Bool[Tensor, "b n"],
    *,
    chain: bool = False,
) -> Verification:
    """Follow the target's choice: from each node go to the first valid child that carries `choice[node]`.

    The choice at the last node of the path is the next token. Every node is judged, so `accept_prob` is 0 or 1.
    `chain`: `parents[:, i] == i - 1` in every row, which needs no algebra.
    """
    if tokens.shape[1] == 1:
        # Plain decoding, and every round without a draft: nothing to compare.
        count = torch.zeros_like(choice[:, 0])
        return Verification(
            torch.full_like(choice, -1), count, choice[:, 0], torch.zeros(choice.shape, device=choice.device)
        )
    if chain:
        agrees = valid[:, 1:] & (tokens[:, 1:] == choice[:, :-1])
        accepted = torch.nn.functional.pad(agrees.long().cumprod(-1).bool(), (1, 0))
        count = accepted.sum(-1)
        index = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
        path = torch.where(index <= count[:, None], index, -1)
        last = count
    else:
        agrees = valid & (tokens == choice.gather(1, parents.clamp_min(0).long()))
        # Of siblings with one token only the first is followed: going to the deepest would look ahead.
        agrees &= ~repeated_siblings(tokens, parents, valid)
        agrees[:, 0] = True
        accepted = ~(ancestors(parents) & ~agrees[:, None, :]).any(-1)
        accepted[:, 0] = False
        path, count = pack_path(accepted)
        last = path.amax(-1).clamp_min(0)
    next_token = choice.gather(1, last[:, None])[:, 0]
    return Verification(path, count, next_token, accepted.float())

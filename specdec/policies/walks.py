"""The walk that the choosing policies share, and the shape of every path."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from specdec import tree
from specdec.rng import Key
from specdec.types import Draws, Proposal, Verdict


def pack_path(accepted: Bool[Tensor, "b n"]) -> tuple[Int[Tensor, "b n"], Int[Tensor, " b"]]:
    """The marked nodes in index order, which on a path is its order, padded with -1; and their number."""
    n = accepted.shape[1]
    count = accepted.sum(-1)
    index = torch.arange(n, device=accepted.device)
    # Unmarked nodes sort behind the marked ones.
    order = torch.where(accepted, index, index + n).sort(-1).values
    return torch.where(index < count[:, None], order, -1), count


def choice_walk(proposal: Proposal, choice: Int[Tensor, "b n"]) -> Verdict:
    """Follow the target's choice: from each node go to the first child that carries `choice[node]`.

    The choice at the last node of the path is the next token. Every node is judged, so `accept_prob` is 0 or 1.
    """
    tokens, valid = proposal.tokens, proposal.valid
    if tokens.shape[1] == 1:
        # Plain decoding, and every round without a draft: nothing to compare.
        nothing = torch.zeros(choice.shape, device=choice.device)
        return Verdict(torch.full_like(choice, -1), torch.zeros_like(choice[:, 0]), choice[:, 0], nothing)
    if proposal.chain:
        agrees = valid[:, 1:] & (tokens[:, 1:] == choice[:, :-1])
        accepted = torch.nn.functional.pad(agrees.long().cumprod(-1).bool(), (1, 0))
        count = accepted.sum(-1)
        index = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
        path = torch.where(index <= count[:, None], index, -1)
        last = count
    else:
        agrees = valid & (tokens == choice.gather(1, proposal.parents.clamp_min(0)))
        # Of siblings with one token only the first is followed: going to the deepest would look ahead.
        agrees &= ~tree.repeated_siblings(proposal)
        agrees[:, 0] = True
        accepted = ~(tree.ancestors(proposal.parents) & ~agrees[:, None, :]).any(-1)
        accepted[:, 0] = False
        path, count = pack_path(accepted)
        last = path.amax(-1).clamp_min(0)
    next_token = choice.gather(1, last[:, None])[:, 0]
    return Verdict(path, count, next_token, accepted.float())


def no_draws(key: Key, round: Tensor, depth: Tensor, length: Tensor, vocab_size: int) -> Draws:
    """For rules without randomness."""
    zeros = torch.zeros(depth.shape, device=depth.device)
    return Draws(zeros, zeros[:, 0])


def coin_draws(key: Key, round: Tensor, depth: Tensor, length: Tensor, vocab_size: int) -> Draws:
    """One uniform per node and one per row, of this round."""
    accept, token = key.verification(round, depth.shape[1])
    return Draws(accept, token)


def child_law(
    proposal: Proposal, node: Int[Tensor, " b"], index: int, like: Float[Tensor, "b v"]
) -> Float[Tensor, "b v"]:
    """The law that node `index` was drawn from given its parent `node`: a draft row, or a point mass."""
    point = torch.zeros_like(like).scatter(1, proposal.tokens[:, index : index + 1], 1)
    if proposal.draft_probs is None:
        return point
    rows = torch.arange(len(node), device=node.device)
    drawn = proposal.draft_probs[rows, node].to(like.dtype)
    return torch.where(proposal.sampled[:, index, None], drawn, point)

"""Tree algebra on index arrays: `parents [b n]`, -1 at the root (node 0), smaller than the node's own index elsewhere.

Padding nodes obey the same rule, so nothing here needs to know which nodes are valid.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from specdec import arrays
from specdec.arrays import iota
from specdec.types import Proposal
from specdec_kernels.ops import walk


def chain_parents(rows: int, n: int, device: torch.device | str) -> Int[Tensor, "b n"]:
    """-1, 0, 1, ...: the parents of a chain."""
    return arrays.chain_parents(n, torch.device(device)).expand(rows, n)


def chain(
    root: Int[Tensor, " b"],
    drafts: Int[Tensor, "b m"],
    count: Int[Tensor, " b"],
    draft_probs: Float[Tensor, "b m v"] | None = None,
) -> Proposal:
    """The chain root, drafts[:, 0], ...; the first `count` drafts of a row exist.

    `draft_probs` row i is the law that `drafts[:, i]` was drawn from; without it the drafts are point masses.
    """
    rows, m = drafts.shape
    tokens = torch.cat([root[:, None], drafts], dim=1)
    index = iota(m + 1, drafts.device)
    valid = index <= count[:, None]
    sampled = torch.zeros_like(valid)
    if draft_probs is not None:
        sampled = valid & (index > 0)
        draft_probs = torch.cat([draft_probs, torch.zeros_like(draft_probs[:, :1])], dim=1) if m else None
    # A padding node must still be a token the model can embed.
    tokens = torch.where(valid, tokens, root[:, None])
    return Proposal(tokens, chain_parents(rows, m + 1, drafts.device), valid, sampled, draft_probs, True, True)


def root_only(root: Int[Tensor, " b"]) -> Proposal:
    """The tree of plain decoding: one node, nothing drafted."""
    return Proposal(root[:, None], *arrays.lone_roots(len(root), root.device), None, True, True)


def pack(trees: Sequence[tuple[int, Sequence[tuple[int, int]]]], chain: bool, device: torch.device) -> Proposal:
    """Point-mass trees made on the host: of each row the root's token and its drafts as (parent, token) in order.

    Rows are padded to the largest by copies of the root that hang on the node before them. `chain`: every row is one.
    """
    n = 1 + max(len(drafts) for _, drafts in trees)
    tokens = [[root, *(token for _, token in drafts), *[root] * (n - 1 - len(drafts))] for root, drafts in trees]
    if n == 1:
        return root_only(torch.tensor(tokens, device=device)[:, 0])
    valid = torch.tensor([[i <= len(drafts) for i in range(n)] for _, drafts in trees], device=device)
    sampled = arrays.zeros((len(trees), n), torch.bool, valid.device)
    if chain:
        parents = chain_parents(len(trees), n, device)
    else:
        above = [[-1, *(parent for parent, _ in drafts), *range(len(drafts), n - 1)] for _, drafts in trees]
        parents = torch.tensor(above, device=device)
    return Proposal(torch.tensor(tokens, device=device), parents, valid, sampled, None, True, chain)


def ancestors(parents: Int[Tensor, "b n"]) -> Bool[Tensor, "b n n"]:
    """`[b, i, j]`: node j is node i or one of its ancestors."""
    return walk.ancestors(parents)


def depths(visible: Bool[Tensor, "b n n"]) -> Int[Tensor, "b n"]:
    """Distance of each node from the root."""
    return visible.sum(-1) - 1


def trim(proposal: Proposal) -> Proposal:
    """Without the last nodes that no row needs, so that a round without a match costs a plain forward.

    Only where reading a number back is free: elsewhere static shapes are worth more.
    """
    n = proposal.tokens.shape[1]
    if n == 1 or proposal.tokens.device.type != "cpu":
        return proposal
    used = max(n - row[::-1].index(True) for row in proposal.valid.tolist())
    if used == n:
        return proposal
    probs = None if proposal.draft_probs is None or used == 1 else proposal.draft_probs[:, :used]
    return Proposal(
        proposal.tokens[:, :used],
        proposal.parents[:, :used],
        proposal.valid[:, :used],
        proposal.sampled[:, :used],
        probs,
        proposal.replacement,
        proposal.chain or used <= 2,
    )


def repeated_siblings(proposal: Proposal) -> Bool[Tensor, "b n"]:
    """Nodes that carry the token of an earlier valid sibling."""
    return walk.repeated_siblings(proposal.tokens, proposal.parents, proposal.valid)


def merge(first: Proposal, second: Proposal) -> Proposal:
    """The union of two batches of trees under one root.

    A node of `second` that carries the same token as a node already there, below the same path, becomes that node.
    Drafts that were sampled must come from `first`, and `second` must hold point masses: then dropping a duplicate
    is harmless, because a sampled sibling that was rejected has no residual mass left. Dropping a sampled duplicate
    would bias the output.
    """
    if bool(second.draft_probs is not None):
        raise ValueError("the second tree of a merge must hold point-mass drafts only; pass the sampled tree first")
    tokens, parents, valid, sampled = first.tokens, first.parents, first.valid, first.sampled
    rows, added = tokens.shape[0], second.tokens.shape[1] - 1
    place = torch.zeros(rows, added + 1, dtype=torch.int64, device=tokens.device)
    for j in range(1, added + 1):
        parent = place.gather(1, second.parents[:, j : j + 1])
        token, exists = second.tokens[:, j : j + 1], second.valid[:, j : j + 1]
        same = (parents == parent) & (tokens == token) & valid
        found = same.any(1, keepdim=True)
        index = torch.where(found, same.int().argmax(1, keepdim=True), tokens.shape[1])
        place[:, j : j + 1] = torch.where(exists, index, 0)
        tokens = torch.cat([tokens, token], 1)
        parents = torch.cat([parents, parent], 1)
        valid = torch.cat([valid, exists & ~found], 1)
        sampled = torch.cat([sampled, torch.zeros_like(exists)], 1)
    probs = first.draft_probs
    if probs is not None:
        probs = torch.cat([probs, probs.new_zeros(rows, added, probs.shape[2])], 1)
    return Proposal(tokens, parents, valid, sampled, probs, first.replacement, False)

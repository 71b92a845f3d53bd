"""What every proposal and every verdict must satisfy, as functions that raise `ValueError` naming the broken rule."""

import torch

from specdec.types import Proposal, Verdict


def check_proposal(proposal: Proposal) -> None:
    """Topological parents, a valid root, no valid node below an invalid one, laws where tokens were sampled."""
    tokens, parents, valid = proposal.tokens, proposal.parents, proposal.valid
    index = torch.arange(tokens.shape[1], device=tokens.device)
    _refuse("node 0 must have parent -1", parents[:, 0] != -1)
    _refuse("every parent must have a smaller index than its child", (parents >= index) | ((parents < 0) & (index > 0)))
    _refuse("node 0 must be valid", ~valid[:, 0])
    _refuse("a valid node hangs below an invalid one", valid & ~valid.gather(1, parents.clamp_min(0)))
    _refuse("node 0 cannot be a sampled draft", proposal.sampled[:, 0])
    if proposal.chain:
        _refuse("a chain's node i must have parent i - 1", parents != index - 1)
    if proposal.draft_probs is None:
        _refuse("a sampled node needs the law it was drawn from (draft_probs)", proposal.sampled & valid)
        return
    laws = proposal.draft_probs
    _refuse("a draft law has a negative or non-finite entry", ~((laws >= 0) & laws.isfinite()))
    drawn = (proposal.sampled & valid)[:, 1:]
    parent = parents[:, 1:].clamp_min(0)
    rows = torch.arange(tokens.shape[0], device=tokens.device)[:, None]
    _refuse("the law of a sampled node must sum to 1", drawn & ((laws[rows, parent].sum(-1) - 1).abs() > 1e-4))
    _refuse("a sampled token has probability 0 under its law", drawn & (laws[rows, parent, tokens[:, 1:]] <= 0))


def check_verdict(proposal: Proposal, verdict: Verdict) -> None:
    """The accepted nodes are a path from the root through valid nodes, and `num_accepted` counts them."""
    path, count = verdict.path, verdict.num_accepted
    index = torch.arange(path.shape[1], device=path.device)
    live = index < count[:, None]
    _refuse("path entries past num_accepted must be -1", ~live & (path != -1))
    _refuse("a path entry is not a drafted node", live & ((path < 1) | (path >= path.shape[1])))
    nodes = path.clamp_min(0)
    _refuse("an accepted node is not valid", live & ~proposal.valid.gather(1, nodes))
    before = torch.cat([torch.zeros_like(nodes[:, :1]), nodes[:, :-1]], dim=1)
    _refuse(
        "an accepted node is not a child of the one before it", live & (proposal.parents.gather(1, nodes) != before)
    )
    prob = verdict.accept_prob
    _refuse("an acceptance probability is outside [0, 1]", ~((prob >= 0) & (prob <= 1)))
    if not proposal.chain:
        _refuse("the path is deeper than the tree", count > proposal.shape.deepest)


def _refuse(rule: str, broken: torch.Tensor) -> None:
    if bool(broken.any()):
        place = broken.nonzero()[0].tolist()
        raise ValueError(f"{rule} (first at index {place})")

"""From a proposal to what the target says about it: the only caller of the target's forward."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from specdec.cache import KVCache
from specdec.sampling import Sampling, penalize, seen_tokens
from specdec.types import Model, Proposal, Target


def score(
    model: Model,
    cache: KVCache,
    proposal: Proposal,
    *,
    tokens: Int[Tensor, "b t"],
    length: Int[Tensor, " b"],
    sampling: Sampling,
    features: bool = False,
) -> tuple[Target, KVCache]:
    """One forward over all nodes of the trees; consumes `cache`, whose `length` must be `length - 1`.

    The repetition penalty, which depends on each node's own prefix, is applied here; temperature and truncation are
    left to the policies, which ask for probabilities only where they need them.
    """
    visible = proposal.shape.visible
    depth = None if visible is None else proposal.shape.depth
    logits, hidden, cache = model.forward(cache, proposal.tokens, depth, visible, logits=True, features=features)
    assert logits is not None
    # A model that was called with gradients on: no verdict passes them back.
    logits = logits.detach() if logits.requires_grad else logits
    if sampling.repetition_penalty != 1:
        if visible is None:
            n = proposal.tokens.shape[1]
            visible = torch.ones(n, n, dtype=torch.bool, device=logits.device).tril().expand(len(length), n, n)
        seen = prefix_tokens(proposal.tokens, visible, tokens, length, logits.shape[-1])
        logits = penalize(logits, seen, sampling)
    return Target(logits, hidden), cache


def prefix_tokens(
    nodes: Int[Tensor, "b n"],
    visible: Bool[Tensor, "b m n"],
    tokens: Int[Tensor, "b t"],
    length: Int[Tensor, " b"],
    vocab_size: int,
) -> Bool[Tensor, "b m v"]:
    """Which tokens stand in the prefix of each of m queries: the committed ones and the visible `nodes`."""
    committed = seen_tokens(tokens, length, vocab_size)
    drafted = torch.zeros(*visible.shape[:2], vocab_size, dtype=torch.int8, device=nodes.device)
    # `scatter_reduce` with amax: a token may stand in several nodes of which only one is visible.
    index = nodes[:, None, :].expand_as(visible)
    drafted = drafted.scatter_reduce(2, index, visible.to(torch.int8), "amax")
    return committed[:, None, :] | (drafted > 0)

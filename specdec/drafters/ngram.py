"""Prompt lookup: what followed the last time the text ended like this?"""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from specdec import tree
from specdec.arrays import iota
from specdec.drafters.common import last_token, stateless, unchanged
from specdec.sampling import Sampling
from specdec.types import DecodeState, Drafter, Plan, Proposal
from specdec_kernels.dispatch import resolve


def ngram(*, max_ngram: int = 3, min_ngram: int = 1, matches: int = 1, window: int = 0) -> Drafter:
    """Prompt lookup (Saxena 2023) over prompt and output, as tensor operations without a look at the host.

    Takes the earlier occurrence that agrees with the end of the text over the most tokens, up to `max_ngram` and at
    least `min_ngram`, the most recent of equals, and drafts what followed it; a continuation that reaches the end of
    the text goes on with itself, as a period does. `matches` > 1 drafts the best several as a tree. `window` > 0
    searches only the last so many tokens.
    """
    if not 1 <= min_ngram <= max_ngram:
        raise ValueError(f"ngram needs 1 <= min_ngram <= max_ngram, got {min_ngram} and {max_ngram}")
    if matches < 1 or window < 0:
        raise ValueError(f"ngram needs matches >= 1 and window >= 0, got matches={matches}, window={window}")

    def propose(state: DecodeState[Any, Any], plan: Plan, sampling: Sampling) -> tuple[Proposal, None, int]:
        root = last_token(state)
        if plan.max_depth == 0:
            return tree.root_only(root), None, 0
        tokens, length = state.tokens, state.length
        find = resolve("suffix_match", tokens.device, tokens.dtype)
        ends, sizes = find(tokens, length, longest=max_ngram, shortest=min_ngram, matches=matches, window=window)
        proposal = None
        for m in range(ends.shape[1]):
            drafts = _continuation(tokens, length, ends[:, m], plan.max_depth)
            count = torch.where(sizes[:, m] > 0, plan.depth, 0)
            found = tree.chain(root, drafts, count)
            proposal = found if proposal is None else tree.merge(proposal, found)
        assert proposal is not None
        return proposal, None, 0

    return Drafter(
        f"ngram:max_ngram={max_ngram},matches={matches}",
        stateless,
        propose,
        unchanged,
        chain=matches == 1,
        max_nodes=lambda depth: 1 + matches * depth,
    )


def _continuation(
    tokens: Int[Tensor, "b t"], length: Int[Tensor, " b"], end: Int[Tensor, " b"], depth: int
) -> Int[Tensor, "b m"]:
    """`depth` tokens after place `end`, repeating with the period `length - 1 - end` where the text runs out."""
    period = (length - 1 - end).clamp_min(1)[:, None]
    offset = iota(depth, tokens.device) % period
    return tokens.gather(1, (end[:, None] + 1 + offset).clamp_max(tokens.shape[1] - 1))

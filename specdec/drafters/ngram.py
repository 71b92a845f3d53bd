"""Prompt lookup: what followed the last time the text ended like this?"""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from specdec import tree
from specdec.drafters.common import last_token, stateless, unchanged
from specdec.sampling import Sampling
from specdec.types import DecodeState, Drafter, Plan, Proposal


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
        agree = _agreement(tokens, length, max_ngram)
        index = torch.arange(tokens.shape[1], device=tokens.device)
        if window:
            agree = agree * (index >= (length - window)[:, None])
        # Longest agreement first, then the latest place; both fit one integer.
        score = torch.where(agree >= min_ngram, agree * tokens.shape[1] + index, -1)
        best, ends = score.topk(min(matches, tokens.shape[1]), dim=1)
        proposal = None
        for m in range(best.shape[1]):
            drafts = _continuation(tokens, length, ends[:, m], plan.max_depth)
            count = torch.where(best[:, m] >= 0, plan.depth, 0)
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


def _agreement(tokens: Int[Tensor, "b t"], length: Int[Tensor, " b"], longest: int) -> Int[Tensor, "b t"]:
    """Over how many tokens the text up to place j agrees with the whole text's end; 0 at and past its last place."""
    index = torch.arange(tokens.shape[1], device=tokens.device)
    agree = (index < (length - 1)[:, None]).long()
    total = torch.zeros_like(tokens)
    for back in range(longest):
        wanted = tokens.gather(1, (length - 1 - back).clamp_min(0)[:, None])
        shifted = torch.nn.functional.pad(tokens, (back, 0), value=-1)[:, : tokens.shape[1]]
        agree = agree * (shifted == wanted)
        total = total + agree
    return total


def _continuation(
    tokens: Int[Tensor, "b t"], length: Int[Tensor, " b"], end: Int[Tensor, " b"], depth: int
) -> Int[Tensor, "b m"]:
    """`depth` tokens after place `end`, repeating with the period `length - 1 - end` where the text runs out."""
    period = (length - 1 - end).clamp_min(1)[:, None]
    offset = torch.arange(depth, device=tokens.device) % period
    return tokens.gather(1, (end[:, None] + 1 + offset).clamp_max(tokens.shape[1] - 1))

"""A new policy, judged by enumeration: a plausible mistake is found, and the repaired rule passes.

The rule accepts a draft with probability min(1, p/q). The first version corrects a rejection by sampling the target
anew; the second samples the residual, as the theorem wants.

python examples/write_a_policy.py
"""

import torch

from specdec.policies.walks import child_law, coin_draws
from specdec.sampling import residual, sample, warp
from specdec.testing import check_policy
from specdec.types import Policy, Verdict


def one_token_rejection(correct):
    """Verify the first draft of a chain only; `correct(p, q)` is the law of the correction."""

    def verify(proposal, target, draws, sampling):
        p = warp(target.logits, sampling)
        rows = torch.zeros_like(proposal.tokens[:, 0])
        taken, law = torch.zeros_like(rows, dtype=torch.bool), p[:, 0]
        accept_prob = torch.zeros_like(p[:, :, 0])
        if proposal.tokens.shape[1] > 1:
            q, token = child_law(proposal, rows, 1, law), proposal.tokens[:, 1:2]
            ratio = (law.gather(1, token) / q.gather(1, token).clamp_min(1e-30))[:, 0].clamp_max(1)
            tried = proposal.valid[:, 1]
            taken = tried & (draws.accept[:, 1] < ratio)
            accept_prob[:, 1] = torch.where(tried, ratio, 0)
            rejected = torch.where(tried[:, None], correct(law, q), law)
            law = torch.where(taken[:, None], p[:, 1], rejected)
        path = torch.full_like(proposal.tokens, -1)
        path[:, 0] = torch.where(taken, 1, -1)
        return Verdict(path, taken.long(), sample(law, draws.token), accept_prob)

    return Policy("one_token_rejection", coin_draws, verify, exact=True, chain_only=True)


try:
    check_policy(one_token_rejection(lambda p, q: p))
except ValueError as error:
    print("refused:", error)
print("repaired, error in total variation:", check_policy(one_token_rejection(residual)))

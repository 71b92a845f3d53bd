"""Block verification: the chain is accepted as a whole, never worse than token by token."""

import torch

from specdec.policies.walks import child_law, coin_draws
from specdec.sampling import Sampling, residual, sample, warp
from specdec.types import Draws, Policy, Proposal, Target, Verdict


def block() -> Policy:
    """Block verification of a chain (Sun et al., arXiv:2403.10444, Alg. 2).

    With r_0 = 1 and r_i = min(1, r_{i-1} p_i(x_i) / q_i(x_i)), position i < gamma is accepted with probability
    h_i = Z_i / (Z_i + 1 - r_i), where Z_i = sum (r_i p_{i+1} - q_{i+1})+, and h_gamma = r_gamma. The longest accepted
    position wins, so a later success forgives an earlier failure. The correction comes from
    norm((r p_{i+1} - q_{i+1})+). The expected number of accepted tokens is the largest possible for a chain.
    """

    def verify(proposal: Proposal, target: Target, draws: Draws, sampling: Sampling) -> Verdict:
        tokens, n = proposal.tokens, proposal.tokens.shape[1]
        rows = torch.arange(tokens.shape[0], device=tokens.device)
        law = warp(target.logits, sampling)
        gamma = proposal.valid.sum(-1) - 1
        ratio = torch.ones_like(law[:, 0, 0], dtype=torch.float64 if law.device.type != "mps" else torch.float32)
        last, correction = torch.zeros_like(rows), law[:, 0]
        accept_prob = torch.zeros(tokens.shape, dtype=law.dtype, device=law.device)
        for i in range(n):
            p = law[:, i]
            is_end = gamma == i
            if i + 1 < n:
                q = child_law(proposal, torch.full_like(rows, i), i + 1, p)
                scaled = ratio[:, None] * p
                mass = (scaled - q).clamp_min(0).sum(-1)
                rest = mass + (1 - ratio)
                share = torch.where(rest > 0, mass / rest.clamp_min(torch.finfo(rest.dtype).tiny), 1.0)
                # Past its last draft a row has no next law; there h is r itself, and the correction is p.
                h = torch.where(is_end, ratio, share)
                here = torch.where(is_end[:, None], p, residual(scaled, q.to(scaled.dtype)).to(p.dtype))
                token = tokens[:, i + 1, None]
                p_token, q_token = p.gather(1, token)[:, 0], q.gather(1, token)[:, 0]
                step = p_token.to(ratio.dtype) / q_token.to(ratio.dtype).clamp_min(torch.finfo(p.dtype).tiny)
                following = (ratio * step).clamp_max(1)
            else:
                h, here, following = ratio, p, ratio
            exists = proposal.valid[:, i]
            # Every position draws its coin, also behind a failure. The root is accepted without one.
            taken = exists & (draws.accept[:, i] < h) if i else exists
            last = torch.where(taken, i, last)
            correction = torch.where(taken[:, None], here, correction)
            if i:
                accept_prob[:, i] = torch.where(exists, h, 0).to(law.dtype)
            ratio = following
        index = torch.arange(1, n + 1, device=tokens.device)
        path = torch.where(index <= last[:, None], index, -1)
        return Verdict(path, last, sample(correction, draws.token), accept_prob)

    return Policy("block", coin_draws, verify, exact=True, chain_only=True)

"""Token-level rejection sampling over trees."""

import torch

from specdec.policies.walks import child_law, coin_draws, pack_path
from specdec.sampling import Sampling, residual, sample, warp
from specdec.types import Draws, Policy, Proposal, Target, Verdict


def lossless() -> Policy:
    """Accept a draft with probability min(1, p/q), correct a rejection from the residual law.

    On a chain: Leviathan et al., arXiv:2211.17192, Alg. 1; Chen et al., arXiv:2302.01318. Siblings are tried in index
    order, and after each rejection p becomes norm((p - q)+): multi-round sampling of SpecInfer (arXiv:2305.09781) for
    independent siblings, recursive rejection of RSD and Sequoia (arXiv:2402.14160, arXiv:2402.12374) for siblings
    drawn without replacement, whose q loses the rejected token. A draft that was not sampled is a point mass:
    accepted with probability p, and struck from p otherwise. Kinds may be mixed among siblings.
    """

    def verify(proposal: Proposal, target: Target, draws: Draws, sampling: Sampling) -> Verdict:
        tokens, parents, valid = proposal.tokens, proposal.parents, proposal.valid
        rows = torch.arange(tokens.shape[0], device=tokens.device)
        law = warp(target.logits, sampling)
        p = law[:, 0]
        node = torch.zeros_like(rows)
        struck = torch.zeros_like(p, dtype=torch.bool)
        accepted = torch.zeros_like(valid)
        accept_prob = torch.zeros(tokens.shape, dtype=p.dtype, device=p.device)
        for i in range(1, tokens.shape[1]):
            token = tokens[:, i, None]
            tried = valid[:, i] & (parents[:, i] == node)
            q = child_law(proposal, node, i, p)
            if not proposal.replacement:
                # Only sampled siblings draw from q without its earlier tokens; a point mass is what it is.
                left = q.masked_fill(struck & proposal.sampled[:, i, None], 0)
                mass = left.sum(-1, keepdim=True)
                q = torch.where(mass > 0, left / mass.clamp_min(torch.finfo(p.dtype).tiny), q)
            p_token, q_token = p.gather(1, token)[:, 0].double(), q.gather(1, token)[:, 0].double()
            # Strict, so that a token the target excludes is rejected even for a uniform of 0.
            taken = tried & (draws.accept[:, i] * q_token < p_token)
            probability = (p_token / q_token.clamp_min(torch.finfo(p.dtype).tiny)).clamp_max(1)
            accept_prob[:, i] = torch.where(tried, probability.to(p.dtype), 0)
            accepted[:, i] = taken
            rejected = tried & ~taken
            p = torch.where(taken[:, None], law[:, i], torch.where(rejected[:, None], residual(p, q), p))
            now = struck.scatter(1, token, True)
            drawn = (rejected & proposal.sampled[:, i])[:, None]
            struck = torch.where(taken[:, None], False, torch.where(drawn, now, struck))
            node = torch.where(taken, i, node)
        path, count = pack_path(accepted)
        return Verdict(path, count, sample(p, draws.token), accept_prob)

    return Policy("lossless", coin_draws, verify, exact=True)

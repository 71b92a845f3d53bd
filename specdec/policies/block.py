"""Block verification: the chain is accepted as a whole, never worse than token by token."""

from specdec.policies.walks import check_kernels, coins, seed_draws
from specdec.sampling import Sampling
from specdec.types import Draws, Policy, Proposal, Target, Verdict
from specdec_kernels.dispatch import resolve


def block(*, kernels: str = "auto") -> Policy:
    """Block verification of a chain (Sun et al., arXiv:2403.10444, Alg. 2).

    With r_0 = 1 and r_i = min(1, r_{i-1} p_i(x_i) / q_i(x_i)), position i < gamma is accepted with probability
    h_i = Z_i / (Z_i + 1 - r_i), where Z_i = sum (r_i p_{i+1} - q_{i+1})+, and h_gamma = r_gamma. The longest accepted
    position wins, so a later success forgives an earlier failure. The correction comes from
    norm((r p_{i+1} - q_{i+1})+). The expected number of accepted tokens is the largest possible for a chain.
    `kernels`: the implementation of `verify_block` (see `specdec_kernels.dispatch`), or `auto`.
    """
    check_kernels("verify_block", kernels)

    def verify(proposal: Proposal, target: Target, draws: Draws, sampling: Sampling) -> Verdict:
        run = resolve("verify_block", target.logits.device, target.logits.dtype, (), kernels)
        return Verdict(
            *run(
                target.logits,
                proposal.tokens,
                proposal.valid,
                proposal.sampled,
                proposal.draft_probs,
                **coins(draws),
                **sampling.transforms,
            )
        )

    return Policy("block", seed_draws, verify, exact=True, chain_only=True)

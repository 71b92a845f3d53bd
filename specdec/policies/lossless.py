"""Token-level rejection sampling over trees."""

from specdec.policies.walks import check_kernels, coins, seed_draws
from specdec.sampling import Sampling
from specdec.types import Draws, Policy, Proposal, Target, Verdict
from specdec_kernels.dispatch import resolve


def lossless(*, kernels: str = "auto") -> Policy:
    """Accept a draft with probability min(1, p/q), correct a rejection from the residual law.

    On a chain: Leviathan et al., arXiv:2211.17192, Alg. 1; Chen et al., arXiv:2302.01318. Siblings are tried in index
    order, and after each rejection p becomes norm((p - q)+): multi-round sampling of SpecInfer (arXiv:2305.09781) for
    independent siblings, recursive rejection of RSD and Sequoia (arXiv:2402.14160, arXiv:2402.12374) for siblings
    drawn without replacement, whose q loses the rejected token. A draft that was not sampled is a point mass:
    accepted with probability p, and struck from p otherwise. Kinds may be mixed among siblings.
    `kernels`: the implementation of `verify_lossless` (see `specdec_kernels.dispatch`), or `auto`.
    """
    check_kernels("verify_lossless", kernels)

    def verify(proposal: Proposal, target: Target, draws: Draws, sampling: Sampling) -> Verdict:
        run = resolve("verify_lossless", target.logits.device, target.logits.dtype, (), kernels)
        return Verdict(
            *run(
                target.logits,
                proposal.tokens,
                proposal.parents,
                proposal.valid,
                proposal.sampled,
                proposal.draft_probs,
                **coins(draws),
                replacement=proposal.replacement,
                **sampling.transforms,
            )
        )

    return Policy("lossless", seed_draws, verify, exact=True)

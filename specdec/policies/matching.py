"""Policies that let the target choose a token at every node and keep the drafts that agree."""

from torch import Tensor

from specdec.policies.walks import check_kernels, no_draws, seed_draws
from specdec.rng import Key
from specdec.sampling import Sampling
from specdec.types import Draws, Policy, Proposal, Target, Verdict
from specdec_kernels.dispatch import resolve


def greedy(*, kernels: str = "auto") -> Policy:
    """Keep a draft while it is the target's most likely token: the output is that of greedy decoding.

    Ties go to the lowest token id. Exact for temperature 0, which is the only one `build_step` lets it run with.
    `kernels`: the implementation of `verify_greedy` (see `specdec_kernels.dispatch`), or `auto`.
    """
    check_kernels("verify_greedy", kernels)

    def verify(proposal: Proposal, target: Target, draws: Draws, sampling: Sampling) -> Verdict:
        run = resolve("verify_greedy", target.logits.device, target.logits.dtype, target.logits.shape[:1], kernels)
        tree = (proposal.tokens, proposal.parents, proposal.valid)
        return Verdict(*run(target.logits, *tree, chain=proposal.chain))

    return Policy("greedy", no_draws, verify, exact=True, greedy_only=True)


def match(*, kernels: str = "auto") -> Policy:
    """Sample the target at every node, keep a draft if it is the sampled token.

    Exact for every drafter, because the output is made of the target's own samples. It accepts with probability
    sum(p q), at most that of `lossless`, and needs no draft law. `kernels`: the implementation of `verify_match`.
    """
    check_kernels("verify_match", kernels)

    def verify(proposal: Proposal, target: Target, draws: Draws, sampling: Sampling) -> Verdict:
        run = resolve("verify_match", target.logits.device, target.logits.dtype, (), kernels)
        tree = (proposal.tokens, proposal.parents, proposal.valid)
        uniforms = {"accept": draws.accept, "seed": draws.seed, "round": draws.round}
        return Verdict(*run(target.logits, *tree, **uniforms, chain=proposal.chain, **sampling.transforms))

    return Policy("match", seed_draws, verify, exact=True)


def coupled(*, kernels: str = "auto") -> Policy:
    """Gumbel-coupled verification: both models choose argmax(log prob + noise), with noise fixed by position.

    Daliri, Musco and Suresh, arXiv:2408.07978. The output is plain Gumbel-max decoding of the target with the same
    seed, whatever the drafter, the depth or the batch; a draft model in `coupled` mode is accepted with probability
    at least (1 - TV) / (1 + TV). `kernels`: the implementation of `verify_coupled`.
    """
    check_kernels("verify_coupled", kernels)

    def draw(key: Key, round: Tensor, depth: Tensor, length: Tensor, vocab_size: int) -> Draws:
        # Node i chooses the token that stands `depth + 1` places behind the last committed one.
        position = length[:, None] + depth
        if type(key) is Key:
            return Draws(seed=key.seed, position=position)
        return Draws(noise=key.gumbels(position, vocab_size))

    def verify(proposal: Proposal, target: Target, draws: Draws, sampling: Sampling) -> Verdict:
        run = resolve("verify_coupled", target.logits.device, target.logits.dtype, (), kernels)
        tree = (proposal.tokens, proposal.parents, proposal.valid)
        noise = {"noise": draws.noise, "seed": draws.seed, "position": draws.position}
        return Verdict(*run(target.logits, *tree, **noise, chain=proposal.chain, **sampling.transforms))

    return Policy("coupled", draw, verify, exact=True)

"""Policies that let the target choose a token at every node and keep the drafts that agree."""

import torch

from specdec.policies.walks import choice_walk, coin_draws, no_draws
from specdec.rng import Key
from specdec.sampling import Sampling, sample, warp
from specdec.types import Draws, Policy, Proposal, Target, Verdict


def greedy() -> Policy:
    """Keep a draft while it is the target's most likely token: the output is that of greedy decoding.

    Ties go to the lowest token id. Exact for temperature 0, which is the only one `build_step` lets it run with.
    """

    def verify(proposal: Proposal, target: Target, draws: Draws, sampling: Sampling) -> Verdict:
        return choice_walk(proposal, target.logits.argmax(-1))

    return Policy("greedy", no_draws, verify, exact=True, greedy_only=True)


def match() -> Policy:
    """Sample the target at every node, keep a draft if it is the sampled token.

    Exact for every drafter, because the output is made of the target's own samples. It accepts with probability
    sum(p q), at most that of `lossless`, and needs no draft law.
    """

    def verify(proposal: Proposal, target: Target, draws: Draws, sampling: Sampling) -> Verdict:
        p = warp(target.logits, sampling)
        choice = sample(p.flatten(0, 1), draws.accept.flatten()).view_as(proposal.tokens)
        return choice_walk(proposal, choice)

    return Policy("match", coin_draws, verify, exact=True)


def coupled() -> Policy:
    """Gumbel-coupled verification: both models choose argmax(log prob + noise), with noise fixed by position.

    Daliri, Musco and Suresh, arXiv:2408.07978. The output is plain Gumbel-max decoding of the target with the same
    seed, whatever the drafter, the depth or the batch; a draft model in `coupled` mode is accepted with probability
    at least (1 - TV) / (1 + TV).
    """

    def draw(key: Key, round: torch.Tensor, depth: torch.Tensor, length: torch.Tensor, vocab_size: int) -> Draws:
        zeros = torch.zeros(depth.shape, device=depth.device)
        # Node i chooses the token that stands `depth + 1` places behind the last committed one.
        deepest = int(depth.shape[1])
        offsets = torch.arange(deepest, device=depth.device)
        noise = key.gumbels(length[:, None] + offsets, vocab_size)
        index = depth[:, :, None].expand(-1, -1, vocab_size)
        return Draws(zeros, zeros[:, 0], noise.gather(1, index))

    def verify(proposal: Proposal, target: Target, draws: Draws, sampling: Sampling) -> Verdict:
        assert draws.noise is not None
        p = warp(target.logits, sampling)
        return choice_walk(proposal, (p.log() + draws.noise).argmax(-1))

    return Policy("coupled", draw, verify, exact=True)

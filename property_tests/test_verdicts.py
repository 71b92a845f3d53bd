"""Policies as functions of arbitrary proposals, targets and uniforms."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from specdec import policies, tree
from specdec.checks import check_proposal, check_verdict
from specdec.sampling import Sampling, warp
from specdec.testing import proposals, samplings, targets
from specdec.types import Draws

VOCAB = 4
POLICIES = [policies.greedy, policies.lossless, policies.block, policies.match, policies.coupled]


def draws_for(proposal, seed):
    generator = torch.Generator().manual_seed(seed)
    rows, n = proposal.tokens.shape
    uniform = torch.rand(rows, n + 1, generator=generator, dtype=torch.float64)
    noise = -torch.log(-torch.log(torch.rand(rows, n, VOCAB, generator=generator, dtype=torch.float64)))
    return Draws(uniform[:, :n], uniform[:, n], noise)


@st.composite
def cases(draw, *, chain=False):
    proposal = draw(proposals(vocab_size=VOCAB, chain=chain))
    return proposal, draw(targets(proposal, vocab_size=VOCAB)), draws_for(proposal, draw(st.integers(0, 2**31)))


@pytest.mark.parametrize("policy", POLICIES)
@given(data=st.data(), sampling=samplings())
def test_verdict_is_a_path(policy, data, sampling):
    policy = policy()
    proposal, target, draws = data.draw(cases(chain=policy.chain_only))
    check_proposal(proposal)
    verdict = policy.verify(proposal, target, draws, sampling)
    check_verdict(proposal, verdict)
    assert bool(((verdict.next_token >= 0) & (verdict.next_token < VOCAB)).all())


@pytest.mark.parametrize("policy", POLICIES)
@given(data=st.data(), sampling=samplings())
def test_verdicts_do_not_depend_on_the_batch(policy, data, sampling):
    policy = policy()
    proposal, target, draws = data.draw(cases(chain=policy.chain_only))
    whole = policy.verify(proposal, target, draws, sampling)
    for row in range(proposal.tokens.shape[0]):
        pick = slice(row, row + 1)
        one = policy.verify(cut(proposal, pick), cut(target, pick), cut(draws, pick), sampling)
        assert torch.equal(one.path[0], whole.path[row])
        assert torch.equal(one.next_token[0], whole.next_token[row])


def cut(record, rows):
    values = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    picked = {name: value[rows] for name, value in values.items() if isinstance(value, torch.Tensor)}
    return dataclasses.replace(record, **picked)


@pytest.mark.parametrize("policy", [policies.lossless, policies.block])
@given(data=st.data(), lower=st.floats(0, 1))
def test_monotone_in_uniforms(policy, data, lower):
    """Smaller acceptance uniforms never shorten the path, a larger token uniform never lowers the token."""
    policy, sampling = policy(), Sampling(temperature=1.0)
    proposal, target, draws = data.draw(cases(chain=True))
    verdict = policy.verify(proposal, target, draws, sampling)
    kinder = dataclasses.replace(draws, accept=draws.accept * lower)
    assert bool((policy.verify(proposal, target, kinder, sampling).num_accepted >= verdict.num_accepted).all())
    later = dataclasses.replace(draws, token=1 - (1 - draws.token) * lower * 0.999)
    assert bool((policy.verify(proposal, target, later, sampling).next_token >= verdict.next_token).all())


@given(data=st.data(), sampling=samplings())
def test_point_mass_equals_match(data, sampling):
    """On a point-mass chain `lossless` and `match` accept with the same probabilities: p of the drafted token."""
    proposal, target, draws = data.draw(cases(chain=True))
    proposal = dataclasses.replace(proposal, sampled=torch.zeros_like(proposal.sampled), draft_probs=None)
    certain = dataclasses.replace(draws, accept=torch.zeros_like(draws.accept))
    prob = policies.lossless().verify(proposal, target, certain, sampling).accept_prob
    p = warp(target.logits, sampling)
    wanted = p[:, :-1].gather(2, proposal.tokens[:, 1:, None])[..., 0]
    tried = prob[:, 1:] > 0
    assert torch.allclose(prob[:, 1:][tried], wanted[tried])


@pytest.mark.parametrize("policy", [policies.greedy, policies.lossless, policies.match, policies.coupled])
@given(data=st.data(), sampling=samplings())
def test_chain_is_degenerate_tree(policy, data, sampling):
    """Declaring a chain to be a tree changes nothing but the code that runs."""
    proposal, target, draws = data.draw(cases(chain=True))
    fast = policy().verify(proposal, target, draws, sampling)
    slow = policy().verify(dataclasses.replace(proposal, chain=False), target, draws, sampling)
    assert torch.equal(fast.path, slow.path)
    assert torch.equal(fast.next_token, slow.next_token)


@given(data=st.data(), sampling=samplings())
def test_baseline_is_one_node_tree(data, sampling):
    """Without drafts every policy takes its token from the target's law at the root."""
    proposal, target, draws = data.draw(cases())
    root = tree.root_only(proposal.tokens[:, 0])
    first = dataclasses.replace(target, logits=target.logits[:, :1])
    noise = dataclasses.replace(draws, accept=draws.token[:, None], noise=draws.noise[:, :1])
    lossless, block, match = (
        policy().verify(root, first, noise, sampling) for policy in (policies.lossless, policies.block, policies.match)
    )
    assert torch.equal(lossless.next_token, block.next_token)
    assert torch.equal(lossless.next_token, match.next_token)
    assert int(lossless.num_accepted.max()) == 0


@given(data=st.data())
def test_block_accepts_as_many_as_token_in_expectation(data):
    """Sun et al., Theorem 2, from the acceptance probabilities of every chain of two over a small vocabulary."""
    seed = data.draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    shape = (1, 3, 3)
    first_q, second_q = (
        torch.softmax(torch.randn(3, generator=generator), -1),
        torch.softmax(torch.randn(3, 3, generator=generator), -1),
    )
    p = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    bonus = torch.randn(3, generator=generator, dtype=torch.float64)
    totals = {"lossless": 0.0, "block": 0.0}
    for one in range(3):
        for two in range(3):
            laws = torch.zeros(shape, dtype=torch.float64)
            laws[0, 0], laws[0, 1] = first_q, second_q[one]
            drafts = torch.tensor([[one, two]])
            proposal = tree.chain(torch.zeros(1, dtype=torch.int64), drafts, torch.tensor([2]), laws[:, :2])
            logits = torch.stack([p[3], p[one], bonus])[None]
            weight = float(first_q[one] * second_q[one, two])
            for name, policy in (("lossless", policies.lossless()), ("block", policies.block())):
                zero = torch.zeros(1, 3, dtype=torch.float64)
                verdict = policy.verify(
                    proposal, policies_target(logits), Draws(zero, zero[:, 0]), Sampling(temperature=1.0)
                )
                a, b = (float(value) for value in verdict.accept_prob[0, 1:])
                # Token by token the second counts only after the first; a block is accepted up to its last success.
                totals[name] += weight * (a + a * b if name == "lossless" else 2 * b + (1 - b) * a)
    assert totals["block"] >= totals["lossless"] - 1e-6


def policies_target(logits):
    from specdec.types import Target

    return Target(logits)

"""The law test must be able to fail: each classic mistake of the field is made on purpose and rejected."""

import dataclasses

import pytest
import torch

from specdec import controllers, drafters, policies
from specdec.cache import keep
from specdec.law import output_law, target_law, total_variation
from specdec.models.tabular import from_table, tabular, tabular_draft
from specdec.sampling import Sampling
from specdec.state import init_state
from specdec.step import build_step
from specdec.testing import law_error

TARGET = tabular(3, seed=5)
DRAFT = tabular_draft(TARGET, agreement=0.3, seed=6)
VISIBLE = 1e-3


def error_of(drafter, policy, **options):
    return law_error(TARGET, drafter, policy, controllers.fixed(2), prompt=[0, 1, 0], max_new_tokens=3, **options)


def honest():
    return drafters.draft_model(DRAFT), policies.lossless()


def test_the_honest_composition_passes():
    assert error_of(*honest()) < 1e-9


def test_argmax_draft_with_softmax_law_is_rejected():
    greedy = drafters.draft_model(DRAFT, mode="greedy")
    sampling = drafters.draft_model(DRAFT)

    def propose(state, plan, settings):
        laws, drafter_state, forwards = sampling.propose(state, plan, settings)
        tokens = laws.tokens.clone()
        for i in range(1, tokens.shape[1]):
            tokens[:, i] = laws.draft_probs[:, i - 1].argmax(-1)
        return (
            dataclasses.replace(laws, tokens=tokens),
            dataclasses.replace(drafter_state, tokens=tokens[:, :-1]),
            forwards,
        )

    # Depth 1, where the laws are those of the argmax chain as well.
    assert (
        law_error(
            TARGET,
            sampling._replace(propose=propose),
            policies.lossless(),
            controllers.fixed(1),
            prompt=[0],
            max_new_tokens=2,
        )
        > VISIBLE
    )
    assert error_of(greedy, policies.lossless()) < 1e-9


def test_residual_without_renormalising_is_rejected(monkeypatch):
    def cut_short(weights, uniform):
        # The weights are taken for probabilities: what is missing to one falls to the last token.
        return (weights.cumsum(-1) <= uniform[:, None]).sum(-1).clamp_max(weights.shape[1] - 1)

    module = __import__("specdec_kernels.ops.verify", fromlist=["sample"])
    monkeypatch.setattr(module, "residual", lambda p, q: (p - q).clamp_min(0))
    monkeypatch.setattr(module, "sample", cut_short)
    assert error_of(*honest()) > VISIBLE


def test_dropping_a_draft_after_looking_at_it_is_rejected():
    sampling = drafters.draft_model(DRAFT)

    def propose(state, plan, settings):
        proposal, drafter_state, forwards = sampling.propose(state, plan, settings)
        if proposal.tokens.shape[1] == 1:
            return proposal, drafter_state, forwards
        probability = torch.stack(
            [
                proposal.draft_probs[torch.arange(len(proposal.tokens)), i - 1, proposal.tokens[:, i]]
                for i in range(1, proposal.tokens.shape[1])
            ],
            dim=1,
        )
        keep = (probability >= 0.3).long().cumprod(-1).bool()
        valid = proposal.valid & torch.cat([torch.ones_like(keep[:, :1]), keep], dim=1)
        return dataclasses.replace(proposal, valid=valid, sampled=proposal.sampled & valid), drafter_state, forwards

    assert error_of(sampling._replace(propose=propose), policies.lossless()) > VISIBLE


def test_block_verification_that_stops_at_the_first_rejection_is_rejected():
    block = policies.block()

    def verify(proposal, target, draws, sampling):
        patient = block.verify(proposal, target, draws, sampling)
        failed = (draws.accept >= patient.accept_prob) & proposal.valid
        failed[:, 0] = False
        # After the first failure every later coin fails as well.
        coins = torch.where(failed.long().cumsum(-1) > 0, 1.0, draws.accept)
        return block.verify(proposal, target, dataclasses.replace(draws, accept=coins), sampling)

    assert error_of(drafters.draft_model(DRAFT), block) < 1e-9
    assert error_of(drafters.draft_model(DRAFT), block._replace(verify=verify)) > VISIBLE


def test_uniforms_reused_between_rounds_are_rejected():
    target = from_table(torch.tensor([[0.3, -0.2], [-0.4, 0.5], [0.1, 0.2]], dtype=torch.float64))
    draft = tabular_draft(target, agreement=0.3)
    drafter, controller, sampling = drafters.draft_model(draft), controllers.fixed(1), Sampling(temperature=1.0)
    step = build_step(target, drafter, policies.lossless(), controller, sampling=sampling)

    def forgetful(state):
        after, info = step(dataclasses.replace(state, round=torch.zeros_like(state.round)))
        return dataclasses.replace(after, round=state.round + 1), info

    def error(candidate):
        state = init_state([[0]], model=target, drafter=drafter, controller=controller, max_new_tokens=3)
        written = output_law(candidate, state, nodes=2, memoryless=False)
        return total_variation(written, target_law(target, [0], max_new_tokens=3, sampling=sampling))

    assert error(step) < 1e-9
    assert error(forgetful) > VISIBLE


def test_a_cache_that_keeps_a_rejected_slot_is_rejected(monkeypatch):
    monkeypatch.setattr(
        "specdec.cache.keep",
        lambda cache, base, nodes, count: keep(
            cache, base, None if nodes is None else torch.where(nodes > 0, nodes - 1, nodes), count
        ),
    )
    assert error_of(drafters.draft_model(DRAFT, branching=(2, 1)), policies.lossless()) > VISIBLE


@pytest.mark.parametrize("policy", [policies.lossless, policies.block])
def test_a_token_the_target_excludes_is_never_written(policy):
    table = torch.tensor([[0.0, 0.0, -torch.inf]], dtype=torch.float64)
    target = from_table(table)
    draft = from_table(torch.zeros(1, 3, dtype=torch.float64))
    error = law_error(target, drafters.draft_model(draft), policy(), controllers.fixed(2), prompt=[0], max_new_tokens=3)
    assert error < 1e-9

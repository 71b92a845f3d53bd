"""Wrappers see everything and change nothing."""

import dataclasses

import pytest
import torch

from specdec import controllers, drafters, output_tokens, policies
from specdec.models.tabular import tabular, tabular_draft
from specdec.sampling import Sampling
from specdec.state import init_state
from specdec.step import build_step, iterate
from specdec.transforms import Parts, timed_parts, with_checks, with_timing, with_trace
from specdec_kernels.clock import Clock

TARGET = tabular(5, seed=1)
PARTS = Parts(
    TARGET,
    drafters.draft_model(tabular_draft(TARGET, agreement=0.6)),
    policies.lossless(),
    controllers.fixed(3),
)
SAMPLING = Sampling(temperature=1.0)


def run(parts, wrap=lambda step: step):
    step = wrap(build_step(*parts, sampling=SAMPLING))
    state = init_state(
        [[1, 2]], model=parts.model, drafter=parts.drafter, controller=parts.controller, max_new_tokens=20
    )
    rounds = list(iterate(step, state))
    return output_tokens(rounds[-1][0]), [info for _, info in rounds]


def test_timing_splits_the_round():
    clock = Clock()
    timed, infos = run(timed_parts(PARTS, clock), lambda step: with_timing(step, clock))
    assert timed == run(PARTS)[0]
    for info in infos:
        assert set(info.timing) >= {"draft", "verify", "accept", "total"}
        assert info.timing["total"] >= info.timing["draft"] + info.timing["verify"] + info.timing["accept"]


def test_trace_shows_every_round():
    seen = []
    _, infos = run(PARTS, lambda step: with_trace(step, lambda state, info: seen.append(info)))
    assert seen == infos


def test_checks_pass_honest_parts_and_stop_broken_ones():
    assert run(PARTS, with_checks)[0] == run(PARTS)[0]

    def too_many(proposal, target, draws, sampling):
        verdict = PARTS.policy.verify(proposal, target, draws, sampling)
        path = torch.where(verdict.path < 0, 1, verdict.path)
        return dataclasses.replace(verdict, path=path)

    with pytest.raises(ValueError, match="past num_accepted"):
        run(PARTS._replace(policy=PARTS.policy._replace(verify=too_many)), with_checks)

    def orphan(state, plan, sampling):
        proposal, drafter_state, forwards = PARTS.drafter.propose(state, plan, sampling)
        valid = proposal.valid.clone()
        valid[:, 1] = False
        return dataclasses.replace(proposal, valid=valid), drafter_state, forwards

    with pytest.raises(ValueError, match="below an invalid one"):
        run(PARTS._replace(drafter=PARTS.drafter._replace(propose=orphan)), with_checks)

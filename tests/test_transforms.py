"""Wrappers see everything and change nothing."""

import dataclasses
import time

import pytest
import torch

from specdec import controllers, drafters, output_tokens, policies
from specdec.cache import keep
from specdec.models.tabular import tabular, tabular_draft
from specdec.sampling import Sampling
from specdec.state import init_state
from specdec.step import build_step, iterate
from specdec.transforms import Parts, spanned_function, timed_parts, with_checks, with_timing, with_trace
from specdec_kernels.clock import Clock, Timer

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


class Hands(Timer):
    """A clock that stands still until a part of the round moves it."""

    def __init__(self):
        self.now = 0.0

    def mark(self):
        return self.now

    def taking(self, seconds, function):
        def slow(*args, **kwargs):
            self.now += seconds
            return function(*args, **kwargs)

        return slow


COSTS = {"verify": 20.0, "draft": 3.0, "accept": 2.0, "sampling": 1.0, "cache": 1.0}


def test_every_part_has_its_own_time_and_they_sum_to_the_wall_time():
    hands = Hands()
    clock = Clock(timer=hands)
    model, drafter, policy, controller = PARTS
    slow = Parts(
        model._replace(forward=hands.taking(COSTS["verify"], model.forward)),
        drafter._replace(propose=hands.taking(COSTS["draft"], drafter.propose)),
        policy._replace(
            draw=hands.taking(COSTS["sampling"], policy.draw), verify=hands.taking(COSTS["accept"], policy.verify)
        ),
        # Bookkeeping that no phase has a name for.
        controller._replace(plan=hands.taking(0.5, controller.plan)),
    )
    timed_keep = spanned_function("cache", hands.taking(COSTS["cache"], keep), clock.span)
    timed = timed_parts(slow, clock)
    step = with_timing(build_step(*timed, sampling=SAMPLING, keep=timed_keep), clock)
    state = init_state([[1, 2]], model=timed.model, drafter=timed.drafter, controller=controller, max_new_tokens=20)
    begin, count, phases = hands.now, 0, {}
    for _, info in iterate(step, state):
        count += 1
        for name, seconds in info.timing.items():
            phases[name] = phases.get(name, 0.0) + seconds
    wall, total = hands.now - begin, phases.pop("total")
    assert total == pytest.approx(wall)
    assert phases.pop("host") == pytest.approx(0.5 * count)
    assert phases == {name: pytest.approx(seconds * count) for name, seconds in COSTS.items()}
    assert sum(phases.values()) == pytest.approx(wall, rel=0.05)


def test_a_step_that_is_not_wrapped_reads_no_clock(monkeypatch):
    expected = run(PARTS)[0]
    clock = Clock()
    with_timing(build_step(*timed_parts(PARTS, clock), sampling=SAMPLING), clock)

    def read(*args):
        raise AssertionError("nobody asked for the time")

    for name in ("time", "perf_counter", "perf_counter_ns", "monotonic", "process_time"):
        monkeypatch.setattr(time, name, read)
    monkeypatch.setattr(Clock, "span", read)
    step, state = (
        build_step(*PARTS, sampling=SAMPLING),
        init_state([[1, 2]], model=TARGET, drafter=PARTS.drafter, controller=PARTS.controller, max_new_tokens=20),
    )
    rounds = list(iterate(step, state))
    assert output_tokens(rounds[-1][0]) == expected
    assert all(info.timing is None for _, info in rounds)


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

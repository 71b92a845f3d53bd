"""Drafting ahead changes when drafts are made, never what is written."""

import pytest
import torch

from specdec import controllers, drafters, fork_state, output_tokens, policies
from specdec.graphs import graphed_parts
from specdec.models.synthetic import llama
from specdec.models.tabular import tabular, tabular_draft
from specdec.overlap import AheadMemo, accelerated, overlapped
from specdec.sampling import Sampling
from specdec.state import init_state, load_state, save_state
from specdec.step import build_step, iterate
from specdec.synthetic import guessing, random_text, steer
from specdec.transforms import Parts, with_checks
from specdec_kernels.graphs import eager_recorder
from specdec_kernels.streams import Lane

TARGET = tabular(5, seed=1, sharpness=3.0)
DRAFT = tabular_draft(TARGET, agreement=0.9)
DRAFTERS = {
    "sampled": lambda: drafters.draft_model(DRAFT),
    "greedy": lambda: drafters.draft_model(DRAFT, mode="greedy"),
    "ngram": drafters.ngram,
    "suffix": drafters.suffix,
    "first": lambda: drafters.first_hit(drafters.ngram(min_ngram=2), drafters.draft_model(DRAFT)),
}


def run(parts, temperature, prompts=((1, 2), (3,), (2, 2, 2))):
    sampling = Sampling(temperature=temperature)
    step = with_checks(build_step(*parts, sampling=sampling))
    state = init_state(
        prompts, model=parts.model, drafter=parts.drafter, controller=parts.controller, max_new_tokens=40
    )
    *_, (state, _) = iterate(step, state)
    return output_tokens(state)


@pytest.mark.parametrize("controller", [controllers.fixed(3), controllers.adaptive()], ids=lambda made: made.name)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", DRAFTERS)
def test_the_tokens_are_the_same(name, temperature, controller):
    policy = policies.lossless() if temperature else policies.greedy()
    parts = Parts(TARGET, DRAFTERS[name](), policy, controller)
    made = overlapped(parts)
    assert run(made, temperature) == run(parts, temperature)
    assert made.model.about["overlap"].drafted > 0


def test_a_drafter_that_is_always_right_is_always_ahead():
    text = random_text(1, 60, TARGET.vocab_size)
    parts = Parts(steer(TARGET, text), guessing(text), policies.greedy(), controllers.fixed(3))
    made = overlapped(parts)
    written = run(made, 0.0, [text[0, :4].tolist()])
    assert written == [text[0, 4:44].tolist()]
    log = made.model.about["overlap"]
    # All but the first round find their proposal ready.
    assert log.used == log.drafted - 1
    wrong = overlapped(parts._replace(drafter=guessing((text + 1) % TARGET.vocab_size)))
    assert run(wrong, 0.0, [text[0, :4].tolist()]) == written
    assert wrong.model.about["overlap"].used == 0


def test_it_works_with_graphs():
    parts = Parts(TARGET, drafters.draft_model(DRAFT), policies.lossless(), controllers.fixed(3))
    made = overlapped(graphed_parts(parts, buckets=(1, 4, 8), recorder=eager_recorder))
    assert run(made, 1.0, [[1, 2]]) == run(parts, 1.0, [[1, 2]])
    assert made.model.about["overlap"].used > 0


def test_forks_and_stored_states_go_on_without_what_was_ahead(tmp_path):
    parts = overlapped(Parts(TARGET, drafters.draft_model(DRAFT), policies.lossless(), controllers.fixed(3)))
    step = build_step(*parts, sampling=Sampling(temperature=1.0))
    state = init_state(
        [[1, 2]], model=parts.model, drafter=parts.drafter, controller=parts.controller, max_new_tokens=30
    )
    for _ in range(2):
        state, _ = step(state)
    assert state.drafter.memo.ahead is not None
    copy = fork_state(state)
    assert copy.drafter.memo.ahead is None
    save_state(state, tmp_path)
    stored = load_state(tmp_path)
    ends = [output_tokens(list(iterate(step, begin))[-1][0]) for begin in (state, copy, stored)]
    assert ends[0] == ends[1] == ends[2]


def test_trees_and_shared_caches_are_refused():
    tree = drafters.draft_model(DRAFT, branching=(2, 2))
    with pytest.raises(ValueError, match="trees"):
        overlapped(Parts(TARGET, tree, policies.lossless(), controllers.fixed(2)))
    model = llama("nano", "cpu", torch.float32)
    with pytest.raises(ValueError, match="own cache"):
        overlapped(Parts(model, drafters.early_exit(model, 1), policies.lossless(), controllers.fixed(2)))
    with pytest.raises(ValueError, match="event or barrier"):
        Lane(torch.device("cpu"), "fence")


def test_the_switches_change_nothing_off_the_gpu():
    parts = Parts(TARGET, drafters.ngram(), policies.greedy(), controllers.fixed(2))
    assert accelerated(parts, cuda_graph=True, parallel_streams=True, sync_mode="event") is parts


def test_a_memo_can_be_empty():
    assert AheadMemo().ahead is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("sync", ["event", "barrier"])
def test_two_streams_write_what_one_does(sync):
    target, draft = (llama("nano", "cuda", torch.bfloat16, seed=seed) for seed in (0, 0))
    parts = Parts(target, drafters.draft_model(draft, mode="greedy"), policies.greedy(), controllers.fixed(3))
    wanted = run(parts, 0.0)
    assert run(overlapped(parts, sync), 0.0) == wanted
    made = accelerated(parts, cuda_graph=True, parallel_streams=True, sync_mode=sync)
    assert run(made, 0.0) == wanted
    assert made.model.about["overlap"].used > 0

"""States can be forked, cut, saved and loaded, and decoding goes on bit for bit."""

import json

import pytest
import torch

from specdec import controllers, drafters, policies
from specdec.cache import StaleCacheError
from specdec.models.tabular import from_table, tabular, tabular_draft
from specdec.sampling import Sampling
from specdec.state import fork_state, init_state, load_state, output_tokens, save_state, truncate_state
from specdec.step import build_step, decode, iterate
from specdec.types import STOP_REASONS, STOPPED_TEXT

TARGET = tabular(5, seed=4)
DRAFT = tabular_draft(TARGET, agreement=0.5)
SAMPLING = Sampling(temperature=0.9)
DRAFTERS = {
    "suffix": drafters.suffix(nodes=4),
    "model": drafters.draft_model(DRAFT),
    "tree": drafters.draft_model(DRAFT, branching=(2, 2)),
    "union": drafters.union(drafters.draft_model(DRAFT), drafters.ngram()),
}


def start(drafter, **options):
    controller = controllers.adaptive()
    step = build_step(TARGET, drafter, policies.lossless(), controller, sampling=SAMPLING)
    settings = {"max_new_tokens": 40, "seed": 3, **options}
    state = init_state([[1, 2, 3], [4]], model=TARGET, drafter=drafter, controller=controller, **settings)
    return step, state


def finish(step, state):
    final = state
    for final, _ in iterate(step, state):
        pass
    return output_tokens(final)


@pytest.mark.parametrize("name", DRAFTERS)
def test_a_saved_state_resumes_bit_for_bit(name, tmp_path):
    step, state = start(DRAFTERS[name])
    for _ in range(4):
        state, _ = step(state)
    save_state(state, tmp_path / "state")
    assert finish(step, load_state(tmp_path / "state")) == finish(step, state)


@pytest.mark.parametrize("name", DRAFTERS)
def test_a_fork_decodes_on_alone(name):
    step, state = start(DRAFTERS[name])
    for _ in range(3):
        state, _ = step(state)
    fork = fork_state(state)
    first = finish(step, state)
    assert finish(step, fork) == first


def test_stepping_a_consumed_state_raises():
    step, state = start(drafters.ngram())
    step(state)
    with pytest.raises(StaleCacheError, match="fork"):
        step(state)


def test_truncation_forgets_and_decoding_can_go_on():
    step, state = start(drafters.suffix())
    for _ in range(5):
        state, _ = step(state)
    length = state.prompt_length + 2
    cut = truncate_state(state, length, STOPPED_TEXT)
    assert [len(tokens) for tokens in output_tokens(cut)] == [2, 2]
    assert [STOP_REASONS[code] for code in cut.finish.tolist()] == ["stop_string", "stop_string"]
    assert torch.equal(cut.cache.length, cut.length - 1)
    assert torch.equal(cut.metrics.emitted, torch.tensor([2, 2]))


def test_loading_refuses_what_it_does_not_know(tmp_path):
    with pytest.raises(ValueError, match="holds no saved state"):
        load_state(tmp_path)
    _, state = start(drafters.ngram())
    save_state(state, tmp_path)
    description = json.loads((tmp_path / "state.json").read_text())
    (tmp_path / "state.json").write_text(json.dumps({**description, "format": 99}))
    with pytest.raises(ValueError, match="format 99"):
        load_state(tmp_path)
    text = json.dumps(description).replace("specdec.types.DecodeState", "os.system")
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(ValueError, match="unknown record type 'os\\.system'"):
        load_state(tmp_path)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "no prompts"),
        ([[1], []], "prompt 1 is empty"),
        ([[1, 9]], "token id 9"),
        ([[-2, 1]], "token id -2"),
        ([[1] * 4090], "exceed the model's context of 4096"),
    ],
)
def test_prompts_that_cannot_be_decoded_are_refused(prompts, message):
    with pytest.raises(ValueError, match=message):
        decode(
            prompts,
            model=TARGET,
            drafter=drafters.none(),
            policy=policies.greedy(),
            controller=controllers.fixed(0),
            max_new_tokens=10,
        )


def test_parts_that_do_not_fit_are_refused():
    tree = drafters.draft_model(DRAFT, branching=(2,))
    with pytest.raises(ValueError, match="verifies chains only"):
        build_step(TARGET, tree, policies.block(), controllers.fixed(1), sampling=SAMPLING)
    with pytest.raises(ValueError, match="decodes at temperature 0"):
        build_step(TARGET, tree, policies.greedy(), controllers.fixed(1), sampling=SAMPLING)
    stranger = drafters.draft_model(tabular(6))
    with pytest.raises(ValueError, match="vocabulary of 6 tokens and the target one of 5"):
        build_step(TARGET, stranger, policies.lossless(), controllers.fixed(1), sampling=SAMPLING)
    with pytest.raises(ValueError, match="must come first"):
        drafters.union(drafters.ngram(), drafters.draft_model(DRAFT))
    with pytest.raises(ValueError, match="cannot exit early"):
        drafters.early_exit(TARGET, 1)


def test_nan_logits_end_decoding_with_a_reason():
    broken = from_table(torch.full((1, 3), torch.nan))
    with pytest.raises(ValueError, match="NaN logits in row 0"):
        decode(
            [[0]],
            model=broken,
            drafter=drafters.none(),
            policy=policies.greedy(),
            controller=controllers.fixed(0),
            max_new_tokens=4,
        )

"""A difference is found where it begins, and rounding is told from a bug."""

import torch

from specdec import controllers, decode, drafters, output_tokens, policies
from specdec.divergence import first_divergence
from specdec.models.tabular import tabular

MODEL = tabular(6, seed=8)
PROMPT = [1, 2, 3]


def greedy_output():
    parts = {"drafter": drafters.none(), "policy": policies.greedy(), "controller": controllers.fixed(0)}
    return output_tokens(decode([PROMPT], model=MODEL, max_new_tokens=12, **parts))[0]


def test_identical_outputs_have_no_divergence():
    assert first_divergence(MODEL, PROMPT, greedy_output(), greedy_output()) is None


def test_a_wrong_token_on_an_exact_model_is_a_bug():
    tokens = greedy_output()
    wrong = [*tokens[:5], (tokens[5] + 1) % 6, *tokens[6:]]
    found = first_divergence(MODEL, PROMPT, wrong, tokens)
    assert (found.position, found.token, found.other) == (5, wrong[5], tokens[5])
    assert found.margin > 0
    assert found.noise == 0
    assert not found.numerics
    assert "a bug" in str(found)


def test_a_missing_end_is_a_bug_whatever_the_margin():
    tokens = greedy_output()
    found = first_divergence(MODEL, PROMPT, tokens[:7], tokens)
    assert (found.position, found.token, found.other) == (7, None, tokens[7])
    assert not found.numerics


def test_a_near_tie_within_the_models_own_noise_is_numerics():
    def noisy(cache, tokens, depth=None, visible=None, *, logits=True, features=False):
        scores, states, cache = MODEL.forward(cache, tokens, depth, visible, logits=logits, features=features)
        if scores is not None:
            scores = torch.zeros_like(scores)
            scores[..., 0], scores[..., 1] = 1.0, 1.0 + 1e-5 * (1 if tokens.shape[1] > 1 else -1)
        return scores, states, cache

    found = first_divergence(MODEL._replace(forward=noisy), PROMPT, [0, 1, 1], [0, 0, 1])
    assert found.position == 1
    assert found.numerics
    assert "numerics" in str(found)

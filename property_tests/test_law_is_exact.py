"""Every exact policy with every drafter shape and several controllers writes the target's law, by enumeration."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec import controllers, drafters, policies
from specdec.testing import Sampling, check_policy, law_error, samplings, tabular_models

TOLERANCE = 1e-9

# Each takes the draft model; depth 2 keeps the enumeration to seconds and still has a first, a middle and a last node.
SHAPES = {
    "none": lambda draft: drafters.none(),
    "ngram": lambda draft: drafters.ngram(),
    "ngram-tree": lambda draft: drafters.ngram(matches=2),
    "suffix": lambda draft: drafters.suffix(),
    "suffix-tree": lambda draft: drafters.suffix(nodes=3),
    "model-sampled": drafters.draft_model,
    "model-greedy": lambda draft: drafters.draft_model(draft, mode="greedy"),
    "first-hit": lambda draft: drafters.first_hit(drafters.ngram(min_ngram=2), drafters.draft_model(draft)),
    "union": lambda draft: drafters.union(drafters.draft_model(draft), drafters.ngram()),
    "model-tree": lambda draft: drafters.draft_model(draft, branching=(2, 1)),
    "model-tree-iid": lambda draft: drafters.draft_model(draft, branching=(2, 1), replacement=True),
    "model-tree-greedy": lambda draft: drafters.draft_model(draft, mode="greedy", branching=(2, 1)),
}
# Trees have tens of times the pieces of a chain, and an automaton is built for every piece.
HEAVY = {"model-tree", "model-tree-iid", "union", "suffix", "suffix-tree"}
POLICIES = {"lossless": policies.lossless, "match": policies.match, "block": policies.block}
CONTROLLERS = {
    "fixed": lambda: controllers.fixed(2),
    "aimd": lambda: controllers.aimd(1, max_k=2),
    "adaptive": lambda: controllers.adaptive(1, max_k=2, window=1),
    "expected": lambda: controllers.expected({1: 1.0, 3: 1.9}, max_k=2),
}
PROMPTS = st.sampled_from([[0], [1, 0, 1], [0, 1, 0, 1, 0], [1, 1, 1, 1]])


def examples(name: str) -> int:
    """A share of the profile's examples: one enumeration costs as much as hundreds of ordinary ones."""
    return max(2, settings().max_examples // (100 if name in HEAVY else 50))


def composable(shape: str, policy: str) -> bool:
    return policy != "block" or shape in {"none", "ngram", "suffix", "model-sampled", "model-greedy", "first-hit"}


@pytest.mark.parametrize(("shape", "policy"), [(s, p) for s in SHAPES for p in POLICIES if composable(s, p)])
def test_law_is_exact(shape, policy):
    @settings(max_examples=examples(shape))
    @given(
        models=tabular_models(),
        sampling=samplings(),
        prompt=PROMPTS,
        controller=st.sampled_from(list(CONTROLLERS)),
        eos=st.sampled_from([(), (2,), (1, 2)]),
    )
    def judge(models, sampling, prompt, controller, eos):
        target, draft = models
        error = law_error(
            target,
            SHAPES[shape](draft),
            POLICIES[policy](),
            CONTROLLERS[controller](),
            prompt=prompt,
            max_new_tokens=3,
            sampling=sampling,
            eos_ids=eos,
        )
        assert error < TOLERANCE

    judge()


@pytest.mark.parametrize("shape", ["model-sampled", "ngram"])
@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=2)
@given(models=tabular_models(vocab_size=2))
def test_law_is_exact_over_all_rounds_at_once(shape, policy, models):
    target, draft = models
    error = law_error(
        target,
        SHAPES[shape](draft),
        POLICIES[policy](),
        controllers.fixed(1),
        prompt=[0, 1],
        max_new_tokens=2,
        memoryless=False,
    )
    assert error < TOLERANCE


@settings(max_examples=3)
@given(models=tabular_models(), sampling=samplings(greedy=True))
def test_greedy_writes_the_one_text_of_temperature_zero(models, sampling):
    target, draft = models
    sampling = Sampling(temperature=0.0, repetition_penalty=sampling.repetition_penalty)
    for drafter in (drafters.ngram(), drafters.draft_model(draft, mode="greedy", branching=(2, 1))):
        error = law_error(
            target, drafter, policies.greedy(), controllers.fixed(2), prompt=[0, 1], max_new_tokens=4, sampling=sampling
        )
        assert error < TOLERANCE


@pytest.mark.parametrize("policy", [policies.greedy, policies.lossless, policies.match, policies.block])
def test_check_policy_accepts_every_policy_that_claims_exactness(policy):
    assert policy().exact
    assert check_policy(policy()) < TOLERANCE

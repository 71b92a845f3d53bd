"""What every round and every decode must satisfy, whatever the parts."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec import controllers, decode, drafters, output_tokens, policies
from specdec.metrics import summarize
from specdec.sampling import Sampling
from specdec.state import init_state
from specdec.step import build_step
from specdec.testing import tabular_models
from specdec.transforms import with_checks

# A decode with every round checked costs as much as dozens of ordinary examples.
few = settings(max_examples=max(10, settings().max_examples // 5))
VOCAB = 5
SAMPLING = Sampling(temperature=0.8)
MODELS = tabular_models(vocab_size=VOCAB)
PROMPTS = st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=7), min_size=1, max_size=3)
DRAFTERS = {
    "none": lambda draft: drafters.none(),
    "ngram": lambda draft: drafters.ngram(),
    "ngram-tree": lambda draft: drafters.ngram(matches=3),
    "suffix": lambda draft: drafters.suffix(),
    "suffix-tree": lambda draft: drafters.suffix(nodes=5, min_share=0.1),
    "model": drafters.draft_model,
    "model-greedy": lambda draft: drafters.draft_model(draft, mode="greedy"),
    "model-coupled": lambda draft: drafters.draft_model(draft, mode="coupled"),
    "model-tree": lambda draft: drafters.draft_model(draft, branching=(2, 2)),
    "first": lambda draft: drafters.first_hit(drafters.ngram(min_ngram=2), drafters.draft_model(draft)),
    "union": lambda draft: drafters.union(drafters.draft_model(draft), drafters.ngram(matches=2)),
}
POLICIES = {
    "greedy": policies.greedy,
    "lossless": policies.lossless,
    "block": policies.block,
    "match": policies.match,
    "coupled": policies.coupled,
}
CONTROLLERS = {
    "fixed": lambda: controllers.fixed(3),
    "adaptive": lambda: controllers.adaptive(2, max_k=4),
    "aimd": lambda: controllers.aimd(2, max_k=5),
    "expected": lambda: controllers.expected({1: 1.0, 2: 1.1, 6: 2.0}, max_k=4, draft_cost=0.1),
}


@st.composite
def parts(draw):
    target, draft = draw(MODELS)
    drafter = DRAFTERS[draw(st.sampled_from(list(DRAFTERS)))](draft)
    policy = POLICIES[draw(st.sampled_from(list(POLICIES)))]()
    if policy.chain_only and not drafter.chain:
        policy = policies.lossless()
    controller = CONTROLLERS[draw(st.sampled_from(list(CONTROLLERS)))]()
    sampling = Sampling() if policy.greedy_only else SAMPLING
    return {"model": target, "drafter": drafter, "policy": policy, "controller": controller}, sampling


def run(composed, sampling, prompts, *, max_new_tokens=9, eos_ids=(), seed=0):
    """All rounds of a decode with every invariant checked: the final state and the infos."""
    step = with_checks(build_step(**composed, sampling=sampling, eos_ids=eos_ids))
    without_policy = {name: part for name, part in composed.items() if name != "policy"}
    state = init_state(prompts, **without_policy, max_new_tokens=max_new_tokens, seed=seed)
    infos = []
    while not bool(state.done.all()):
        state, info = step(state)
        infos.append(info)
    return state, infos


@few
@given(parts(), PROMPTS)
def test_output_extends_prompt(composed, prompts):
    state, _ = run(*composed, prompts)
    for row, prompt in enumerate(prompts):
        assert state.tokens[row, : len(prompt)].tolist() == prompt
        assert len(output_tokens(state)[row]) == 9


@few
@given(parts(), PROMPTS, st.sampled_from([(0,), (1, 3), (2, 4)]))
def test_output_ends_at_the_first_eos(composed, prompts, eos):
    state, _ = run(*composed, prompts, eos_ids=eos)
    free, _ = run(*composed, prompts)
    for row, tokens in enumerate(output_tokens(state)):
        assert not set(tokens[:-1]) & set(eos)
        assert len(tokens) == 9 or tokens[-1] in eos
        whole = output_tokens(free)[row]
        assert tokens == whole[: len(tokens)]


@few
@given(parts(), PROMPTS)
def test_round_emits_one_more_than_accepted(composed, prompts):
    _, infos = run(*composed, prompts)
    for info in infos:
        emitted = info.verdict.num_accepted + 1
        assert torch.equal(info.num_emitted, torch.where(info.running, emitted, 0))
        assert torch.equal((info.emitted >= 0).sum(-1), info.num_emitted)


@few
@given(parts(), PROMPTS)
def test_controller_bounds(composed, prompts):
    _, infos = run(*composed, prompts)
    for info in infos:
        assert int(info.plan.depth.min()) >= 0
        assert int(info.plan.depth.max()) == info.plan.max_depth <= composed[0]["controller"].max_depth


@few
@given(parts(), PROMPTS)
def test_metrics_count_what_happened(composed, prompts):
    state, infos = run(*composed, prompts)
    summary = summarize(state.metrics)
    assert summary["rounds"] == sum(int(info.running.sum()) for info in infos)
    assert summary["emitted"] == sum(int(info.num_emitted.sum()) for info in infos) == 9 * len(prompts)
    assert summary["emitted"] == summary["accepted"] + summary["rounds"]
    drafted = sum(int(((info.proposal.valid.sum(-1) - 1) * info.running).sum()) for info in infos)
    assert summary["drafted"] == drafted


@few
@given(parts(), PROMPTS)
def test_batch_invariance(composed, prompts):
    state, _ = run(*composed, prompts, seed=11)
    for row, prompt in enumerate(prompts):
        alone, _ = run(*composed, [prompt], seed=11 + row)
        assert output_tokens(alone)[0] == output_tokens(state)[row]


@few
@given(parts(), PROMPTS, st.randoms(use_true_random=False))
def test_permutation_equivariance(composed, prompts, random):
    order = list(range(len(prompts)))
    random.shuffle(order)
    straight, _ = run(*composed, prompts, seed=[100 + row for row in range(len(prompts))])
    shuffled, _ = run(*composed, [prompts[row] for row in order], seed=[100 + row for row in order])
    assert [output_tokens(straight)[row] for row in order] == output_tokens(shuffled)


@few
@given(MODELS, PROMPTS)
def test_perfect_drafter_accepts_all(models, prompts):
    target, _ = models
    for policy in (policies.lossless(), policies.block()):
        composed = {"model": target, "drafter": drafters.draft_model(target), "policy": policy}
        _, infos = run({**composed, "controller": controllers.fixed(3)}, SAMPLING, prompts)
        for info in infos:
            drafted = info.proposal.valid.sum(-1) - 1
            assert torch.equal(info.verdict.num_accepted[info.running], drafted[info.running])


@few
@given(MODELS, PROMPTS, st.sampled_from(["greedy", "coupled"]), st.sampled_from(list(DRAFTERS)))
def test_output_does_not_depend_on_the_drafter(models, prompts, policy, drafter):
    target, draft = models
    sampling = Sampling() if policy == "greedy" else SAMPLING
    outputs = []
    for name, k in (("none", 0), (drafter, 2), (drafter, 4)):
        state = decode(
            prompts,
            model=target,
            drafter=DRAFTERS[name](draft),
            policy=POLICIES[policy](),
            controller=controllers.fixed(k),
            max_new_tokens=9,
            sampling=sampling,
        )
        outputs.append(output_tokens(state))
    assert outputs[0] == outputs[1] == outputs[2]


@few
@given(MODELS, PROMPTS)
def test_fixed_drafts_exactly_k_in_every_round_that_can(models, prompts):
    target, draft = models
    composed = {
        "model": target,
        "drafter": drafters.draft_model(draft),
        "policy": policies.lossless(),
        "controller": controllers.fixed(3),
    }
    step = build_step(**composed, sampling=SAMPLING)
    del composed["policy"]
    state = init_state(prompts, **composed, max_new_tokens=12)
    while not bool(state.done.all()):
        room = state.limit - state.length - 1
        after, info = step(state)
        drafted = info.proposal.valid.sum(-1) - 1
        assert torch.equal(drafted[info.running], room.clamp_max(3)[info.running])
        state = after

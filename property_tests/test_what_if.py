"""What-if equals really running, wherever it says that it is exact; replay gives back every token."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.registry import (
    build_controller,
    build_drafter,
    build_policy,
    parse_controller,
    parse_drafter,
    parse_policy,
)
from specdec.run import Job, decode_rounds
from specdec.sampling import Sampling
from specdec.target import load_target
from specdec.text import TextRule
from specdec.trace.recorder import Choices, Recorder
from specdec.trace.replay import replay
from specdec.trace.what_if import what_if
from specdec.transforms import Parts

few = settings(max_examples=max(12, settings().max_examples // 3))
COSTS = {1: 1.0, 4: 1.2, 8: 1.7}
SETTINGS = st.sampled_from([(0.0, "greedy"), (0.0, "lossless"), (0.9, "coupled")])
TEXT_ONLY = [
    "ngram",
    "ngram:matches=3",
    "suffix",
    "suffix:nodes=4,min_share=0.1",
    "none",
    "first(ngram:min_ngram=2, suffix)",
]
CONTROLLERS = st.one_of(
    st.integers(1, 8).map("fixed:k={}".format),
    st.sampled_from(["adaptive:k=2,max_k=6", "aimd:k=2,max_k=8", "expected:max_k=6,draft_cost=0.1"]),
)
PROMPTS = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=9), min_size=1, max_size=2)


def decode(prompts, drafter, policy, controller, temperature, *, seed=0, model_seed=3, eos=True):
    """The traces of a batch, and what each of its samples did: committed tokens and drafted depths by round."""
    loaded = load_target(f"tabular:vocab_size=6,seed={model_seed},sharpness=3", {"device": "cpu"}, lambda *a: None)
    sampling = Sampling(temperature)
    drafting = build_drafter(
        parse_drafter(drafter), target=loaded, sampling=sampling, policy=policy, load_draft=lambda name: loaded
    )
    chosen = build_controller(parse_controller(controller), target=loaded.model, drafts=(), costs=lambda model: COSTS)
    parts = Parts(loaded.model, drafting.drafter, build_policy(parse_policy(policy)), chosen)
    rule = TextRule(lambda ids: "".join("abcdef"[token] for token in ids))
    job = Job(parts, prompts, sampling, rule, (5,) if eos else (), 18, seed)
    recorder = Recorder(job, Choices(drafter, policy, controller), costs=COSTS)
    rows = [[] for _ in prompts]
    before = [len(prompt) for prompt in prompts]
    for progress in decode_rounds(recorder.job):
        recorder.observe(progress)
        if progress.info is not None:
            now, accepted = progress.state.length.tolist(), progress.info.verdict.num_accepted.tolist()
            for row, ran in enumerate(progress.info.running.tolist()):
                if ran:
                    depth = int(progress.info.proposal.shape.deepest[row])
                    count = now[row] - before[row]
                    rows[row].append((count, depth, min(accepted[row], count)))
            before = now
    return recorder.traces(), rows


def same(trace, rows, **changed):
    found = what_if(trace, **changed)
    assert found.kind == "exact", found.reason
    assert list(zip(found.emitted, found.depths, found.accepted, strict=True)) == rows
    assert found.rounds.value == len(rows)


@few
@given(
    PROMPTS,
    SETTINGS,
    st.sampled_from(TEXT_ONLY),
    st.sampled_from(TEXT_ONLY),
    CONTROLLERS,
    CONTROLLERS,
    st.integers(0, 99),
)
def test_lookup_drafters_are_told_exactly(prompts, setting, drafter, other, controller, second, seed):
    temperature, policy = setting
    traces, _ = decode(prompts, drafter, policy, controller, temperature, model_seed=seed)
    _, real = decode(prompts, other, policy, second, temperature, model_seed=seed)
    for trace, rows in zip(traces, real, strict=True):
        assert replay(trace) is None
        same(trace, rows, drafter=other, controller=second)


@few
@given(
    PROMPTS,
    SETTINGS,
    st.sampled_from(["model:agreement=0.3", "model:agreement=0.8", "model:agreement=1"]),
    CONTROLLERS,
    CONTROLLERS,
    st.integers(0, 99),
)
def test_draft_models_are_told_exactly(prompts, setting, drafter, controller, second, seed):
    temperature, policy = setting
    traces, _ = decode(prompts, drafter, policy, controller, temperature, model_seed=seed)
    _, real = decode(prompts, drafter, policy, second, temperature, model_seed=seed)
    for trace, rows in zip(traces, real, strict=True):
        assert replay(trace) is None
        same(trace, rows, controller=second)


@few
@given(
    PROMPTS,
    st.sampled_from(["lossless", "block", "match", "coupled"]),
    st.sampled_from(
        [
            "model",
            "model:mode=greedy",
            "model:tree=2x2",
            "model:tree=3x1,replacement=true",
            "ngram",
            "ngram:matches=2",
            "union(model, suffix)",
        ]
    ),
    CONTROLLERS,
    st.floats(0.3, 1.5),
    st.integers(0, 2**30),
)
def test_replay_gives_back_every_token(prompts, policy, drafter, controller, temperature, seed):
    if policy == "block" and ("tree" in drafter or "matches" in drafter or "union" in drafter):
        policy = "lossless"
    traces, _ = decode(prompts, drafter, policy, controller, temperature, seed=seed, model_seed=seed % 50)
    for trace in traces:
        assert (found := replay(trace)) is None, str(found)


@pytest.mark.parametrize("policy", ["lossless", "block", "match"])
def test_an_estimate_is_labelled_and_holds_what_happens(policy):
    lengths = []
    traces, _ = decode([[0, 1, 2]] * 40, "model:agreement=0.7", policy, "fixed:k=4", 1.0, eos=False)
    for seed in range(2):
        _, rows = decode([[0, 1, 2]] * 40, "model:agreement=0.7", policy, "fixed:k=2", 1.0, seed=1000 * seed, eos=False)
        lengths += [len(row) for row in rows]
    found = [what_if(trace, k=2) for trace in traces]
    assert {outcome.kind for outcome in found} == {"estimate"}
    assert all(outcome.rounds.low <= outcome.rounds.value <= outcome.rounds.high for outcome in found)
    told = sum(outcome.rounds.value for outcome in found) / len(found)
    assert abs(told - sum(lengths) / len(lengths)) < 1.0

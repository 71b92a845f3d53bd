"""What users run on their own drafters, policies and controllers: strategies, conformance checks and the judge.

Needs `hypothesis` (`pip install specdec-lab[testing]`). `check_policy` and `check_drafter` are the short way in;
`output_law` and `target_law` (from `specdec.law`) give the laws themselves.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st

from specdec.checks import check_proposal, check_verdict
from specdec.controllers import fixed
from specdec.drafters import draft_model, ngram
from specdec.law import Law, ScriptedKey, output_law, target_law, total_variation
from specdec.models.tabular import tabular, tabular_draft
from specdec.sampling import Sampling
from specdec.state import init_state
from specdec.step import build_step
from specdec.transforms import with_checks
from specdec.types import Controller, Drafter, Model, Policy, Proposal, Target

# What Hypothesis hands to a composite strategy; its own protocol cannot be checked at run time.
Draw = Callable[..., Any]

__all__ = [
    "Law",
    "ScriptedKey",
    "check_drafter",
    "check_policy",
    "check_proposal",
    "check_verdict",
    "law_error",
    "output_law",
    "proposals",
    "samplings",
    "tabular_models",
    "target_law",
    "targets",
    "total_variation",
]


def law_error(
    model: Model,
    drafter: Drafter,
    policy: Policy,
    controller: Controller,
    *,
    prompt: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    eos_ids: Sequence[int] = (),
    memoryless: bool = True,
) -> float:
    """Total variation between what these parts write and what plain decoding of `model` writes; 0 up to rounding for
    an exact composition. Cost grows with vocab_size ** depth: use vocabularies of 2 to 4 and depths up to 3."""
    sampling = sampling or Sampling(temperature=1.0)
    step = build_step(model, drafter, policy, controller, sampling=sampling, eos_ids=eos_ids)
    state = init_state([prompt], model=model, drafter=drafter, controller=controller, max_new_tokens=max_new_tokens)
    nodes = drafter.max_nodes(controller.max_depth)
    written = output_law(step, state, nodes=nodes, memoryless=memoryless)
    wanted = target_law(model, prompt, max_new_tokens=max_new_tokens, sampling=sampling, eos_ids=eos_ids)
    return total_variation(written, wanted)


def check_policy(policy: Policy, *, tolerance: float = 1e-9, seed: int = 0) -> float:
    """Judge a policy with point-mass and sampled chains and, unless `chain_only`, a sampled tree.

    Returns the largest error found; raises `ValueError` when a policy that claims to be `exact` exceeds `tolerance`.
    """
    target = tabular(3, seed=seed)
    draft = tabular_draft(target, agreement=0.4, seed=seed + 1)
    drafters = [ngram(), draft_model(draft)]
    if not policy.chain_only:
        drafters.append(draft_model(draft, branching=(2, 1)))
    sampling = Sampling(temperature=0.0 if policy.greedy_only else 1.0)
    worst = 0.0
    for drafter in drafters:
        error = law_error(
            target, drafter, policy, fixed(2), prompt=[0, 1, 0], max_new_tokens=3, sampling=sampling, eos_ids=(2,)
        )
        if policy.exact and error > tolerance:
            raise ValueError(
                f"policy {policy.name!r} claims to be exact, but with drafter {drafter.name!r} its output law is "
                f"off by {error:.3g} in total variation"
            )
        worst = max(worst, error)
    return worst


def check_drafter(
    drafter: Drafter, model: Model, policy: Policy, *, prompts: Sequence[Sequence[int]], depth: int = 4
) -> None:
    """Decode `prompts` with every round checked (`transforms.with_checks`); raises `ValueError` at the first
    violation."""
    controller = fixed(depth)
    sampling = Sampling(temperature=0.0 if policy.greedy_only else 1.0)
    step = with_checks(build_step(model, drafter, policy, controller, sampling=sampling))
    state = init_state(prompts, model=model, drafter=drafter, controller=controller, max_new_tokens=4 * depth)
    while not bool(state.done.all()):
        state, info = step(state)
        if info.proposal.tokens.shape[1] > drafter.max_nodes(depth):
            raise ValueError(
                f"drafter {drafter.name!r} proposed {info.proposal.tokens.shape[1]} nodes and promised at most "
                f"{drafter.max_nodes(depth)} (max_nodes)"
            )


def samplings(*, greedy: bool = False) -> st.SearchStrategy[Sampling]:
    """Sampling settings with every transform on or off."""
    return st.builds(
        Sampling,
        temperature=st.just(0.0) if greedy else st.sampled_from([0.3, 0.7, 1.0, 1.5]),
        top_k=st.sampled_from([0, 0, 1, 2]),
        top_p=st.sampled_from([1.0, 1.0, 0.6, 0.9]),
        min_p=st.sampled_from([0.0, 0.0, 0.2]),
        repetition_penalty=st.sampled_from([1.0, 1.0, 1.3]),
    )


@st.composite
def tabular_models(draw: Draw, vocab_size: int = 3) -> tuple[Model, Model]:
    """A target and a draft model of any agreement, from equal to unrelated."""
    seed = draw(st.integers(0, 2**20))
    target = tabular(vocab_size, seed=seed, sharpness=draw(st.sampled_from([0.5, 1.0, 3.0])))
    return target, tabular_draft(target, agreement=draw(st.sampled_from([0.0, 0.4, 0.9, 1.0])), seed=seed + 1)


@st.composite
def proposals(
    draw: Draw, *, max_rows: int = 3, max_nodes: int = 7, vocab_size: int = 4, chain: bool = False
) -> Proposal:
    """Well-formed proposals of any shape: point masses, sampled nodes and padding mixed, with consistent laws."""
    rows, n = draw(st.integers(1, max_rows)), draw(st.integers(1, max_nodes))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    parents = torch.full((rows, n), -1)
    for i in range(1, n):
        parents[:, i] = i - 1 if chain else torch.randint(0, i, (rows,), generator=generator)
    valid = torch.ones(rows, n, dtype=torch.bool)
    drop = torch.rand(rows, n, generator=generator) < 0.2
    for i in range(1, n):
        valid[:, i] = ~drop[:, i] & valid.gather(1, parents[:, i : i + 1])[:, 0]
    tokens = torch.randint(0, vocab_size, (rows, n), generator=generator)
    laws: Any = None
    sampled = torch.zeros_like(valid)
    if draw(st.booleans()):
        laws = torch.softmax(torch.randn(rows, n, vocab_size, generator=generator, dtype=torch.float64), -1)
        sampled = valid & (torch.rand(rows, n, generator=generator) < 0.7)
        sampled[:, 0] = False
    return Proposal(tokens, parents, valid, sampled, laws, True, chain)


@st.composite
def targets(draw: Draw, proposal: Proposal, vocab_size: int = 4) -> Target:
    """Random float64 logits for a proposal."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rows, n = proposal.tokens.shape
    return Target(2 * torch.randn(rows, n, vocab_size, generator=generator, dtype=torch.float64))

"""The algorithm on one screen: a round is a pure function, and decoding is its iteration."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from specdec import cache as kv
from specdec import metrics as counters
from specdec import tree
from specdec.arrays import iota
from specdec.cache import KVCache
from specdec.sampling import Sampling
from specdec.scoring import score
from specdec.state import init_state
from specdec.types import (
    FAILED,
    RUNNING,
    Controller,
    DecodeState,
    Drafter,
    Model,
    Policy,
    Step,
    StepInfo,
)
from specdec_kernels.dispatch import resolve

D = TypeVar("D")
C = TypeVar("C")


def build_step(
    model: Model,
    drafter: Drafter,
    policy: Policy,
    controller: Controller,
    *,
    sampling: Sampling | None = None,
    eos_ids: Sequence[int] = (),
    keep: Callable[..., KVCache] | None = None,
) -> Step[Any, Any]:
    """Compose one round of speculative decoding: plan, propose, score, draw, verify, stop, commit, observe.

    The step consumes the state it is given (its cache handle) and returns the next one with what happened. `keep`
    stands in for `cache.keep`, so that it can be timed. Raises `ValueError` for parts that do not fit together.
    """
    sampling = sampling or Sampling()
    ends = tuple(eos_ids)
    check_parts(model, drafter, policy, sampling)
    keep_slots = keep or kv.keep

    def step(state: DecodeState[Any, Any]) -> tuple[DecodeState[Any, Any], StepInfo]:
        running = state.finish == RUNNING
        room = (state.limit - state.length - 1) * running
        plan = controller.plan(state.controller, room)
        proposal, drafter_state, draft_forwards = drafter.propose(state, plan, sampling)
        proposal = tree.trim(proposal)
        target, cache = score(
            model,
            state.cache,
            proposal,
            tokens=state.tokens,
            length=state.length,
            sampling=sampling,
            features=drafter.features,
        )
        draws = policy.draw(state.key, state.round, proposal.shape.depth, state.length, model.vocab_size)
        verdict = policy.verify(proposal, target, draws, sampling)

        committed = resolve("commit", target.logits.device, target.logits.dtype, state.length.shape)(
            target.logits,
            proposal.tokens,
            verdict.path,
            verdict.num_accepted,
            verdict.next_token,
            state.tokens,
            state.length,
            state.limit,
            state.finish,
            eos_ids=ends,
            argmax=sampling.temperature == 0,
            chain=proposal.chain,
        )
        count = committed.num_emitted
        cache = keep_slots(cache, state.length - 1, committed.kept, count)
        info = StepInfo(plan, proposal, verdict, committed.emitted, count, running, draft_forwards)
        after = dataclasses.replace(
            state,
            tokens=committed.tokens,
            length=committed.length,
            finish=committed.finish,
            round=state.round + running,
            cache=cache,
            drafter=drafter_state,
            controller=controller.update(state.controller, info),
            metrics=counters.observe(
                state.metrics,
                depth=proposal.shape.deepest,
                accepted=verdict.num_accepted,
                drafted=proposal.drafted,
                emitted=count,
                running=running,
                draft_forwards=draft_forwards,
            ),
            features=_features_at(target.features, committed.kept, count, state.features),
        )
        return dataclasses.replace(after, drafter=drafter.observe(after, info)), info

    return step


def iterate(step: Step[D, C], state: DecodeState[D, C]) -> Iterator[tuple[DecodeState[D, C], StepInfo]]:
    """Yield the state and the info of every round until all rows are done.

    Raises `ValueError` when the model gave NaN logits: no token can be chosen from them.
    """
    while any_running(state):
        state, info = step(state)
        yield state, info


def decode(
    prompts: Sequence[Sequence[int]],
    *,
    model: Model,
    drafter: Drafter,
    policy: Policy,
    controller: Controller,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    eos_ids: Sequence[int] = (),
    seed: int | Sequence[int] = 0,
) -> DecodeState[Any, Any]:
    """Decode `prompts` (token ids) to the end and return the final state; see `state.output_tokens`."""
    step = build_step(model, drafter, policy, controller, sampling=sampling, eos_ids=eos_ids)
    state = init_state(
        prompts, model=model, drafter=drafter, controller=controller, max_new_tokens=max_new_tokens, seed=seed
    )
    final = state
    for final, _ in iterate(step, state):
        pass
    return final


def any_running(state: DecodeState[Any, Any]) -> bool:
    """Whether a row is still to be decoded: the loop's one look at the device."""
    finish = state.finish.tolist()
    if FAILED in finish:
        row = finish.index(FAILED)
        raise ValueError(
            f"the model returned NaN logits in row {row} after {int(state.length[row])} tokens; "
            "check the weights, or use a wider dtype"
        )
    return RUNNING in finish


def check_parts(model: Model, drafter: Drafter, policy: Policy, sampling: Sampling) -> None:
    """Raise `ValueError` when these parts cannot be composed, with the reason and a remedy."""
    if policy.chain_only and not drafter.chain:
        raise ValueError(
            f"policy {policy.name!r} verifies chains only and drafter {drafter.name!r} proposes trees; "
            "use policy 'lossless', or let the drafter propose a chain"
        )
    if policy.greedy_only and sampling.temperature > 0:
        raise ValueError(
            f"policy {policy.name!r} decodes at temperature 0, got temperature {sampling.temperature}; "
            "use policy 'lossless' to sample"
        )
    if drafter.vocab_size is not None and drafter.vocab_size != model.vocab_size:
        raise ValueError(
            f"drafter {drafter.name!r} has a vocabulary of {drafter.vocab_size} tokens and the target one of "
            f"{model.vocab_size}; use a draft model with the target's tokenizer (see models.vocabulary)"
        )


def _features_at(features: Tensor | None, nodes: Tensor | None, count: Tensor, before: Tensor | None) -> Tensor | None:
    """The features after the last token whose slot was kept; those of before in rows that committed nothing."""
    if features is None or before is None:
        return before
    rows, last = iota(len(count), count.device), (count - 1).clamp_min(0)
    last = last if nodes is None else nodes[rows, last]
    return torch.where((count > 0)[:, None], features[rows, last], before)

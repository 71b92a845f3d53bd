"""Drafters made of drafters: the first that has something, or all of them in one tree."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from specdec import tree
from specdec.records import record
from specdec.sampling import Sampling
from specdec.types import DecodeState, Drafter, Plan, Proposal, StepInfo


@record
class PairState:
    """The states of both drafters."""

    first: Any
    second: Any


def first_hit(first: Drafter, second: Drafter) -> Drafter:
    """Use `first` where it drafts something and `second` in the other rows; `second` is asked only if a row needs it.

    Whether `first` has something may depend on the committed text only, which holds for lookup drafters.
    """

    def propose(state: DecodeState[Any, Any], plan: Plan, sampling: Sampling) -> tuple[Proposal, PairState, int]:
        pair: PairState = state.drafter
        found, first_state, forwards = first.propose(dataclasses.replace(state, drafter=pair.first), plan, sampling)
        hit = found.valid.sum(-1) > 1
        if bool((hit | (plan.depth == 0)).all()):
            return found, PairState(first_state, pair.second), forwards
        other_state = dataclasses.replace(state, drafter=pair.second)
        other, second_state, more = second.propose(other_state, plan, sampling)
        return _choose_rows(hit, found, other), PairState(first_state, second_state), forwards + more

    return _pair("first", first, second, propose, chain=first.chain and second.chain)


def union(first: Drafter, second: Drafter) -> Drafter:
    """Both drafters' trees under one root. A drafter that samples must come first (see `tree.merge`)."""
    if second.vocab_size is not None:
        raise ValueError(
            f"in a union the drafter with a model must come first; put {second.name!r} before {first.name!r}"
        )

    def propose(state: DecodeState[Any, Any], plan: Plan, sampling: Sampling) -> tuple[Proposal, PairState, int]:
        pair: PairState = state.drafter
        one, first_state, forwards = first.propose(dataclasses.replace(state, drafter=pair.first), plan, sampling)
        other_state = dataclasses.replace(state, drafter=pair.second)
        two, second_state, more = second.propose(other_state, plan, sampling)
        return tree.merge(one, two), PairState(first_state, second_state), forwards + more

    return _pair("union", first, second, propose, chain=False)


def _pair(name: str, first: Drafter, second: Drafter, propose: Any, *, chain: bool) -> Drafter:
    def init(tokens: Tensor, length: Tensor, capacity: int) -> PairState:
        return PairState(first.init(tokens, length, capacity), second.init(tokens, length, capacity))

    def observe(state: DecodeState[Any, Any], info: StepInfo) -> PairState:
        pair: PairState = state.drafter
        return PairState(
            first.observe(dataclasses.replace(state, drafter=pair.first), info),
            second.observe(dataclasses.replace(state, drafter=pair.second), info),
        )

    sizes = {drafter.vocab_size for drafter in (first, second) if drafter.vocab_size is not None}
    if len(sizes) > 1:
        raise ValueError(
            f"{first.name!r} and {second.name!r} draft from vocabularies of different sizes: {sorted(sizes)}"
        )
    return Drafter(
        f"{name}({first.name}, {second.name})",
        init,
        propose,
        observe,
        chain=chain,
        max_nodes=lambda depth: first.max_nodes(depth) + second.max_nodes(depth) - 1,
        features=first.features or second.features,
        vocab_size=next(iter(sizes), None),
        shares_cache=first.shares_cache or second.shares_cache,
    )


def _choose_rows(hit: Tensor, first: Proposal, second: Proposal) -> Proposal:
    """Rows of `first` where `hit`, else of `second`, padded to the larger of both."""
    n = max(first.tokens.shape[1], second.tokens.shape[1])
    one, two = _padded(first, n), _padded(second, n)
    pick = hit[:, None]
    laws = [law for law in (one.draft_probs, two.draft_probs) if law is not None]
    probs = None
    if laws:
        zero = torch.zeros_like(laws[0])
        left, right = (zero if law is None else law for law in (one.draft_probs, two.draft_probs))
        probs = torch.where(pick[:, :, None], left, right)
    return Proposal(
        torch.where(pick, one.tokens, two.tokens),
        torch.where(pick, one.parents, two.parents),
        torch.where(pick, one.valid, two.valid),
        torch.where(pick, one.sampled, two.sampled),
        probs,
        first.replacement if first.draft_probs is not None else second.replacement,
        first.chain and second.chain,
    )


def _padded(proposal: Proposal, n: int) -> Proposal:
    """The same trees with padding nodes up to `n`, each hung on the node before it."""
    rows, have = proposal.tokens.shape
    if have == n:
        return proposal
    extra = n - have
    pad = torch.nn.functional.pad
    parents = tree.chain_parents(rows, n, proposal.tokens.device)[:, have:]
    return Proposal(
        torch.cat([proposal.tokens, proposal.tokens[:, :1].expand(-1, extra)], 1),
        torch.cat([proposal.parents, parents], 1),
        pad(proposal.valid, (0, extra)),
        pad(proposal.sampled, (0, extra)),
        None if proposal.draft_probs is None else pad(proposal.draft_probs, (0, 0, 0, extra)),
        proposal.replacement,
        proposal.chain,
    )

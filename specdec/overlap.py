"""Drafting while the target verifies: the next draft is begun as if everything will be accepted.

While the target's forward of a round runs, the drafter goes on from its own last draft: it guesses the token that the
target will add, and drafts the next round behind it, in a queue of its own. When the round ends as guessed, the next
proposal is there already; otherwise it is thrown away. A proposal that was made ahead is the one that the drafter would
have made afterwards, from the same text and with the uniforms of its own round, so the tokens are the same either way.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from specdec import tree
from specdec.arrays import iota
from specdec.cache import KVCache
from specdec.graphs import graphed_parts
from specdec.records import Memo, fields_of, is_record, record, register
from specdec.sampling import Sampling
from specdec.transforms import Parts
from specdec.types import DecodeState, Drafter, Plan, Proposal, StepInfo, Verdict
from specdec_kernels.ops.commit import append_tokens
from specdec_kernels.streams import Lane

_GREEDY = Sampling()


@dataclasses.dataclass
class OverlapLog:
    """How many proposals were made ahead of time, and how many of them were used."""

    drafted: int = 0
    used: int = 0

    def __str__(self) -> str:
        return f"{self.used} of {self.drafted} drafts made ahead were used"


@dataclasses.dataclass
class _Ahead:
    """A proposal made ahead: it is right for a text of `length` that ends with `guess`. `inputs` are what the lane may
    still be reading."""

    proposal: Proposal
    inner: Any
    forwards: int
    length: Tensor
    guess: Tensor
    inputs: Any


@register
class AheadMemo(Memo):
    """The proposal of the next round, once it has been begun."""

    def __init__(self) -> None:
        self.ahead: _Ahead | None = None


@record
class OverlapState:
    """The drafter's own state, and what was drafted ahead of it."""

    inner: Any
    memo: AheadMemo


def overlapped(parts: Parts, sync: str = "event") -> Parts:
    """`parts` with a drafter that works while the target does; `sync` as in `specdec_kernels.streams.Lane`.

    For drafters of chains: which branch of a tree will be accepted is not worth guessing. Gains time only where a
    device has several queues, or runs beside the host. `Model.about["overlap"]` is the `OverlapLog`. Raises
    `ValueError` for a drafter of trees or one that shares the target's cache, and for an unknown `sync`.
    """
    model, drafter = parts.model, parts.drafter
    if drafter.shares_cache:
        raise ValueError(
            f"drafter {drafter.name!r} drafts in the target's own cache, so it cannot work beside the target; use "
            "another drafter, or switch parallel_streams off"
        )
    if not drafter.chain:
        raise ValueError(
            f"drafter {drafter.name!r} proposes trees, which cannot be drafted ahead; use a chain, or switch "
            "parallel_streams off"
        )
    lane, log = Lane(model.device, sync), OverlapLog()
    # Begun by the drafter, run as soon as the target's forward has been launched.
    begun: list[Callable[[], None]] = []

    def init(tokens: Tensor, length: Tensor, capacity: int) -> OverlapState:
        return OverlapState(drafter.init(tokens, length, capacity), AheadMemo())

    def propose(state: DecodeState[Any, Any], plan: Plan, sampling: Sampling) -> tuple[Proposal, OverlapState, int]:
        before: OverlapState = state.drafter
        ahead = before.memo.ahead
        extra = 0 if ahead is None else ahead.forwards
        # Taken, or every round would keep the one before it alive.
        before.memo.ahead = None
        lane.join()
        if ahead is not None and _fits(ahead, state, plan):
            log.used += 1
            proposal, inner, forwards = _cut(ahead.proposal, plan), _current(ahead.inner), extra
        else:
            own = dataclasses.replace(state, drafter=before.inner)
            proposal, inner, forwards = drafter.propose(own, plan, sampling)
            forwards += extra
        memo = AheadMemo()
        begun.clear()
        if plan.max_depth > 0:
            lane.fork()

            def work() -> None:
                log.drafted += 1
                memo.ahead = lane.run(lambda: _draft_ahead(drafter, state, inner, proposal, plan, sampling))

            begun.append(work)
        return proposal, OverlapState(inner, memo), forwards

    def forward(*arguments: Any, **options: Any) -> Any:
        result = model.forward(*arguments, **options)
        if begun and options.get("logits", True):
            begun.pop()()
        return result

    def observe(state: DecodeState[Any, Any], info: StepInfo) -> OverlapState:
        after: OverlapState = state.drafter
        own = dataclasses.replace(state, drafter=_current(after.inner))
        return OverlapState(drafter.observe(own, info), after.memo)

    return parts._replace(
        model=model._replace(forward=forward, about={**model.about, "overlap": log}),
        drafter=drafter._replace(init=init, propose=propose, observe=observe, capturable=False),
    )


def _draft_ahead(
    drafter: Drafter, state: DecodeState[Any, Any], inner: Any, proposal: Proposal, plan: Plan, sampling: Sampling
) -> _Ahead:
    """The proposal for the text that ends with all drafts of `proposal` and the drafter's guess of one more token."""
    drafts = torch.where(proposal.valid, proposal.tokens, -1)[:, 1:]
    accepted = dataclasses.replace(
        state,
        tokens=append_tokens(state.tokens, state.length, drafts),
        length=state.length + proposal.drafted,
        # Nobody looks into the target's cache here, but a handle that its forward has consumed would be refused.
        cache=_current(state.cache),
        drafter=_current(inner, empty_memos=True),
    )
    # At temperature 0 every drafter proposes its most likely token and uses no randomness.
    one = Plan(torch.ones_like(plan.depth), 1)
    guessed, guessing, first = drafter.propose(accepted, one, _GREEDY)
    exists = guessed.valid[:, 1:2] if guessed.tokens.shape[1] > 1 else torch.zeros_like(guessed.valid)
    guess = torch.where(exists, guessed.tokens[:, -1:], -1)
    # Without a guess the text is not what was assumed, whatever it will be; any token will do to go on.
    shown = guess.clamp_min(0)
    text = dataclasses.replace(
        accepted,
        tokens=append_tokens(accepted.tokens, accepted.length, shown),
        length=accepted.length + 1,
        round=state.round + 1,
        drafter=guessing,
    )
    text = dataclasses.replace(text, drafter=drafter.observe(text, _commit_of(state, guessed, shown)))
    room = (text.limit - text.length - 1).clamp_min(0)
    next_plan = Plan(room.clamp_max(plan.max_depth), plan.max_depth)
    made, left, second = drafter.propose(text, next_plan, sampling)
    return _Ahead(made, left, first + second, text.length, guess, (state, inner, proposal, plan))


def _commit_of(state: DecodeState[Any, Any], proposal: Proposal, emitted: Tensor) -> StepInfo:
    """What a drafter may learn from a round that committed exactly the one token `emitted [b 1]`."""
    one = torch.ones_like(state.length)
    nothing = torch.full_like(proposal.tokens, -1)
    verdict = Verdict(nothing, torch.zeros_like(one), emitted[:, 0], torch.zeros(nothing.shape, device=one.device))
    padded = torch.nn.functional.pad(emitted, (0, proposal.tokens.shape[1] - 1), value=-1)
    return StepInfo(Plan(one, 1), proposal, verdict, padded, one, one.bool())


def _fits(ahead: _Ahead, state: DecodeState[Any, Any], plan: Plan) -> bool:
    """Whether the text is what was assumed in every row that goes on, and the draft is as deep as is asked for."""
    if not 0 < plan.max_depth < ahead.proposal.tokens.shape[1]:
        return False
    last = state.tokens.gather(1, state.length[:, None] - 1)
    same = (state.length == ahead.length) & (last == ahead.guess)[:, 0]
    enough = plan.depth <= ahead.proposal.drafted
    return bool(((same & enough) | state.done).all())


def _cut(proposal: Proposal, plan: Plan) -> Proposal:
    """The first drafts of a chain, as many as planned."""
    n = 1 + plan.max_depth
    valid = proposal.valid[:, :n] & (iota(n, proposal.tokens.device) <= plan.depth[:, None])
    tokens = torch.where(valid, proposal.tokens[:, :n], proposal.tokens[:, :1])
    probs = proposal.draft_probs
    if probs is not None:
        # The last node is a leaf now, and leaves have no law.
        probs = torch.cat([probs[:, : n - 1], torch.zeros_like(probs[:, :1])], 1)
    parents = tree.chain_parents(len(tokens), n, tokens.device)
    return Proposal(tokens, parents, valid, proposal.sampled[:, :n] & valid, probs, proposal.replacement, True)


def _current(value: Any, *, empty_memos: bool = False) -> Any:
    """A drafter's state as it was, after the lane went on from it: its caches' slots are untouched, because the lane
    writes behind them, but the handles were consumed. `empty_memos`: with host memory of its own."""
    if isinstance(value, KVCache):
        return KVCache(value.store, value.length, value.store.generation, value.extent)
    if isinstance(value, Memo):
        return type(value)() if empty_memos else value
    if is_record(value):
        items = {name: _current(item, empty_memos=empty_memos) for name, item in fields_of(value).items()}
        return type(value)(**items)
    return value


def accelerated(parts: Parts, *, cuda_graph: bool, parallel_streams: bool, sync_mode: str) -> Parts:
    """`parts` as the switches of a run want them, as far as the device can: graphs, and drafting beside the target.

    Streams need graphs: a round launched operation by operation keeps the host busy, and would get more to launch.
    """
    if not cuda_graph or parts.model.device.type != "cuda":
        return parts
    parts = graphed_parts(parts)
    fits = parts.drafter.chain and not parts.drafter.shares_cache and parts.controller.max_depth > 0
    return overlapped(parts, sync_mode) if parallel_streams and fits else parts

"""Wrappers around steps and parts: timing, tracing, checking. The algorithm itself knows none of them."""

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, TypeVar

import torch

from specdec.checks import check_proposal, check_verdict
from specdec.types import Controller, Drafter, Model, Policy, Step, StepInfo
from specdec_kernels.clock import Clock

D = TypeVar("D")
C = TypeVar("C")
F = TypeVar("F", bound=Callable[..., Any])
# What opens a span of time under a name.
Span = Callable[[str], AbstractContextManager[object]]


class Parts(NamedTuple):
    """What a step is built from: `build_step(*parts)`."""

    model: Model
    drafter: Drafter
    policy: Policy
    controller: Controller


def timed_parts(parts: Parts, clock: Clock) -> Parts:
    """The same parts, their time added to `clock`, by the phases of `spanned_parts`."""
    return spanned_parts(parts, clock.span)


def spanned_parts(parts: Parts, span: Span) -> Parts:
    """The same parts, each call inside a `span`: target forwards as `verify` (`prefill` where no logits are asked for),
    the drafter as `draft`, the policy's randomness as `sampling` and its verdict as `accept`."""

    def spanned(name: str, function: F) -> F:
        return spanned_function(name, function, span)

    model, drafter, policy, controller = parts
    return Parts(
        model._replace(forward=spanned("verify", model.forward)),
        drafter._replace(
            init=spanned("prefill", drafter.init),
            propose=spanned("draft", drafter.propose),
            observe=spanned("draft", drafter.observe),
        ),
        policy._replace(draw=spanned("sampling", policy.draw), verify=spanned("accept", policy.verify)),
        controller,
    )


def spanned_function(name: str, function: F, span: Span) -> F:
    """`function` inside a `span` of that name; `prefill` where it is told to compute no logits."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with span("prefill" if kwargs.get("logits") is False else name):
            return function(*args, **kwargs)

    return wrapper  # type: ignore[return-value]  # a wrapper has its function's signature


def with_timing(step: Step[D, C], clock: Clock) -> Step[D, C]:
    """Put the seconds of each round into `info.timing`: the phases of `timed_parts`, `total`, and what is left of it
    as `host`: bookkeeping, and a device that waits for its next launch.

    `clock` must be the one the step's parts were timed with.
    """

    def timed_step(state: Any) -> tuple[Any, StepInfo]:
        clock.drain()
        with clock.span("total"):
            state, info = step(state)
        seconds = clock.drain()
        parts = sum(seconds.values()) - seconds["total"]
        return state, dataclasses.replace(info, timing={**seconds, "host": max(0.0, seconds["total"] - parts)})

    return timed_step


def with_trace(step: Step[D, C], sink: Callable[[Any, StepInfo], None]) -> Step[D, C]:
    """Show every round to `sink(state, info)` as it happens."""

    def traced_step(state: Any) -> tuple[Any, StepInfo]:
        state, info = step(state)
        sink(state, info)
        return state, info

    return traced_step


def with_checks(step: Step[D, C]) -> Step[D, C]:
    """Verify the invariants of every round and raise `ValueError` at the first that is broken; slow, for development.

    Proposal and verdict must be well formed (see `specdec.checks`), the text must only
    grow, and the cache must end one short of it.
    """

    def checked_step(state: Any) -> tuple[Any, StepInfo]:
        before, length = state.tokens.clone(), state.length.clone()
        state, info = step(state)
        check_proposal(info.proposal)
        check_verdict(info.proposal, info.verdict)
        if bool((state.cache.length != state.length - 1).any()):
            raise ValueError(
                f"cache lengths {state.cache.length.tolist()} do not end one short of {state.length.tolist()}"
            )
        index = torch.arange(before.shape[1], device=before.device)
        if bool(((state.tokens != before) & (index < length[:, None])).any()):
            raise ValueError("a round changed a committed token")
        if bool((state.length != length + info.num_emitted).any()):
            raise ValueError("the text did not grow by the tokens that were emitted")
        return state, info

    return checked_step

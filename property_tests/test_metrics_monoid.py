"""Counters form a monoid, and rates are projections of them."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from specdec import metrics as counters


@st.composite
def metrics(draw, rows=2):
    size = draw(st.integers(0, 4))
    made = counters.zero(rows, size)
    for _ in range(draw(st.integers(0, 6))):
        depth = torch.tensor(draw(st.lists(st.integers(0, size), min_size=rows, max_size=rows)))
        accepted = torch.tensor([draw(st.integers(0, int(k))) for k in depth])
        made = counters.observe(
            made,
            depth=depth,
            accepted=accepted,
            drafted=depth,
            emitted=accepted + 1,
            running=torch.ones(rows, dtype=torch.bool),
            draft_forwards=draw(st.integers(0, 3)),
        )
    return made


def same(first, second):
    return first.max_depth == second.max_depth and torch.equal(first.counts, second.counts)


@given(metrics(), metrics(), metrics())
def test_metrics_monoid(a, b, c):
    assert same(counters.merge(counters.merge(a, b), c), counters.merge(a, counters.merge(b, c)))
    assert same(counters.merge(a, b), counters.merge(b, a))
    assert same(counters.merge(a, counters.zero(2, 0)), a)


@given(metrics())
def test_rates_follow_from_the_histogram(made):
    summary = counters.summarize(made)
    rounds = [(k, j) for k, row in enumerate(summary["hist"]) for j, count in enumerate(row) for _ in range(count)]
    assert summary["rounds"] == len(rounds)
    assert summary["accepted"] == sum(j for _, j in rounds)
    assert summary["drafted"] == sum(k for k, _ in rounds)
    for i, rate in enumerate(summary["per_position"], start=1):
        reached = [(k, j) for k, j in rounds if k >= i]
        assert rate == sum(j >= i for _, j in reached) / len(reached)
    for i, rate in enumerate(summary["per_position_conditional"], start=1):
        reached = [(k, j) for k, j in rounds if k >= i and j >= i - 1]
        assert rate == (sum(j >= i for _, j in reached) / len(reached) if reached else None)


def test_no_drafts_have_no_acceptance_rate():
    assert counters.summarize(counters.zero(1, 4))["acceptance_rate"] is None

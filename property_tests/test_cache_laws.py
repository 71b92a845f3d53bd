"""The laws of the cache handle, as a state machine against a plain list, and consumed handles."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from specdec import cache as kv
from specdec.cache import CacheFullError, StaleCacheError
from specdec.models.tabular import tabular
from specdec.records import select_rows
from specdec.state import prefill

CAPACITY = 24
MODEL = tabular(7, seed=2)


def append(cache, tokens):
    """Write `tokens [b n]` as a chain and return the logits and the next handle."""
    logits, _, cache = MODEL.forward(cache, tokens)
    return logits, cache


def contents(cache):
    """The committed tokens and positions of every row."""
    kv.check_fresh(cache)
    buffer = cache.store.slots[0][0, :, :, 0]
    return [buffer[row, :length].tolist() for row, length in enumerate(cache.length.tolist())]


class CacheMachine(RuleBasedStateMachine):
    """Two rows; the model of each is the list of [token, position] it should hold."""

    def __init__(self):
        super().__init__()
        self.cache = MODEL.init_cache(2, CAPACITY)
        self.rows = [[], []]

    @rule(data=st.data(), n=st.integers(1, 5))
    def append(self, data, n):
        tokens = torch.tensor(
            data.draw(st.lists(st.lists(st.integers(0, 6), min_size=n, max_size=n), min_size=2, max_size=2))
        )
        if max(len(row) for row in self.rows) + n > CAPACITY:
            with pytest.raises(CacheFullError):
                append(self.cache, tokens)
            return
        old = self.cache
        _, self.cache = append(old, tokens)
        with pytest.raises(StaleCacheError):
            append(old, tokens)
        for row, added in zip(self.rows, tokens.tolist(), strict=True):
            row.extend([[token, position] for position, token in enumerate(added, start=len(row))])

    @rule(data=st.data())
    def truncate(self, data):
        length = [data.draw(st.integers(0, CAPACITY)) for _ in self.rows]
        self.cache = kv.truncate(self.cache, torch.tensor(length))
        self.rows = [row[:cut] for row, cut in zip(self.rows, length, strict=True)]

    @precondition(lambda self: min(len(row) for row in self.rows) >= 1)
    @rule(data=st.data())
    def keep(self, data):
        """Keep a subset of each row's last slots, as an accepted path does."""
        span = data.draw(st.integers(1, min(len(row) for row in self.rows)))
        chosen = [sorted(data.draw(st.sets(st.integers(0, span - 1)))) for _ in self.rows]
        width = max(1, *(len(nodes) for nodes in chosen))
        nodes = torch.tensor([nodes + [0] * (width - len(nodes)) for nodes in chosen])
        base = torch.tensor([len(row) - span for row in self.rows])
        count = torch.tensor([len(nodes) for nodes in chosen])
        self.cache = kv.keep(self.cache, base, nodes, count)
        self.rows = [
            row[: len(row) - span] + [row[len(row) - span + node] for node in nodes]
            for row, nodes in zip(self.rows, chosen, strict=True)
        ]

    @rule()
    def fork_and_forget(self):
        copy = kv.fork(self.cache)
        if int(copy.length.max()) < CAPACITY:
            append(copy, torch.ones(2, 1, dtype=torch.int64))

    @rule()
    def swap_rows(self):
        self.cache = select_rows(self.cache, torch.tensor([1, 0]))
        self.rows.reverse()

    @rule(n=st.integers(1, 3))
    def borrow_scratch(self, n):
        if int(self.cache.length.max()) + n <= CAPACITY:
            append(kv.borrow(self.cache), torch.zeros(2, n, dtype=torch.int64))

    @invariant()
    def the_cache_holds_the_list(self):
        assert contents(self.cache) == self.rows


TestCacheMachine = CacheMachine.TestCase

TOKENS = st.lists(st.integers(0, 6), min_size=1, max_size=6)


@given(TOKENS, TOKENS)
def test_two_appends_equal_one(first, second):
    together, cache = append(MODEL.init_cache(1, CAPACITY), torch.tensor([first + second]))
    one, other = append(MODEL.init_cache(1, CAPACITY), torch.tensor([first]))
    two, other = append(other, torch.tensor([second]))
    assert torch.equal(together, torch.cat([one, two], 1))
    assert contents(cache) == contents(other)


@given(TOKENS, TOKENS)
def test_truncate_undoes_append(first, second):
    _, cache = append(MODEL.init_cache(1, CAPACITY), torch.tensor([first]))
    length, before = cache.length, contents(cache)
    _, cache = append(cache, torch.tensor([second]))
    assert contents(kv.truncate(cache, length)) == before


@given(TOKENS, st.data())
def test_keep_of_a_chain_prefix_equals_truncate(tokens, data):
    count = data.draw(st.integers(0, len(tokens)))
    _, one = append(MODEL.init_cache(1, CAPACITY), torch.tensor([tokens]))
    _, two = append(MODEL.init_cache(1, CAPACITY), torch.tensor([tokens]))
    kept = kv.keep(one, torch.tensor([0]), torch.arange(len(tokens))[None], torch.tensor([count]))
    assert contents(kept) == contents(kv.truncate(two, torch.tensor([count])))


@given(st.lists(TOKENS, min_size=1, max_size=3))
def test_ragged_prefill_holds_each_prompt(prompts):
    longest = max(map(len, prompts))
    tokens = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts])
    cache, _ = prefill(MODEL, tokens, torch.tensor([len(prompt) for prompt in prompts]), CAPACITY)
    assert [[token for token, _ in row] for row in contents(cache)] == prompts


@pytest.mark.parametrize(
    "use",
    [
        lambda cache: append(cache, torch.zeros(1, 1, dtype=torch.int64)),
        lambda cache: kv.truncate(cache, cache.length),
        lambda cache: kv.keep(cache, cache.length * 0, torch.zeros(1, 1, dtype=torch.int64), cache.length),
        kv.fork,
        kv.borrow,
    ],
)
def test_stale_handle_raises(use):
    cache = MODEL.init_cache(1, CAPACITY)
    append(cache, torch.tensor([[1]]))
    with pytest.raises(StaleCacheError):
        use(cache)


def test_a_full_cache_says_so_and_stays_usable():
    _, cache = append(MODEL.init_cache(1, 2), torch.tensor([[1, 2]]))
    with pytest.raises(CacheFullError, match="2 of 2 are used"):
        append(cache, torch.tensor([[3]]))
    assert contents(cache) == [[[1, 0], [2, 1]]]

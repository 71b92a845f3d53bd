"""A suffix automaton over prompt and output: the longest suffix seen before, and its most frequent continuation."""

import heapq
from typing import Any

import torch
from torch import Tensor

from specdec import tree
from specdec.drafters.common import last_token, unchanged
from specdec.records import Memo, record, register
from specdec.sampling import Sampling
from specdec.types import DecodeState, Drafter, Plan, Proposal


class SuffixAutomaton:
    """The minimal automaton of all substrings of a text, built online (Blumer et al. 1985), with occurrence counts.

    State s stands for a class of substrings that end at the same places; `length[s]` is the longest of them,
    `link[s]` the state of its longest suffix in another class, `count[s]` the number of places, `last[s]` the latest.
    """

    def __init__(self) -> None:
        self.next: list[dict[int, int]] = [{}]
        self.link = [-1]
        self.length = [0]
        self.count = [0]
        self.last = [-1]
        self.end = 0
        self.size = 0

    def extend(self, token: int) -> None:
        """Append one token: amortized constant work for the automaton, one step per suffix class for the counts."""
        new = self._state({}, self.length[self.end] + 1, 0, 0)
        state = self.end
        while state != -1 and token not in self.next[state]:
            self.next[state][token] = new
            state = self.link[state]
        if state == -1:
            self.link[new] = 0
        else:
            target = self.next[state][token]
            if self.length[state] + 1 == self.length[target]:
                self.link[new] = target
            else:
                clone = self._state(
                    dict(self.next[target]), self.length[state] + 1, self.link[target], self.count[target]
                )
                self.last[clone] = self.last[target]
                while state != -1 and self.next[state].get(token) == target:
                    self.next[state][token] = clone
                    state = self.link[state]
                self.link[target] = self.link[new] = clone
        self.end = new
        while new > 0:
            self.count[new] += 1
            self.last[new] = self.size
            new = self.link[new]
        self.size += 1

    def _state(self, following: dict[int, int], length: int, link: int, count: int) -> int:
        self.next.append(following)
        self.length.append(length)
        self.link.append(link)
        self.count.append(count)
        self.last.append(-1)
        return len(self.link) - 1

    def match(self) -> tuple[int, int]:
        """The state and the length of the longest suffix that also occurs earlier; (0, 0) when there is none."""
        state = self.link[self.end] if self.end else 0
        return state, self.length[state]

    def continuations(self, state: int) -> list[tuple[int, int, int]]:
        """(count, token, state) of what followed, most frequent first, the most recent of equals."""
        following = ((self.count[to], self.last[to], token, to) for token, to in self.next[state].items())
        return [(count, token, to) for count, _, token, to in sorted(following, reverse=True)]


@register
class SuffixMemo(Memo):
    """The automata of a batch; made again from the tokens whenever it does not fit them."""

    def __init__(self) -> None:
        self.rows: list[SuffixAutomaton] = []

    def update(self, tokens: Tensor, length: Tensor) -> list[SuffixAutomaton]:
        """Automata of exactly the first `length [b]` of `tokens [b t]`, extending what is there."""
        ends = length.tolist()
        if len(self.rows) != len(ends):
            self.rows = [SuffixAutomaton() for _ in ends]
        # A text that has become shorter was rolled back, and an automaton cannot unlearn.
        self.rows = [row if row.size <= end else SuffixAutomaton() for row, end in zip(self.rows, ends, strict=True)]
        begin = min(row.size for row in self.rows)
        for automaton, text, end in zip(self.rows, tokens[:, begin : max(ends)].tolist(), ends, strict=True):
            for token in text[automaton.size - begin : end - begin]:
                automaton.extend(token)
        return self.rows


@record
class SuffixState:
    """The automata, as a memo: a function of the committed tokens."""

    memo: SuffixMemo


def suffix(*, min_match: int = 1, min_share: float = 0.0, nodes: int = 0) -> Drafter:
    """Draft the most frequent continuation of the longest suffix that occurred before.

    In the spirit of SuffixDecoding (arXiv:2411.04975), with a suffix automaton in place of its trees. A continuation's
    share is the product of its tokens' relative frequencies; drafting ends where it falls below `min_share`.
    `min_match`: tokens that must agree. `nodes` > 0 drafts a tree of so many best continuations, by share; 0 a chain.
    """
    if min_match < 1 or not 0 <= min_share < 1 or nodes < 0:
        raise ValueError(
            "suffix needs min_match >= 1, 0 <= min_share < 1 and nodes >= 0, "
            f"got min_match={min_match}, min_share={min_share}, nodes={nodes}"
        )

    def init(tokens: Tensor, length: Tensor, capacity: int) -> SuffixState:
        state = SuffixState(SuffixMemo())
        state.memo.update(tokens, length)
        return state

    def propose(state: DecodeState[Any, Any], plan: Plan, sampling: Sampling) -> tuple[Proposal, SuffixState, int]:
        root = last_token(state)
        automata = state.drafter.memo.update(state.tokens, state.length)
        if plan.max_depth == 0:
            return tree.root_only(root), state.drafter, 0
        budget = nodes or plan.max_depth
        drafts = [
            _draft(automaton, depth, budget, 1 if nodes == 0 else budget, min_match, min_share)
            for automaton, depth in zip(automata, plan.depth.tolist(), strict=True)
        ]
        return _pack(root, drafts, chain=nodes == 0), state.drafter, 0

    return Drafter(
        f"suffix:nodes={nodes}" if nodes else "suffix",
        init,
        propose,
        unchanged,
        chain=nodes == 0,
        max_nodes=lambda depth: 1 + (nodes or depth),
    )


def _draft(
    automaton: SuffixAutomaton, depth: int, budget: int, width: int, min_match: int, min_share: float
) -> list[tuple[int, int]]:
    """(parent, token) of up to `budget` drafts in best-first order of their share; node 0 is the root."""
    start, matched = automaton.match()
    if matched < min_match or depth == 0:
        return []
    drafts: list[tuple[int, int]] = []
    # Entries: (-share, order of discovery, depth, parent node, token, automaton state).
    queue: list[tuple[float, int, int, int, int, int]] = []
    found = 0

    def discover(state: int, share: float, level: int, parent: int) -> None:
        nonlocal found
        following = automaton.continuations(state)
        total = sum(count for count, _, _ in following)
        for count, token, to in following[:width]:
            if share * count / total >= min_share:
                heapq.heappush(queue, (-share * count / total, found, level, parent, token, to))
                found += 1

    discover(start, 1.0, 1, 0)
    while queue and len(drafts) < budget:
        negative, _, level, parent, token, state = heapq.heappop(queue)
        drafts.append((parent, token))
        if level < depth:
            discover(state, -negative, level + 1, len(drafts))
    return drafts


def _pack(root: Tensor, drafts: list[list[tuple[int, int]]], *, chain: bool) -> Proposal:
    """Trees of different sizes as one padded proposal; padding hangs on the node before it."""
    n = 1 + max(len(row) for row in drafts)
    if n == 1:
        return tree.root_only(root)
    rows = [[(index, 0) for index in range(len(row), n - 1)] for row in drafts]
    full = [row + fill for row, fill in zip(drafts, rows, strict=True)]
    padded = torch.tensor(full, dtype=torch.int64, device=root.device).view(len(drafts), n - 1, 2)
    count = torch.tensor([len(row) for row in drafts], device=root.device)
    proposal = tree.chain(root, padded[:, :, 1], count)
    if chain:
        return proposal
    parents = torch.cat([torch.full_like(root[:, None], -1), padded[:, :, 0]], dim=1)
    return Proposal(proposal.tokens, parents, proposal.valid, proposal.sampled, None, True, False)

"""Trees as index arrays, against walks over parents one node at a time."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from specdec import tree
from specdec.checks import check_proposal
from specdec.testing import proposals
from specdec.types import Proposal


def lineage(parents, node):
    path = [node]
    while parents[path[-1]] >= 0:
        path.append(parents[path[-1]])
    return path[::-1]


def token_paths(proposal, row):
    """The token sequences of all valid nodes, each with its number of occurrences."""
    parents, tokens = proposal.parents[row].tolist(), proposal.tokens[row].tolist()
    return {
        tuple(tokens[node] for node in lineage(parents, node))
        for node in range(len(parents))
        if proposal.valid[row, node]
    }


@given(proposals(max_nodes=12))
def test_tree_algebra(proposal):
    visible = tree.ancestors(proposal.parents)
    depth = tree.depths(visible)
    for row in range(proposal.tokens.shape[0]):
        parents = proposal.parents[row].tolist()
        for node in range(len(parents)):
            path = lineage(parents, node)
            assert visible[row, node].nonzero()[:, 0].tolist() == path
            assert int(depth[row, node]) == len(path) - 1


@given(proposals(max_nodes=9, vocab_size=2))
def test_repeated_siblings_are_later_copies(proposal):
    repeated = tree.repeated_siblings(proposal)
    for row in range(proposal.tokens.shape[0]):
        for node in range(proposal.tokens.shape[1]):
            copies = [
                other
                for other in range(node)
                if proposal.valid[row, other]
                and proposal.parents[row, other] == proposal.parents[row, node]
                and proposal.tokens[row, other] == proposal.tokens[row, node]
            ]
            assert bool(repeated[row, node]) == bool(copies)


@given(proposals(max_nodes=7, vocab_size=2), st.data())
def test_merge_is_the_union_without_duplicates(first, data):
    second = data.draw(proposals(max_rows=3, max_nodes=7, vocab_size=2))
    rows = min(first.tokens.shape[0], second.tokens.shape[0])
    first = Proposal(
        first.tokens[:rows],
        first.parents[:rows],
        first.valid[:rows],
        first.sampled[:rows],
        None if first.draft_probs is None else first.draft_probs[:rows],
    )
    tokens = second.tokens[:rows].clone()
    tokens[:, 0] = first.tokens[:, 0]
    second = Proposal(tokens, second.parents[:rows], second.valid[:rows], torch.zeros_like(second.valid[:rows]))
    merged = tree.merge(first, second)
    check_proposal(merged)
    for row in range(rows):
        assert token_paths(merged, row) == token_paths(first, row) | token_paths(second, row)
        # Nodes of the first tree keep their numbers, and nothing of the second is there twice.
        n = first.tokens.shape[1]
        assert torch.equal(merged.tokens[row, :n], first.tokens[row])
        assert int(merged.valid[row].sum()) <= int(first.valid[row].sum()) + int(second.valid[row].sum()) - 1


@given(proposals(max_nodes=9))
def test_trim_drops_only_what_no_row_needs(proposal):
    trimmed = tree.trim(proposal)
    check_proposal(trimmed)
    n = trimmed.tokens.shape[1]
    assert not bool(proposal.valid[:, n:].any())
    assert n == 1 or bool(trimmed.valid[:, -1].any())
    for row in range(proposal.tokens.shape[0]):
        assert token_paths(trimmed, row) == token_paths(proposal, row)


@given(st.integers(1, 3), st.integers(0, 6), st.data())
def test_chain_and_root_only_are_well_formed(rows, m, data):
    root = torch.zeros(rows, dtype=torch.int64)
    drafts = torch.ones(rows, m, dtype=torch.int64)
    count = torch.tensor(data.draw(st.lists(st.integers(0, m), min_size=rows, max_size=rows)))
    proposal = tree.chain(root, drafts, count)
    check_proposal(proposal)
    assert torch.equal(proposal.shape.deepest, count)
    assert torch.equal(tree.root_only(root).shape.deepest, torch.zeros_like(count))


def test_trees_made_on_the_host_lie_where_the_text_lies():
    device = torch.device("meta")
    for drafts, chain in (([], True), ([(0, 4)], True), ([(0, 4), (0, 5)], False)):
        packed = tree.pack([(3, drafts), (3, [])], chain, device)
        fields = (packed.tokens, packed.parents, packed.valid, packed.sampled)
        assert {field.device for field in fields} == {device}

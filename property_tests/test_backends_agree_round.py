"""What a round does besides forwards and verdicts: every implementation against its definition, bit for bit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from specdec.testing import proposals
from specdec_kernels.dispatch import implementations, resolve
from specdec_kernels.ops import commit as rules
from specdec_kernels.ops import depth as depths
from specdec_kernels.ops import walk

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def runnable(op, dtype=torch.float32):
    """The implementations other than the definition that run here when asked for by name."""
    return [name for name, problem in implementations(op, DEVICE, dtype).items() if problem is None and name != "torch"]


def same(made, wanted):
    """Two results of an operation: a tensor, or several of which some may be missing."""
    if made is None or wanted is None:
        return made is wanted
    if isinstance(made, tuple):
        return all(map(same, made, wanted))
    return made.dtype == wanted.dtype and torch.equal(made, wanted)


@st.composite
def verdicts(draw):
    """The arguments of `commit`: walks of any length through trees, ends and broken logits wherever they may be."""
    proposal = draw(proposals(max_nodes=7, vocab_size=4))
    rows, n = proposal.tokens.shape
    paths, counts = [], []
    for row in range(rows):
        node, walked = 0, []
        for child in range(1, n):
            if proposal.valid[row, child] and proposal.parents[row, child] == node and draw(st.booleans()):
                node = child
                walked.append(node)
        counts.append(len(walked))
        paths.append(walked + [-1] * (n - len(walked)))
    length = [draw(st.integers(1, 5)) for _ in range(rows)]
    logits = torch.randn(rows, n, 4, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    if draw(st.booleans()):
        logits[draw(st.integers(0, rows - 1)), draw(st.integers(0, n - 1)), draw(st.integers(0, 3))] = torch.nan
    finish = [draw(st.sampled_from([rules.RUNNING, rules.RUNNING, rules.STOPPED_EOS])) for _ in range(rows)]
    limit = [begin + draw(st.integers(1, 8)) for begin in length]
    next_token = [draw(st.integers(0, 3)) for _ in range(rows)]
    small = [torch.tensor(part) for part in (counts, next_token)]
    state = [torch.arange(rows * 20).view(rows, 20) + 7, *map(torch.tensor, (length, limit, finish))]
    arguments = [logits, proposal.tokens, torch.tensor(paths), *small, *state]
    return [argument.to(DEVICE) for argument in arguments]


@pytest.mark.parametrize("name", runnable("commit"))
@given(
    arguments=verdicts(),
    eos_ids=st.lists(st.integers(0, 3), max_size=2).map(tuple),
    argmax=st.booleans(),
    chain=st.booleans(),
)
def test_the_same_tokens_are_committed(name, arguments, eos_ids, argmax, chain):
    options = {"eos_ids": eos_ids, "argmax": argmax, "chain": chain}
    before = arguments[5].clone()
    made = resolve("commit", DEVICE, torch.float32, (), name)(*arguments, **options)
    assert same(made, rules.commit(*arguments, **options))
    assert torch.equal(arguments[5], before), "the text of the state before must stay what it is"


@given(arguments=verdicts(), eos_ids=st.lists(st.integers(0, 3), max_size=2).map(tuple))
def test_a_commit_ends_at_the_first_end_and_at_the_limit(arguments, eos_ids):
    logits, nodes, path, accepted, following, tokens, length, limit, finish = arguments
    made = rules.commit(*arguments, eos_ids=eos_ids, argmax=False)
    for row in range(len(length)):
        verified = [int(nodes[row, node]) for node in path[row, : accepted[row]]] + [int(following[row])]
        last = int(path[row, accepted[row] - 1]) if accepted[row] else 0
        room = int(limit[row] - length[row])
        ends = [place for place, token in enumerate(verified[:room]) if token in eos_ids]
        wanted = verified[: ends[0] + 1] if ends else verified[:room]
        reason = rules.STOPPED_EOS if ends else rules.STOPPED_LENGTH if len(verified) >= room else rules.RUNNING
        if bool(logits[row, last].isnan().any()):
            wanted, reason = [], rules.FAILED
        if finish[row] != rules.RUNNING:
            wanted, reason = [], int(finish[row])
        count = int(made.num_emitted[row])
        assert made.emitted[row].tolist() == wanted + [-1] * (nodes.shape[1] - len(wanted))
        assert (count, int(made.finish[row])) == (len(wanted), reason)
        assert int(made.length[row]) == int(length[row]) + count
        begin = int(length[row])
        assert made.tokens[row].tolist() == [
            *tokens[row, :begin].tolist(),
            *wanted,
            *tokens[row, begin + count :].tolist(),
        ]


@pytest.mark.parametrize("name", runnable("tree_shape"))
@given(proposal=proposals(max_nodes=12), chain=st.booleans())
def test_trees_measure_the_same(name, proposal, chain):
    n = proposal.parents.shape[1]
    parents = torch.arange(-1, n - 1).expand_as(proposal.parents) if chain else proposal.parents
    arguments = parents.to(DEVICE), proposal.valid.to(DEVICE)
    made = resolve("tree_shape", DEVICE, torch.int64, (), name)(*arguments, chain=chain)
    assert same(made, walk.tree_shape(*arguments, chain=chain))


@pytest.mark.parametrize("name", runnable("count_round"))
@given(
    rounds=st.lists(st.tuples(*[st.integers(0, 3)] * 4, st.booleans()), min_size=1, max_size=4),
    draft_forwards=st.integers(0, 3),
)
def test_rounds_are_counted_alike(name, rounds, draft_forwards):
    depth, accepted, drafted, emitted, running = (
        torch.tensor(column, device=DEVICE) for column in zip(*rounds, strict=True)
    )
    counts = torch.arange(len(rounds) * 20, device=DEVICE).view(-1, 20)
    arguments = counts, depth, accepted, drafted, emitted, running
    options = {"draft_forwards": draft_forwards, "max_depth": 3}
    made = resolve("count_round", DEVICE, torch.int64, (), name)(*arguments, **options)
    assert same(made, rules.count_round(*arguments, **options))
    assert torch.equal(counts, torch.arange(len(rounds) * 20, device=DEVICE).view(-1, 20))


@pytest.mark.parametrize("name", runnable("best_depth"))
@given(
    rounds=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 4)), max_size=12),
    seconds=st.lists(st.floats(0.001, 0.1), min_size=5, max_size=5),
    discount=st.floats(0.5, 1),
)
def test_the_same_depth_pays(name, rounds, seconds, discount):
    prior = torch.tensor([[2.0, 1.4, 1.4, 1.4, 1.4], [2.0] * 5], dtype=torch.float64, device=DEVICE)
    times = torch.tensor(seconds, dtype=torch.float64, device=DEVICE)
    choose = resolve("best_depth", DEVICE, torch.float64, (), name)
    learn = resolve("learn_depth", DEVICE, torch.float64, (), name)
    counts = prior[None]
    for deepest, passed, room in rounds:
        seen = torch.tensor([deepest], device=DEVICE), torch.tensor([min(passed, deepest)], device=DEVICE)
        wanted = depths.learn_depth(counts, prior, *seen, discount=discount)
        counts = learn(counts, prior, *seen, discount=discount)
        assert torch.allclose(counts, wanted, rtol=1e-14, atol=0)
        limit = torch.tensor([room], device=DEVICE)
        depth, speed = choose(counts, times, limit)
        other, best = depths.best_depth(counts, times, limit)
        assert torch.allclose(speed, best, rtol=1e-14, atol=0)
        # Two depths may be equally fast up to rounding.
        chance = (counts[0, 0] / counts[0, 1]).cumprod(0).cumsum(0) / times
        assert depth == other or bool((chance.sort().values[-2:].diff() <= 1e-14 * best).all())

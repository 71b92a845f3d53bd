"""Every adapter over every architecture: whatever goes through the slot cache equals plain transformers forwards."""

from functools import cache

import pytest
import torch

from specdec import cache as kv
from specdec import tree
from specdec.models.decoder import build_decoder
from specdec.models.huggingface import build_huggingface

TEXT = torch.tensor([[7, 3, 55, 21, 9, 40, 12], [30, 2, 2, 8, 60, 17, 5], [1, 44, 33, 22, 11, 0, 59]])
PARENTS = torch.tensor([-1, 0, 0, 1, 1, 2, 3])
NODES = torch.tensor([[13, 4, 4, 50, 51, 6, 7], [14, 24, 34, 44, 54, 3, 2], [9, 8, 7, 6, 5, 4, 3]])


@cache
def built(adapter, module):
    if adapter == "huggingface":
        return build_huggingface(module, name="tiny")
    return build_decoder(
        module.config,
        module.state_dict(),
        name="tiny",
        dtype=module.dtype,
        device=torch.device("cpu"),
        stack="auto" if adapter == "decoder" else "torch",
    )


@pytest.fixture(params=["decoder", "decoder-torch", "huggingface"])
def model(request, module):
    return built(request.param, module)


def plain(module, tokens):
    with torch.no_grad():
        return module(input_ids=tokens, use_cache=False).logits


def paths(parents):
    """For each node the indices of its ancestors and itself, root first."""
    found = []
    for index, parent in enumerate(parents.tolist()):
        found.append([*(found[parent] if parent >= 0 else []), index])
    return found


def assert_same(logits, expected, tolerance=1e-4):
    assert logits.shape == expected.shape
    assert (logits - expected).abs().max() < tolerance
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))


def score_tree(model, cache, nodes, parents=PARENTS):
    visible = tree.ancestors(parents.expand(len(nodes), -1))
    return model.forward(cache, nodes, tree.depths(visible), visible)


def test_prefill_equals_a_plain_forward(model, module):
    logits, features, cache = model.forward(model.init_cache(3, 16), TEXT)
    assert_same(logits, plain(module, TEXT))
    assert logits.dtype == torch.float32
    assert features is None
    assert cache.length.tolist() == [7, 7, 7]


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("windows", [(1,) * 7, (3, 1, 3)])
def test_windows_of_any_size_equal_one_forward(model, module, rows, windows):
    cache, pieces = model.init_cache(rows, 7), []
    for piece in TEXT[:rows].split(windows, 1):
        logits, _, cache = model.forward(cache, piece)
        pieces.append(logits)
    assert_same(torch.cat(pieces, 1), plain(module, TEXT[:rows]))


@pytest.mark.parametrize("rows", [1, 3])
def test_every_branch_of_a_tree_equals_a_plain_forward(model, module, rows):
    _, _, cache = model.forward(model.init_cache(rows, 16), TEXT[:rows], logits=False)
    logits, _, _ = score_tree(model, cache, NODES[:rows])
    for index, path in enumerate(paths(PARENTS)):
        expected = plain(module, torch.cat([TEXT[:rows], NODES[:rows, path]], 1))
        assert_same(logits[:, index], expected[:, -1])


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("windows", [(3, 4), (1, 2, 1, 1, 1, 1)])
def test_a_tree_may_be_scored_in_several_windows(model, rows, windows):
    _, _, cache = model.forward(model.init_cache(rows, 16), TEXT[:rows], logits=False)
    expected, _, _ = score_tree(model, kv.fork(cache), NODES[:rows])
    visible = tree.ancestors(PARENTS.expand(rows, -1))
    depth, begin, pieces = tree.depths(visible), 0, []
    for size in windows:
        end = begin + size
        # Depths are counted from the cache's length, which the earlier windows have moved.
        logits, _, cache = model.forward(
            cache, NODES[:rows, begin:end], depth[:, begin:end] - begin, visible[:, begin:end, :end]
        )
        pieces.append(logits)
        begin = end
    assert_same(torch.cat(pieces, 1), expected)


def test_ragged_rows_equal_plain_forwards_of_each_row(model, module):
    lengths = [7, 4, 1]
    _, _, cache = model.forward(model.init_cache(3, 16), TEXT, logits=False)
    cache = kv.truncate(cache, torch.tensor(lengths))
    chain, _, cache = model.forward(cache, NODES[:, :2])
    branched, _, _ = score_tree(model, cache, NODES)
    for row, length in enumerate(lengths):
        start = torch.cat([TEXT[row, :length], NODES[row, :2]])
        assert_same(chain[row], plain(module, start[None])[0, -2:])
        for index, path in enumerate(paths(PARENTS)):
            assert_same(branched[row, index], plain(module, torch.cat([start, NODES[row, path]])[None])[0, -1])


def test_keeping_a_path_of_a_tree_leaves_the_cache_of_a_fresh_prefill(model, module):
    path = torch.tensor([[0, 1, 3, 6], [0, 2, 5, 5], [0, 1, 1, 1]])
    count = torch.tensor([4, 3, 1])
    _, _, cache = model.forward(model.init_cache(3, 20), TEXT, logits=False)
    base = cache.length
    _, _, cache = score_tree(model, cache, NODES)
    cache = kv.keep(cache, base, path, count)
    assert cache.length.tolist() == [11, 10, 8]
    after, _, cache = model.forward(cache, NODES[:, :1])
    for row in range(3):
        kept = torch.cat([TEXT[row], NODES[row, path[row, : count[row]]], NODES[row, :1]])
        _, _, fresh = model.forward(model.init_cache(1, 20), kept[None])
        size = len(kept)
        for ours, expected in zip(cache.store.slots, fresh.store.slots, strict=True):
            assert (ours[:, row, :size] - expected[:, 0, :size]).abs().max() < 1e-4
        assert_same(after[row], plain(module, kept[None])[0, -1:])


def test_a_row_alone_scores_as_in_a_batch(model):
    _, _, cache = model.forward(model.init_cache(3, 16), TEXT, logits=False)
    cache = kv.truncate(cache, torch.tensor([7, 4, 1]))
    alone = cache.map_rows(lambda rows: rows[2:])
    together, _, _ = model.forward(cache, NODES[:, :1])
    logits, _, _ = model.forward(alone, NODES[2:, :1])
    assert_same(logits, together[2:])


def test_features_are_the_hidden_states_behind_the_head(model, module):
    logits, features, cache = model.forward(model.init_cache(3, 16), TEXT, logits=False, features=True)
    assert logits is None
    with torch.no_grad():
        expected = module(input_ids=TEXT, output_hidden_states=True).hidden_states[-1]
    assert (features - expected).abs().max() < 1e-4
    assert cache.length.tolist() == [7, 7, 7]


def test_prefill_computes_neither_logits_nor_features(model):
    logits, features, _ = model.forward(model.init_cache(3, 16), TEXT, logits=False)
    assert logits is None
    assert features is None


def test_a_node_that_sees_nothing_harms_nobody(model, module):
    visible = tree.ancestors(PARENTS.expand(3, -1))
    depth = tree.depths(visible)
    visible = visible.clone()
    visible[:, 4] = False
    logits, _, cache = model.forward(model.init_cache(3, 16), NODES, depth, visible)
    assert_same(logits[:, 6], plain(module, NODES[:, [0, 1, 3, 6]])[:, -1])
    cache = kv.truncate(cache, torch.tensor([1, 1, 1]))
    logits, _, _ = model.forward(cache, TEXT[:, :1])
    assert logits.isfinite().all()


def test_drafts_may_hang_past_the_context(model, module):
    limit = model.max_length
    full = torch.arange(limit)[None] % 61
    _, _, cache = model.forward(model.init_cache(1, limit + 4), full[:, :-1], logits=False)
    logits, _, _ = model.forward(cache, torch.cat([full[:, -1:], NODES[:1, :3]], 1))
    assert_same(logits[:, 0], plain(module, full)[:, -1])
    assert logits.isfinite().all()


def test_results_are_ordinary_tensors(model):
    logits, features, cache = model.forward(model.init_cache(3, 16), TEXT, features=True)
    logits[0, 0, 0] = -1.0
    weight = torch.ones(features.shape[-1], requires_grad=True)
    (features * weight).sum().backward()
    assert weight.grad is not None
    assert not cache.length.is_inference()


def test_a_consumed_handle_raises(model):
    cache = model.init_cache(3, 16)
    model.forward(cache, TEXT)
    with pytest.raises(kv.StaleCacheError):
        model.forward(cache, TEXT)

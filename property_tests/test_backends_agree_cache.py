"""Every implementation of the cache operations against its definition: on a GPU as compiled, elsewhere interpreted."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec_kernels.dispatch import implementations, resolve

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def runnable(op, dtype):
    """The implementations other than the definition that run here when asked for by name."""
    return [name for name, problem in implementations(op, DEVICE, dtype).items() if problem is None and name != "torch"]


def bits(tensor):
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])


@st.composite
def keeps(draw):
    """Row by row: base, an increasing path, and how much of it counts; what does not count may be any number."""
    rows, width = draw(st.integers(1, 4)), draw(st.integers(1, 20))
    base = [draw(st.integers(0, 9)) for _ in range(rows)]
    count = [draw(st.integers(0, width)) for _ in range(rows)]
    last = width + draw(st.integers(0, 12))
    nodes = []
    for kept in count:
        path = sorted(draw(st.sets(st.integers(0, last - 1), min_size=kept, max_size=kept)))
        nodes.append(path + [draw(st.sampled_from([-1, 0, 10**6])) for _ in range(width - kept)])
    return base, nodes, count, last


def plainly(slots, base, nodes, count):
    """What `kv_keep` means, one slot at a time into fresh memory."""
    result = slots.clone()
    for row, kept in enumerate(count):
        for index, node in enumerate(nodes[row][:kept]):
            result[:, row, base[row] + index] = slots[:, row, base[row] + node]
    return result


@pytest.mark.parametrize("implementation", ["torch", *runnable("kv_keep", torch.float32)])
@given(
    case=keeps(),
    dtype=st.sampled_from(DTYPES),
    groups=st.integers(1, 5),
    heads=st.integers(1, 3),
    size=st.sampled_from([1, 3, 8, 16, 80, 257]),
    layout=st.sampled_from(["packed", "offset", "rows apart", "heads apart"]),
    narrow=st.booleans(),
)
def test_kept_slots_move_to_the_front_and_nothing_else_changes(
    implementation, case, dtype, groups, heads, size, layout, narrow
):
    base, nodes, count, last = case
    rows, slots = len(base), 9 + last + 3
    shape = (groups, rows, slots, heads, size)
    # Memory that a kernel must not touch is NaN; the bits of every slot differ, and some of them are NaN as well.
    room = torch.full((torch.Size(shape).numel() * 2 + 1,), float("nan"), dtype=dtype, device=DEVICE)
    strides = list(torch.empty(shape, device="meta").stride())
    if layout == "rows apart":
        strides[0], strides[1] = strides[0] * 2, strides[1] * 2
    elif layout == "heads apart":
        strides = [stride * 2 for stride in strides[:-1]] + [1]
    buffer = torch.as_strided(room, shape, strides, 1 if layout == "offset" else 0)
    pattern = torch.arange(buffer.numel(), device=DEVICE) * 40503 % 65521
    bits(buffer).copy_(pattern.view(shape).to(bits(buffer).dtype))
    before, outside = buffer.clone(), room.clone()
    index = [torch.tensor(part, dtype=torch.int32 if narrow else torch.int64, device=DEVICE) for part in (base, count)]
    # Columns of a wider array, as a verdict's path is.
    path = torch.tensor(nodes, dtype=index[0].dtype, device=DEVICE).repeat(1, 2)[:, : len(nodes[0])]

    resolve("kv_keep", DEVICE, dtype, requested=implementation)((buffer,), index[0], path, index[1])

    expected = plainly(bits(before), base, nodes, count)
    assert torch.equal(bits(buffer), expected)
    torch.as_strided(bits(outside), shape, strides, buffer.storage_offset()).copy_(expected)
    assert torch.equal(bits(room), bits(outside))


@pytest.mark.parametrize("implementation", ["torch", *runnable("kv_keep", torch.float32)])
@pytest.mark.parametrize(("groups", "size"), [(2, 16), (2, 257), (20, 257)])
def test_paths_longer_than_what_a_block_has_at_once_are_kept(groups, size, implementation):
    # Small slots, large ones, and large ones of many groups: a block of the CUDA version has 32, 64 and 128 vectors,
    # and 32, 16 and 8 nodes on their way.
    rows, width, slots = 4, 40, 90
    buffer = torch.arange(groups * rows * slots * size, device=DEVICE).view(groups, rows, slots, 1, size)
    buffer = (buffer * 40503 % 65521).to(torch.int16)
    nodes = [sorted((7 * row + 2 * index) % 80 for index in range(width)) for row in range(rows)]
    base, count = [0, 3, 9, 1], [40, 33, 0, 17]
    expected = plainly(buffer, base, nodes, count)
    keep = resolve("kv_keep", DEVICE, torch.float32, requested=implementation)
    keep((buffer,), *(torch.tensor(part, device=DEVICE) for part in (base, nodes, count)))
    assert torch.equal(buffer, expected)


@pytest.mark.parametrize("implementation", ["torch", *runnable("kv_keep", torch.float32)])
def test_several_buffers_are_kept_alike(implementation):
    buffers = tuple(torch.arange(2.0 * 6 * size, device=DEVICE).view(1, 2, 6, 1, size) for size in (1, 4))
    base, count = torch.tensor([0, 1], device=DEVICE), torch.tensor([2, 3], device=DEVICE)
    nodes = [[1, 3, 0], [0, 2, 4]]
    expected = [plainly(buffer, [0, 1], nodes, [2, 3]) for buffer in buffers]
    keep = resolve("kv_keep", DEVICE, torch.float32, requested=implementation)
    keep(buffers, base, torch.tensor(nodes, device=DEVICE), count)
    assert all(torch.equal(buffer, wanted) for buffer, wanted in zip(buffers, expected, strict=True))


@pytest.mark.parametrize("implementation", ["torch", *runnable("kv_keep", torch.float32)])
def test_an_empty_path_or_batch_keeps_nothing(implementation):
    keep = resolve("kv_keep", DEVICE, torch.float32, requested=implementation)
    for rows, width in ((2, 0), (0, 3)):
        buffer = torch.ones(2, rows, 4, 1, 2, device=DEVICE)
        index = torch.zeros(rows, dtype=torch.int64, device=DEVICE)
        keep((buffer,), index, torch.zeros(rows, width, dtype=torch.int64, device=DEVICE), index)
        assert (buffer == 1).all()


def matches_of(text, longest, shortest, matches, window):
    """What `suffix_match` means, place by place."""
    found = []
    for end in range(len(text) - 1):
        size = 0
        while size < longest and end - size >= 0 and text[end - size] == text[len(text) - 1 - size]:
            size += 1
        if size >= shortest and (not window or end >= len(text) - window):
            found.append((size, end))
    found = sorted(found, reverse=True)[:matches]
    return [(end, size) for size, end in found] + [(0, 0)] * (matches - len(found))


@pytest.mark.parametrize("implementation", ["torch", *runnable("suffix_match", torch.int64)])
@given(
    texts=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=40), min_size=1, max_size=3),
    beyond=st.integers(0, 5),
    longest=st.integers(1, 6),
    shortest=st.integers(1, 6),
    matches=st.integers(1, 4),
    window=st.integers(0, 12),
    narrow=st.booleans(),
    spread=st.booleans(),
)
@settings(max_examples=30)
def test_the_longest_then_latest_occurrence_is_found(
    implementation, texts, beyond, longest, shortest, matches, window, narrow, spread
):
    shortest = min(shortest, longest)
    width = max(map(len, texts)) + beyond
    # What lies past a row's length is no part of its text, even where it would continue a match.
    rows = [(text * width)[: len(text)] + (text * width)[: width - len(text)] for text in texts]
    tokens = torch.tensor(rows, dtype=torch.int32 if narrow else torch.int64, device=DEVICE)
    if spread:
        tokens = tokens.repeat_interleave(2, 1)[:, ::2]
    length = torch.tensor([len(text) for text in texts], device=DEVICE)

    find = resolve("suffix_match", DEVICE, tokens.dtype, requested=implementation)
    end, size = find(tokens, length, longest=longest, shortest=shortest, matches=matches, window=window)

    count = min(matches, width)
    for row, text in enumerate(texts):
        expected = matches_of(text, longest, shortest, count, window)
        assert list(zip(end[row].tolist(), size[row].tolist(), strict=True)) == expected


@pytest.mark.parametrize("implementation", runnable("suffix_match", torch.int64))
def test_texts_longer_than_a_block_agree_with_the_definition(implementation):
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 5, (3, 5000), generator=generator).to(DEVICE)
    length = torch.tensor([5000, 4097, 2], device=DEVICE)
    for window in (0, 700):
        options = {"longest": 8, "shortest": 2, "matches": 3, "window": window}
        found = resolve("suffix_match", DEVICE, torch.int64, requested=implementation)(tokens, length, **options)
        wanted = resolve("suffix_match", DEVICE, torch.int64, requested="torch")(tokens, length, **options)
        assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


@pytest.mark.skipif(DEVICE.type != "cuda", reason="graphs are captured on GPUs")
@pytest.mark.parametrize("implementation", ["torch", *runnable("kv_keep", torch.float32)])
def test_a_captured_keep_follows_what_its_inputs_hold_later(implementation):
    keep = resolve("kv_keep", DEVICE, torch.bfloat16, requested=implementation)
    buffer = torch.randn(4, 2, 40, 2, 64, device=DEVICE).to(torch.bfloat16)
    base, count = torch.zeros(2, dtype=torch.int64, device=DEVICE), torch.zeros(2, dtype=torch.int64, device=DEVICE)
    nodes = torch.zeros(2, 9, dtype=torch.int64, device=DEVICE)
    # Compiles, loads and allocates, which a capture may not.
    keep((buffer,), base, nodes, count)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        keep((buffer,), base, nodes, count)
    for start, paths in (([3, 0], [[1, 2, 5, 8, 9, 11, 12, 20, 21], [0]]), ([1, 7], [[4], [3, 7, 20]])):
        kept = [len(path) for path in paths]
        padded = [path + [0] * (9 - len(path)) for path in paths]
        expected = plainly(buffer, start, padded, kept)
        base.copy_(torch.tensor(start))
        count.copy_(torch.tensor(kept))
        nodes.copy_(torch.tensor(padded))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(buffer, expected)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="graphs are captured on GPUs")
@pytest.mark.parametrize("implementation", ["torch", *runnable("suffix_match", torch.int64)])
def test_a_captured_match_follows_what_the_text_holds_later(implementation):
    find = resolve("suffix_match", DEVICE, torch.int64, requested=implementation)
    tokens = torch.zeros(1, 12, dtype=torch.int64, device=DEVICE)
    length = torch.ones(1, dtype=torch.int64, device=DEVICE)
    find(tokens, length, longest=3)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        end, size = find(tokens, length, longest=3)
    for text in ([1, 2, 3, 1, 2], [5, 5, 5, 5, 5, 5, 5], [1, 2, 3]):
        tokens[0, : len(text)] = torch.tensor(text, device=DEVICE)
        length.fill_(len(text))
        graph.replay()
        torch.cuda.synchronize()
        assert [(int(end), int(size))] == matches_of(text, 3, 1, 1, 0)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="interleavings differ on GPUs only")
@pytest.mark.parametrize("implementation", runnable("kv_keep", torch.float32))
@pytest.mark.parametrize("width", [8, 63, 64])
def test_moves_by_one_slot_of_many_channels_do_not_race(implementation, width):
    # Every source is the next target: a store that overtakes a load shows here.
    keep = resolve("kv_keep", DEVICE, torch.bfloat16, requested=implementation)
    base = torch.tensor([0, 5], device=DEVICE)
    nodes = torch.arange(1, width + 1, device=DEVICE).expand(2, width)
    count = torch.tensor([width, width - 1], device=DEVICE)
    for _ in range(20):
        buffer = torch.randn(64, 2, width + 8, 8, 128, device=DEVICE).to(torch.bfloat16)
        expected = plainly(buffer, [0, 5], nodes.tolist(), count.tolist())
        keep((buffer,), base, nodes, count)
        assert torch.equal(buffer, expected)

"""Every implementation of the decoder's operations against its definition in float64: compiled on a GPU, else
interpreted. What an operation must not read is NaN."""

from importlib import import_module

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from specdec_kernels.dispatch import implementations, resolve
from specdec_kernels.ops import attend, attention, fused, layers, product

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Interpreting a launch takes a tenth of a second and more, and shrinking takes hundreds of them.
COMPILED = DEVICE.type == "cuda"
FEW = settings(
    max_examples=settings.default.max_examples if COMPILED else max(10, settings.default.max_examples // 4),
    phases=set(Phase) if COMPILED else {Phase.explicit, Phase.reuse, Phase.generate},
)


def runnable(op):
    """The implementations that run here when asked for by name."""
    return [name for name, problem in implementations(op, DEVICE, torch.bfloat16).items() if problem is None]


def implementation(op, name, dtype):
    if implementations(op, DEVICE, dtype)[name] is not None:
        pytest.skip(f"{name} is not built for {dtype}")
    return resolve(op, DEVICE, dtype, (), name)


def unit(dtype):
    """The largest relative error of one rounding; twice the usual, because the interpreter cuts bfloat16 off."""
    return torch.finfo(dtype).eps


def assert_same_bits(found, expected):
    """The interpreter multiplies matrices by numpy, which sums in an order that depends on their sizes."""
    if COMPILED:
        assert torch.equal(found, expected)
    else:
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=2 * unit(found.dtype))


def normal(seed, *shape, dtype, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(dtype).to(DEVICE)


@st.composite
def windows(draw, most_nodes=12):
    """Rows, committed slots of each, nodes, capacity, a bound on the slots in use and, for trees, who sees whom."""
    rows, n = draw(st.integers(1, 3)), draw(st.integers(1, most_nodes))
    earlier = draw(st.integers(0, 5))
    tree = draw(st.booleans())
    lowest = earlier if tree else 0
    length = [lowest + draw(st.sampled_from([0, 1, 30, 63, 64, 200, 255, 256, 300])) for _ in range(rows)]
    used = max(length) + n
    extent = used + draw(st.sampled_from([0, 1, 250]))
    visible = None
    if tree:
        width = n + earlier
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
        visible = torch.rand(rows, n, width, generator=generator) < 0.5
        # Nothing after the node itself, which it may or may not name.
        visible &= torch.ones(n, width, dtype=torch.bool).tril(earlier)
    return rows, torch.tensor(length, device=DEVICE), n, extent + draw(st.integers(0, 3)), extent, visible


@pytest.mark.parametrize("name", [name for name in runnable("tree_attention") if name != "flex"])
@given(
    window=windows(),
    dtype=st.sampled_from(sorted(DTYPES)),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 8),
    size=st.sampled_from([12, 16, 64, 80, 96, 128]),
    scale=st.sampled_from([0.1, 1.0, 6.0]),
    seed=st.integers(0, 2**20),
)
@FEW
def test_nodes_attend_to_their_prefix_and_to_nothing_else(name, window, dtype, kv_heads, group, size, scale, seed):
    rows, length, n, capacity, extent, visible = window
    dtype = DTYPES[dtype]
    attend = implementation("tree_attention", name, dtype)
    query = normal(seed, rows, n, kv_heads * group, size, dtype=dtype, scale=scale)
    # Groups of one cache, as the decoder has them.
    keys, values = normal(seed + 1, 2, rows, capacity, kv_heads, size, dtype=dtype)
    ancestors, width = None, None
    if visible is not None:
        ancestors, width = attention.pack_ancestors(visible.to(DEVICE)), visible.shape[2]
    exact = attention.tree_attention(
        query.double(), keys.double(), values.double(), length, ancestors, width=width, extent=extent
    )
    unread = torch.arange(capacity, device=DEVICE) >= (length + n)[:, None]
    keys[unread], values[unread] = torch.nan, torch.nan
    mixed = attend(query, keys, values, length, ancestors, width=width, extent=extent)
    assert mixed.dtype == dtype
    # Scores of size s are off by a few s u of float32, which turns weights by as much relative; weights and results
    # are rounded to the narrow type once.
    scores = query.float().norm(dim=-1).max() * keys[~unread].float().norm(dim=-1).max() / size**0.5
    largest = values[~unread].float().abs().max()
    bound = largest * (2 * unit(dtype) + 2.0**-20 * (4 + size**0.5 + 2 * scores.item()))
    assert (mixed.double() - exact).abs().max() <= bound


@pytest.mark.parametrize("name", [name for name in runnable("tree_attention") if name == "triton"])
@given(
    committed=st.sampled_from([0, 5, 63, 250, 255, 300]),
    n=st.integers(1, 8),
    group=st.sampled_from([1, 3, 4]),
    dtype=st.sampled_from(sorted(DTYPES)),
    seed=st.integers(0, 2**20),
)
@FEW
def test_a_node_mixes_the_same_bits_alone_and_in_a_window(name, committed, n, group, dtype, seed):
    dtype = DTYPES[dtype]
    attend = implementation("tree_attention", name, dtype)
    query = normal(seed, 2, n, 2 * group, 64, dtype=dtype)
    keys, values = normal(seed + 1, 2, 2, committed + n + 300, 2, 64, dtype=dtype)
    length = torch.tensor([committed, 1], device=DEVICE)
    together = attend(query, keys, values, length)
    causal = torch.ones(2, n, n, dtype=torch.bool, device=DEVICE).tril()
    as_tree = attend(query, keys, values, length, attention.pack_ancestors(causal), extent=committed + n)
    assert_same_bits(as_tree, together)
    for node in range(n):
        alone = attend(query[:, node : node + 1], keys, values, length + node, extent=committed + n)
        assert_same_bits(alone[:, 0], together[:, node])


def make_layer(seed, rows, n, kv_heads, group, size, capacity, dtype):
    """Projected heads, rotations, a cache, and norm weights of its query and key heads."""
    heads = normal(seed, rows, n, (group + 2) * kv_heads, size, dtype=dtype)
    angle = normal(seed + 1, rows, n, size // 2, dtype=torch.float32, scale=100.0)
    cache = normal(seed + 2, 2, rows, capacity, kv_heads, size, dtype=dtype)
    weight = normal(seed + 3, (group + 1) * kv_heads, size, dtype=dtype)
    return heads, torch.stack((angle.cos(), angle.sin()), -1), cache, weight


@pytest.mark.parametrize("name", runnable("attend"))
@given(
    window=windows(),
    dtype=st.sampled_from(["float16", "bfloat16"]),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 8),
    size=st.sampled_from([64, 128]),
    norm=st.booleans(),
    seed=st.integers(0, 2**20),
)
@FEW
def test_nodes_turn_write_and_attend_at_once(name, window, dtype, kv_heads, group, size, norm, seed):
    rows, length, n, capacity, extent, visible = window
    dtype = DTYPES[dtype]
    heads, rotation, cache, weight = make_layer(seed, rows, n, kv_heads, group, size, capacity, dtype)
    ancestors, width = None, None
    if visible is not None:
        ancestors, width = attention.pack_ancestors(visible.to(DEVICE)), visible.shape[2]
    options = {"eps": 1e-6, "width": width, "extent": extent}
    exact_cache = cache.double()
    exact = attend.attend(
        heads.double(), rotation.double(), *exact_cache, length, ancestors,
        head_norm=weight.double() if norm else None, **options,
    )  # fmt: skip
    slot = torch.arange(capacity, device=DEVICE)
    cache[:, slot >= length[:, None]] = torch.nan
    run = implementation("attend", name, dtype)
    mixed = run(heads, rotation, *cache, length, ancestors, head_norm=weight if norm else None, **options)
    assert mixed.dtype == dtype
    used = slot < (length + n)[:, None]
    assert cache[:, ~used].isnan().all()
    written, exact_written = cache[:, used].double(), exact_cache[:, used]
    largest = exact_written.abs().max()
    assert (written - exact_written).abs().max() <= (2 * unit(dtype) + 2.0**-19) * largest
    # Queries and keys are rounded once each, which moves a score by that much of its size and a weight by as much.
    scores = 1.5 * heads.float().norm(dim=-1).max() * exact_cache[0][used].norm(dim=-1).max() / size**0.5
    if norm:
        scores = 1.5 * weight.float().abs().max() * size**0.5 * exact_cache[0][used].norm(dim=-1).max() / size**0.5
    bound = largest * (2 * unit(dtype) * (1 + 2 * scores.item()) + 2.0**-20 * (4 + size**0.5))
    assert (mixed.double() - exact).abs().max() <= bound


@pytest.mark.parametrize("name", [name for name in runnable("attend") if name == "cuda"])
@given(
    committed=st.sampled_from([0, 5, 63, 250, 1023, 2000]),
    n=st.integers(1, 16),
    group=st.sampled_from([1, 3, 4, 8]),
    size=st.sampled_from([64, 128]),
    dtype=st.sampled_from(["float16", "bfloat16"]),
    seed=st.integers(0, 2**20),
)
@FEW
def test_a_node_attends_to_the_same_bits_alone_and_in_a_window(name, committed, n, group, size, dtype, seed):
    dtype = DTYPES[dtype]
    run = implementation("attend", name, dtype)
    heads, rotation, cache, _ = make_layer(seed, 2, n, 2, group, size, committed + n + 300, dtype)
    length = torch.tensor([committed, 1], device=DEVICE)
    together = run(heads, rotation, *cache, length)
    causal = torch.ones(2, n, n, dtype=torch.bool, device=DEVICE).tril()
    assert torch.equal(run(heads, rotation, *cache, length, attention.pack_ancestors(causal)), together)
    for node in range(n):
        here = slice(node, node + 1)
        alone = run(heads[:, here], rotation[:, here], *cache, length + node)
        assert torch.equal(alone[:, 0], together[:, node])
    one = run(heads[:1], rotation[:1], *cache[:, :1], length[:1])
    assert torch.equal(one, together[:1])


@st.composite
def stacks(draw):
    """A decoder: layers, hidden and inner channels, key heads, queries to each, channels of a head, vocabulary."""
    return (
        draw(st.integers(1, 3)),
        draw(st.sampled_from([8, 64, 520, 1024, 2056, 4096])),
        draw(st.sampled_from([8, 96, 1032, 3000])),
        draw(st.integers(1, 3)),
        draw(st.sampled_from([1, 2, 3, 4, 7])),
        draw(st.sampled_from([64, 128])),
        draw(st.sampled_from([1, 31, 509])),
    )


def make_stack(stack, seed, dtype, *, bias=False, head_norm=False):
    """Layers and ends whose sums are of the size of 1."""
    count, hidden, inner, kv_heads, group, size, vocab = stack
    queries, every = group * kv_heads * size, (group + 2) * kv_heads * size

    def weight(seed, out, into):
        return normal(seed, out, into, dtype=dtype, scale=into**-0.5)

    def vector(seed, length, *, there=True):
        return normal(seed, length, dtype=dtype) if there else None

    made = [
        layers.Layer(
            weight(at, every, hidden),
            vector(at + 1, every, there=bias),
            weight(at + 2, hidden, queries),
            vector(at + 3, hidden, there=bias),
            weight(at + 4, 2 * inner, hidden),
            vector(at + 5, 2 * inner, there=bias),
            weight(at + 6, hidden, inner),
            vector(at + 7, hidden, there=bias),
            vector(at + 8, hidden),
            vector(at + 9, hidden),
            normal(at + 10, (group + 1) * kv_heads, size, dtype=dtype) if head_norm else None,
        )
        for at in range(seed, seed + 11 * count, 11)
    ]
    last = seed + 11 * count
    return made, layers.Ends(
        normal(last, 30, hidden, dtype=dtype), vector(last + 1, hidden), weight(last + 2, vocab, hidden),
        vector(last + 3, vocab, there=bias),
    )  # fmt: skip


def make_nodes(stack, seed, n, committed, dtype):
    """Tokens, their rotations and a cache of which a slot is NaN before it is written."""
    count, _, _, kv_heads, _, size, _ = stack
    tokens = torch.randint(30, (1, n), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    angle = normal(seed + 1, 1, n, size // 2, dtype=torch.float32, scale=100.0)
    slots = normal(seed + 2, 2 * count, 1, committed + n + 20, kv_heads, size, dtype=dtype)
    slots[:, :, committed:] = torch.nan
    return tokens, torch.stack((angle.cos(), angle.sin()), -1), slots, torch.tensor([committed], device=DEVICE)


ONE_LAUNCH = [name for name in runnable("layers") if name == "cuda"]


@pytest.mark.parametrize("name", ONE_LAUNCH)
@given(
    stack=stacks(),
    n=st.integers(1, 8),
    committed=st.sampled_from([0, 1, 15, 16, 63, 250, 700]),
    dtype=st.sampled_from(["float16", "bfloat16"]),
    bias=st.booleans(),
    head_norm=st.booleans(),
    tree=st.booleans(),
    seed=st.integers(0, 2**20),
)
@FEW
def test_all_layers_at_once_are_the_layers(name, stack, n, committed, dtype, bias, head_norm, tree, seed):
    dtype = DTYPES[dtype]
    made, ends = make_stack(stack, seed, dtype, bias=bias, head_norm=head_norm)
    tokens, rotation, slots, length = make_nodes(stack, seed, n, committed, dtype)
    ancestors = None
    if tree:
        visible = torch.rand(1, n, n, generator=torch.Generator().manual_seed(seed)).to(DEVICE) < 0.5
        ancestors = attention.pack_ancestors(visible.tril(-1))
    options = {"width": n, "count": len(made), "logits": True}
    run = implementation("layers", name, dtype)(made, ends, 1e-5)
    apart = layers.bind_layers(made, ends, 1e-5)
    own, theirs = slots.clone(), slots.nan_to_num()
    hidden, logits = run(tokens, rotation, own, length, ancestors, **options)
    expected, scores = apart(tokens, rotation, theirs, length, ancestors, **options)
    assert hidden.dtype == dtype
    assert logits.dtype == torch.float32
    # Roundings of one layer are what the next one sees, so a few units of the largest, and far less on average.
    new = slice(committed, committed + n)
    for found, wanted in ((hidden, expected), (logits, scores), (own[:, :, new], theirs[:, :, new])):
        # Sums are of the size of 1, also where the few that are here are not.
        error, largest = (found.double() - wanted.double()).abs(), wanted.double().abs().max().clamp(min=1)
        assert error.max() <= 40 * unit(dtype) * largest
        assert error.mean() <= 5 * unit(dtype) * largest
    assert torch.equal(own[:, :, :committed], slots[:, :, :committed])
    assert own[:, :, committed + n :].isnan().all()


@pytest.mark.parametrize("name", ONE_LAUNCH)
@given(
    stack=stacks(),
    n=st.integers(2, 8),
    committed=st.sampled_from([0, 5, 63, 250, 505, 1023]),
    dtype=st.sampled_from(["float16", "bfloat16"]),
    seed=st.integers(0, 2**20),
)
@FEW
def test_a_node_goes_through_all_layers_to_the_same_bits_alone_and_in_company(name, stack, n, committed, dtype, seed):
    dtype = DTYPES[dtype]
    made, ends = make_stack(stack, seed, dtype)
    tokens, rotation, slots, length = make_nodes(stack, seed, n, committed, dtype)
    run = implementation("layers", name, dtype)(made, ends, 1e-5)
    options = {"count": len(made), "logits": True}
    own = slots.clone()
    hidden, logits = run(tokens, rotation, own, length, None, width=n, **options)
    causal = attention.pack_ancestors(torch.ones(1, n, n, dtype=torch.bool, device=DEVICE).tril())
    as_tree = run(tokens, rotation, slots.clone(), length, causal, width=n, **options)
    assert torch.equal(as_tree[0], hidden)
    assert torch.equal(as_tree[1], logits)
    alone = slots.clone()
    for node in range(n):
        here = slice(node, node + 1)
        state, scores = run(tokens[:, here], rotation[:, here], alone, length + node, None, width=1, **options)
        assert torch.equal(state, hidden[:, here])
        assert torch.equal(scores, logits[:, here])
    assert torch.equal(alone.nan_to_num(), own.nan_to_num())


@pytest.mark.parametrize("name", ONE_LAUNCH)
@pytest.mark.parametrize("n", [1, 8])
def test_all_layers_give_the_same_bits_every_time(name, n):
    # Blocks that wait for each other meet in another order every time, and it takes many tiles to see one too early.
    stack = (6, 3072, 8192, 8, 3, 128, 32000)
    made, ends = make_stack(stack, 0, torch.bfloat16)
    tokens, rotation, slots, length = make_nodes(stack, 0, n, 500, torch.bfloat16)
    run = implementation("layers", name, torch.bfloat16)(made, ends, 1e-5)
    first = run(tokens, rotation, slots, length, None, width=n, count=len(made), logits=True)
    for _ in range(100):
        again = run(tokens, rotation, slots, length, None, width=n, count=len(made), logits=True)
        assert torch.equal(again[0], first[0])
        assert torch.equal(again[1], first[1])


@pytest.mark.parametrize("name", ONE_LAUNCH)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_layers_end_on_numbers_with_the_bits_of_nothing_told_yet(name, dtype):
    # They are NaNs, which checkpoints and caches can hold.
    stack = (2, 520, 96, 2, 3, 128, 31)
    made, ends = make_stack(stack, 0, dtype, bias=True, head_norm=True)
    tokens, rotation, slots, length = make_nodes(stack, 0, 3, 70, dtype)
    for tensor in (*(weight for layer in made for weight in layer), *ends, slots):
        tensor.view(torch.int16).fill_(-1)
    run = implementation("layers", name, dtype)(made, ends, 1e-5)
    hidden, logits = run(tokens, rotation, slots, length, None, width=3, count=2, logits=True)
    assert hidden.isnan().all()
    assert logits.isnan().all()


@given(width=st.integers(1, 64), earlier=st.integers(0, 8), seed=st.integers(0, 2**20))
def test_bit_masks_hold_64_slots(width, earlier, seed):
    visible = torch.rand(2, max(1, width - earlier), width, generator=torch.Generator().manual_seed(seed)) < 0.5
    assert torch.equal(attention.unpack_ancestors(attention.pack_ancestors(visible), width), visible)


def test_a_tree_wider_than_its_masks_is_refused():
    with pytest.raises(ValueError, match="65 nodes"):
        attention.pack_ancestors(torch.ones(1, 65, 65, dtype=torch.bool))


def test_flex_attention_computes_the_definition():
    # As FlexAttention without a compiler, which is what runs everywhere.
    from specdec_kernels.ops import attention_flex

    length = torch.tensor([0, 7], device=DEVICE)
    visible = torch.rand(2, 3, 5, generator=torch.Generator().manual_seed(0)).to(DEVICE) < 0.5
    visible &= torch.ones(3, 5, dtype=torch.bool, device=DEVICE).tril(2)
    query = normal(1, 2, 3, 4, 16, dtype=torch.float32)
    keys, values = normal(2, 2, 2, 16, 2, 16, dtype=torch.float32)
    for ancestors, width, slots in ((None, None, length), (attention.pack_ancestors(visible), 5, length + 2)):
        expected = attention.tree_attention(query, keys, values, slots, ancestors, width=width)
        mixed = attention_flex.tree_attention(query, keys, values, slots, ancestors, width=width)
        torch.testing.assert_close(mixed, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", runnable("rms_norm_residual"))
@given(
    rows=st.integers(1, 5),
    size=st.sampled_from([1, 7, 32, 48, 576, 3072]),
    add=st.booleans(),
    dtype=st.sampled_from(sorted(DTYPES)),
    seed=st.integers(0, 2**20),
)
@FEW
def test_the_norm_is_that_of_the_sum(name, rows, size, add, dtype, seed):
    dtype = DTYPES[dtype]
    hidden, weight = normal(seed, rows, 1, size, dtype=dtype), normal(seed + 1, size, dtype=dtype)
    delta = normal(seed + 2, rows, 1, size, dtype=dtype) if add else None
    total, normed = implementation("rms_norm_residual", name, dtype)(hidden, delta, weight, 1e-5)
    exact_total = hidden.double() if delta is None else hidden.double() + delta.double()
    assert ((total - exact_total).abs() <= unit(dtype) * exact_total.abs()).all()
    # From the sum as it is stored: the norm is rounded once or, in torch, at most twice.
    _, exact = fused.rms_norm_residual(total.double(), None, weight.double(), 1e-5)
    assert ((normed - exact).abs() <= (2 * unit(dtype) + 2.0**-20) * exact.abs() + 1e-6).all()


@pytest.mark.parametrize("name", runnable("silu_mul"))
@given(
    rows=st.integers(1, 5),
    size=st.sampled_from([1, 7, 40, 1025]),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
    dtype=st.sampled_from(sorted(DTYPES)),
    seed=st.integers(0, 2**20),
)
@FEW
def test_silu_times_up(name, rows, size, scale, dtype, seed):
    dtype = DTYPES[dtype]
    inner = normal(seed, rows, 2 * size, dtype=dtype, scale=scale)
    made = implementation("silu_mul", name, dtype)(inner)
    exact = fused.silu_mul(inner.double())
    # Where exp overflows the result is 0: what is lost is gate times up at the edge of the smallest numbers.
    tiny = torch.finfo(dtype).smallest_normal * (1 + inner.double().abs().max() ** 2)
    # The hardware's exp rounds its argument first, so its relative error grows with it.
    relative = 2 * unit(dtype) + 2.0**-20 + 2.0**-23 * inner.double().abs().max()
    assert ((made - exact).abs() <= relative * exact.abs() + tiny).all()


@pytest.mark.parametrize("name", runnable("rope_write"))
@given(
    rows=st.integers(1, 3),
    n=st.integers(1, 4),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 8),
    size=st.sampled_from([2, 12, 64, 80, 128]),
    norm=st.booleans(),
    dtype=st.sampled_from(sorted(DTYPES)),
    seed=st.integers(0, 2**20),
)
@FEW
def test_heads_turn_and_go_to_their_slots_and_nowhere_else(name, rows, n, kv_heads, group, size, norm, dtype, seed):
    dtype = DTYPES[dtype]
    heads = normal(seed, rows, n, (group + 2) * kv_heads, size, dtype=dtype)
    weight = normal(seed + 1, (group + 1) * kv_heads, size, dtype=dtype) if norm else None
    angle = normal(seed + 2, rows, n, size // 2, dtype=torch.float32, scale=100.0)
    rotation = torch.stack((angle.cos(), angle.sin()), -1)
    slots = torch.stack(
        [torch.randperm(9, generator=torch.Generator().manual_seed(seed + row))[:n] for row in range(rows)]
    )
    slots = slots.to(DEVICE)
    cache = torch.full((4, rows, 9, kv_heads, size), torch.nan, dtype=dtype, device=DEVICE)
    exact_cache = cache.double()
    wide = None if weight is None else weight.double()
    exact = fused.rope_write(heads.double(), rotation.double(), slots, exact_cache[2], exact_cache[3], wide, 1e-6)
    query = implementation("rope_write", name, dtype)(heads, rotation, slots, cache[2], cache[3], weight, 1e-6)
    largest = exact_cache[2].nan_to_num().abs().max().maximum(exact.abs().max())
    bound = (2 * unit(dtype) + 2.0**-19) * largest
    assert (query - exact).abs().max() <= bound
    assert torch.equal(cache.isnan(), exact_cache.isnan())
    assert (cache[2] - exact_cache[2]).nan_to_num().abs().max() <= bound
    assert torch.equal(cache[3].nan_to_num().double(), exact_cache[3].nan_to_num())


@st.composite
def products(draw):
    rows, inputs = draw(st.integers(1, 20)), draw(st.sampled_from([1, 24, 64, 256, 300, 512]))
    gated = draw(st.booleans())
    return (
        rows,
        inputs,
        draw(st.sampled_from([1, 5, 16, 40])),
        gated,
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.booleans()),
    )


def make_product(case, dtype, seed):
    rows, inputs, outputs, gated, bias, norm, residual = case
    lines = outputs * (2 if gated else 1)
    x, weight = normal(seed, rows, inputs, dtype=dtype), normal(seed + 1, lines, inputs, dtype=dtype)
    options = {
        "bias": normal(seed + 2, lines, dtype=dtype) if bias else None,
        "norm": normal(seed + 3, inputs, dtype=dtype) if norm else None,
        "eps": 1e-5,
        "gated": gated,
        "residual": normal(seed + 4, rows, outputs, dtype=dtype) if residual else None,
    }
    return x, weight * inputs**-0.5, options


def widened(options):
    return {key: value.double() if torch.is_tensor(value) else value for key, value in options.items()}


@pytest.mark.parametrize("name", runnable("product"))
@given(case=products(), dtype=st.sampled_from(["float16", "bfloat16"]), wide=st.booleans(), seed=st.integers(0, 2**20))
@FEW
def test_products_take_norms_gates_and_residuals_with_them(name, case, dtype, wide, seed):
    dtype = DTYPES[dtype]
    x, weight, options = make_product(case, dtype, seed)
    out = torch.float32 if wide else None
    made = implementation("product", name, dtype)(x, weight, **options, dtype=out)
    exact = product.product(x.double(), weight.double(), **widened(options))
    assert made.dtype == (out or dtype)
    # Each term is rounded a few times, and what is rounded after the sum is no larger than the sum of the sizes.
    absolute = {key: value.abs() if torch.is_tensor(value) else value for key, value in widened(options).items()}
    sizes = product.product(x.double().abs(), weight.double().abs(), **absolute)
    assert ((made - exact).abs() <= 8 * unit(dtype) * (sizes.abs() + 1)).all()


@pytest.mark.parametrize("name", [name for name in runnable("product") if name != "torch"])
@given(case=products(), dtype=st.sampled_from(["float16", "bfloat16"]), seed=st.integers(0, 2**20))
@FEW
def test_a_row_of_a_product_is_the_same_bits_alone_and_in_company(name, case, dtype, seed):
    dtype = DTYPES[dtype]
    multiply = implementation("product", name, dtype)
    # What they promise it for: more rows go to another implementation.
    rows = import_module(f"specdec_kernels.ops.product_{name}").MOST_ROWS
    x, weight, options = make_product((min(case[0], rows), *case[1:]), dtype, seed)
    together = multiply(x, weight, **options)
    for row in {0, seed % len(x), len(x) - 1}:
        here = slice(row, row + 1)
        residual = options["residual"]
        alone = multiply(x[here], weight, **{**options, "residual": None if residual is None else residual[here]})
        assert_same_bits(alone[0], together[row])

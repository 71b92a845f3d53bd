"""Every implementation of the verification operations against its definition: on a GPU as compiled, else interpreted.

Integers must be equal. Only where a coin lies within `EDGE` of what it is compared with may a decision differ, and then
the definition's own must change when that coin (or top-p) is moved by as much.
"""

from contextlib import ExitStack, contextmanager
from importlib import import_module
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec_kernels.dispatch import implementations, resolve
from specdec_kernels.ops import law, philox, verify

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
EDGE = 1e-5
# A draw of shapes takes the interpreter as long as a hundred ordinary examples.
few = settings(max_examples=max(8, settings().max_examples // 4))
fewer = settings(max_examples=max(4, settings().max_examples // 8))
VOCABULARIES = st.sampled_from([1, 2, 7, 31, 257, 1009, 5003])
WARPS = st.sampled_from(
    [
        {"temperature": 1.0},
        {"temperature": 0.7},
        {"temperature": 0.0},
        {"temperature": 0.9, "top_k": 3},
        {"temperature": 1.3, "top_p": 0.7},
        {"temperature": 1.0, "min_p": 0.1},
        {"temperature": 0.5, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
    ]
)


def runnable(op, dtype=torch.float32):
    """The implementations other than the definition that run here when asked for by name."""
    return [name for name, problem in implementations(op, DEVICE, dtype).items() if problem is None and name != "torch"]


def function(op, name, dtype):
    if name not in runnable(op, dtype):
        return None
    return resolve(op, DEVICE, dtype, (), name)


@contextmanager
def poisoned():
    """Fresh memory holds NaN, or a number that is no index."""
    real = torch.empty

    def empty(*shape, **options):
        made = real(*shape, **options)
        return made.fill_(float("nan") if made.is_floating_point() else -(10**6)) if made.dtype != torch.bool else made

    torch.empty = empty
    try:
        yield
    finally:
        torch.empty = real


def laid_out(tensor, layout):
    """The same numbers elsewhere in memory."""
    if layout == "contiguous":
        return tensor
    if layout == "transposed":
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    wider = tensor.new_zeros(*tensor.shape[:-1], 2 * tensor.shape[-1] + 3)
    if layout == "rows apart":
        wider[..., 3 : 3 + tensor.shape[-1]] = tensor
        return wider[..., 3 : 3 + tensor.shape[-1]]
    wider[..., : 2 * tensor.shape[-1] : 2] = tensor
    return wider[..., : 2 * tensor.shape[-1] : 2]


LAYOUTS = st.sampled_from(["contiguous", "transposed", "rows apart", "every other"])


@st.composite
def rounds(draw, *, chain=None, dtypes=DTYPES):
    """A tree, logits and laws of any shape: ragged, all accepted, all rejected, with ties."""
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    b, n, v = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3, 5, 9])), draw(VOCABULARIES)
    chain = draw(st.booleans()) if chain is None else chain
    dtype = draw(st.sampled_from(dtypes))
    logits = 2 * torch.randn(b, n, v, generator=generator)
    if draw(st.booleans()):
        logits = logits.round()
    logits = logits.to(dtype)
    parents = torch.full((b, n), -1)
    for i in range(1, n):
        parents[:, i] = i - 1 if chain else torch.randint(0, i, (b,), generator=generator)
    valid = torch.ones(b, n, dtype=torch.bool)
    drop = torch.rand(b, n, generator=generator) < draw(st.sampled_from([0.0, 0.3]))
    for i in range(1, n):
        valid[:, i] = ~drop[:, i] & valid.gather(1, parents[:, i : i + 1])[:, 0]
    tokens = torch.randint(0, v, (b, n), generator=generator)
    if draw(st.booleans()):
        tokens = logits.argmax(-1).gather(1, parents.clamp_min(0))
    laws, sampled = None, torch.zeros_like(valid)
    if draw(st.booleans()):
        kind = torch.float64 if dtype == torch.float64 else torch.float32
        laws = torch.softmax(torch.randn(b, n, v, generator=generator, dtype=torch.float64), -1).to(kind)
        sampled = valid & (torch.rand(b, n, generator=generator) < 0.7)
        sampled[:, 0] = False
    coins = torch.rand(b, n + 1, generator=generator, dtype=torch.float64) * draw(st.sampled_from([1.0, 1.0, 0.0]))
    ids = draw(st.sampled_from([torch.int32, torch.int64]))
    layout = draw(LAYOUTS)
    made = {
        "logits": laid_out(logits, layout),
        "tokens": laid_out(tokens.to(ids), draw(LAYOUTS)),
        "parents": laid_out(parents.to(ids), draw(LAYOUTS)),
        "valid": laid_out(valid, draw(LAYOUTS)),
        "sampled": sampled,
        "draft_probs": None if laws is None else laid_out(laws, layout),
        "accept": coins[:, :n],
        "token": coins[:, n],
    }
    return {name: value if value is None else value.to(DEVICE) for name, value in made.items()}, chain


def pick(case, *names):
    return {name: case[name] for name in names}


def same_rows(first, second):
    """Rows of two verifications that decided alike."""
    return (
        (first.path == second.path).all(-1)
        & (first.num_accepted == second.num_accepted)
        & (first.next_token == second.next_token)
    )


def assert_agrees(made, definition, arguments):
    """See the module. The definition computes in float64."""
    arguments = {**arguments, "logits": arguments["logits"].double()}
    wanted = definition(**arguments)
    same = same_rows(made, wanted)
    if not bool(same.all()):
        moved = []
        for step in (-EDGE, EDGE):
            for name in {"accept", "token", "top_p"} & arguments.keys():
                value = arguments[name] + step
                value = min(max(value, EDGE), 1.0) if name == "top_p" else value.clamp(0, 1)
                moved.append(same_rows(definition(**{**arguments, name: value}), wanted))
        assert bool((same | ~torch.stack(moved).all(0)).all()), f"{made} is not {wanted}"
    assert torch.allclose(made.accept_prob[same].double(), wanted.accept_prob[same].double(), atol=EDGE, rtol=0)


@pytest.mark.parametrize("name", ["torch", *runnable("verify_greedy")])
@few
@given(case=rounds(), broken=st.booleans(), data=st.data())
def test_greedy_follows_the_first_largest(name, case, broken, data):
    case, chain = case
    logits = case["logits"].clone() if broken else case["logits"]
    if broken:
        row, node, token = (data.draw(st.integers(0, size - 1)) for size in logits.shape)
        logits[row, node, token] = float("nan")
    run = function("verify_greedy", name, logits.dtype) or verify.verify_greedy
    with poisoned():
        made = run(logits, *pick(case, "tokens", "parents", "valid").values(), chain=chain)
    # Walk by hand: the first valid child that carries the first largest logit, where a NaN is larger than all.
    tokens, parents, valid = (case[key].tolist() for key in ("tokens", "parents", "valid"))
    for row, choices in enumerate(logits.double().argmax(-1).tolist()):
        node, path = 0, []
        while True:
            children = [i for i in range(1, len(choices)) if valid[row][i] and parents[row][i] == node]
            child = next((i for i in children if tokens[row][i] == choices[node]), None)
            if child is None:
                break
            node = child
            path.append(node)
        assert made.path[row].tolist() == path + [-1] * (len(choices) - len(path))
        assert int(made.num_accepted[row]) == len(path)
        assert int(made.next_token[row]) == choices[node]
        assert made.accept_prob[row].tolist() == [float(i in path) for i in range(len(choices))]


@contextmanager
def sharing(name, again, narrow):
    """In Triton, rows without a rejection draw from what the parts of their law weigh, or have them weighed `again`, as
    many long rows do; and programs share a row as they do by default, or few of them many `narrow` parts."""
    if name != "triton":
        yield
        return
    module = import_module("specdec_kernels.ops.rejection_triton")
    with ExitStack() as changed:
        if again:
            changed.enter_context(mock.patch.object(module, "_MOST_DRAWN", 0))
        if narrow:
            changed.enter_context(mock.patch.object(module, "_WIDEST", 128))
            programs = 6 if DEVICE.type == "cuda" else 1
            changed.enter_context(mock.patch.object(module.law, "together", return_value=programs))
        yield


@pytest.mark.parametrize("name", runnable("verify_lossless"))
@few
@given(case=rounds(), warp=WARPS, replacement=st.booleans(), again=st.booleans(), narrow=st.booleans())
def test_lossless_agrees(name, case, warp, replacement, again, narrow):
    case, _ = case
    with poisoned(), sharing(name, again, narrow):
        made = function("verify_lossless", name, case["logits"].dtype)(**case, replacement=replacement, **warp)
    assert_agrees(made, verify.verify_lossless, {**case, "replacement": replacement, **warp})


@pytest.mark.parametrize("name", runnable("verify_block"))
@fewer
@given(case=rounds(chain=True), warp=WARPS, again=st.booleans(), narrow=st.booleans())
def test_block_agrees(name, case, warp, again, narrow):
    case, _ = case
    case = {key: value for key, value in case.items() if key != "parents"}
    with poisoned(), sharing(name, again, narrow):
        made = function("verify_block", name, case["logits"].dtype)(**case, **warp)
    assert_agrees(made, verify.verify_block, {**case, **warp})


@pytest.mark.parametrize(
    ("op", "name"),
    [(op, name) for op in ("verify_lossless", "verify_block", "verify_match") for name in ("torch", *runnable(op))],
)
@fewer
@given(case=rounds(chain=True), seed=st.integers(-(2**63), 2**63 - 1), round=st.integers(0, 2**31))
def test_uniforms_made_from_seed_and_round_are_those_of_the_generator(op, name, case, seed, round):
    case, _ = case
    if op == "verify_block":
        del case["parents"]
    if op == "verify_match":
        case = pick(case, "logits", "tokens", "parents", "valid", "accept")
    rows, n = case["tokens"].shape
    seeds = torch.tensor([seed, seed ^ 1, 0][:rows], device=DEVICE)
    rounds = torch.tensor([round, 7, 0][:rows], device=DEVICE)
    made = philox.uniforms(seeds, rounds, philox.ACCEPT, n, philox.TOKEN)
    given = {name: value for name, value in (("accept", made[:, :n]), ("token", made[:, n])) if name in case}
    told = {**case, **given}
    untold = {**case, **dict.fromkeys(given), "seed": seeds, "round": rounds}
    run = resolve(op, DEVICE, case["logits"].dtype, (), name)
    with poisoned():
        for wanted, found in zip(run(**told, temperature=0.8), run(**untold, temperature=0.8), strict=True):
            assert torch.equal(wanted, found)
    with pytest.raises(ValueError, match=f"{op} needs accept and token, or seed and round"):
        run(**{**untold, "round": None}, temperature=0.8)


@pytest.mark.parametrize("name", runnable("verify_match"))
@few
@given(case=rounds(), warp=WARPS)
def test_match_agrees(name, case, warp):
    case, chain = case
    case = {**pick(case, "logits", "tokens", "parents", "valid", "accept"), "chain": chain, **warp}
    with poisoned():
        made = function("verify_match", name, case["logits"].dtype)(**case)
    assert_agrees(made, verify.verify_match, case)


@pytest.mark.parametrize("name", runnable("verify_coupled"))
@few
@given(case=rounds(), warp=WARPS, given_noise=st.booleans(), seed=st.integers(-(2**63), 2**63 - 1))
def test_coupled_agrees(name, case, warp, given_noise, seed):
    case, chain = case
    b, n, v = case["logits"].shape
    seeds = torch.tensor([seed] * b, device=DEVICE)
    position = torch.arange(n, device=DEVICE).expand(b, n) + 3
    noise = {"seed": seeds, "position": position}
    if given_noise:
        noise = {"noise": philox.gumbel(seeds, position, v)}
    tree = pick(case, "logits", "tokens", "parents", "valid")
    with poisoned():
        made = function("verify_coupled", name, case["logits"].dtype)(**tree, **noise, chain=chain, **warp)
    assert_agrees(made, verify.verify_coupled, {**tree, **noise, "chain": chain, **warp})


@pytest.mark.parametrize("name", runnable("warp"))
@few
@given(case=rounds(), warp=WARPS)
def test_warp_keeps_and_weighs_alike(name, case, warp):
    logits = case[0]["logits"]
    with poisoned():
        made = function("warp", name, logits.dtype)(logits, **warp)
    wanted = law.warp(logits.double(), **warp)
    assert made.dtype == law.warp(logits, **warp).dtype
    close = torch.isclose(made.double(), wanted, rtol=EDGE, atol=1e-30).all(-1)
    if not bool(close.all()):
        # A token at the edge of top-p or min-p may go either way; what the edge is moved by must then decide as well.
        moved = [
            law.warp(logits.double(), **{**warp, key: warp[key] + step})
            for key in {"top_p", "min_p"} & warp.keys()
            for step in (-EDGE, EDGE)
        ]
        edge = torch.stack([((other > 0) != (wanted > 0)).any(-1) for other in moved]).any(0) if moved else ~close
        assert bool((close | (edge & torch.tensor(bool(moved), device=DEVICE))).all())


@pytest.mark.parametrize("name", runnable("philox"))
@fewer
@given(
    seed=st.integers(-(2**63), 2**63 - 1),
    counters=st.lists(st.integers(0, 2**32 - 1), min_size=4, max_size=4),
    sizes=st.sampled_from([{"_COUNTERS": 256}, {"_COUNTERS": 8}, {"_COUNTERS": 8, "_WIDE": 0}]),
)
def test_philox_words_are_equal(name, seed, counters, sizes):
    # By several programs, and with places of 64 bits, as only billions of words have them otherwise.
    module = import_module(f"specdec_kernels.ops.philox_{name}")
    seeds = torch.tensor([seed, seed ^ 1, 0], device=DEVICE)
    first, second, third, fourth = (torch.tensor(word, device=DEVICE) for word in counters)
    lane, row = torch.arange(5, device=DEVICE), torch.arange(3, device=DEVICE)
    wide = (lane[None, None] ^ first, lane[None, :2, None] ^ second, row[:, None, None] ^ third, fourth.view(1, 1, 1))
    flat = (lane[None] ^ first, lane[None] ^ second, row[:, None] ^ third, fourth.view(1, 1))
    run = function("philox", name, torch.int64)
    for counter in (wide, flat):
        with poisoned(), mock.patch.multiple(module, **sizes):
            made = run(counter, seeds)
        for words, wanted in zip(made, philox.philox(counter, seeds), strict=True):
            assert torch.equal(words, wanted)


@pytest.mark.parametrize("name", runnable("uniforms"))
@fewer
@given(
    seed=st.integers(-(2**63), 2**63 - 1),
    round=st.integers(0, 2**32 - 1),
    purpose=st.integers(1, 9),
    n=st.sampled_from([1, 2, 9, 1500]),
    last=st.sampled_from([None, 3]),
    rows=st.sampled_from([(3, 3), (1, 3), (3, 1)]),
)
def test_uniforms_have_equal_bits(name, seed, round, purpose, n, last, rows):
    seeds = torch.tensor([seed, seed ^ 1, 0][: rows[0]], device=DEVICE)
    rounds = torch.tensor([round, 1, 0][: rows[1]], device=DEVICE)
    with poisoned():
        made = function("uniforms", name, torch.int64)(seeds, rounds, purpose, n, last)
    assert torch.equal(made, philox.uniforms(seeds, rounds, purpose, n, last))


@pytest.mark.parametrize("name", runnable("gumbel"))
@fewer
@given(seed=st.integers(-(2**63), 2**63 - 1), vocab_size=VOCABULARIES, position=st.integers(0, 2**31))
def test_gumbel_noise_is_equal_to_the_last_places(name, seed, vocab_size, position):
    seeds = torch.tensor([seed, seed ^ 5], device=DEVICE)
    positions = torch.tensor([[position, 1, 0], [2, position, 7]], device=DEVICE)
    with poisoned():
        made = function("gumbel", name, torch.int64)(seeds, positions, vocab_size)
    wanted = philox.gumbel(seeds, positions, vocab_size)
    assert bool(((made - wanted).abs() <= wanted.abs() * 2.0**-50 + 2.0**-50).all())

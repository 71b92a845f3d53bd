"""Choosing rules in Triton: the largest of each row's logits, alone or with Gumbel noise, and the walk that follows.

Two launches whatever the sizes. The first gives every row of the vocabulary to enough programs to fill the device and
writes each one's largest value and its first index; the second, one program a row, compares those and walks. Nothing
as large as the logits is written. Greedy choices are those of `verify.verify_greedy` bit for bit, NaN and ties
included. Coupled ones compare `logits / temperature + noise`, where the definition compares `log p + noise`, which
differs by a constant of the row: they may differ where the two best sums are within 2^-21 of their size
(2^-48 for float64 logits).
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec_kernels.ops import law_triton as law
from specdec_kernels.ops import philox_triton
from specdec_kernels.ops.verify import NO_NOISE
from specdec_kernels.ops.walk import Verification

BEYOND = tl.constexpr(0x7FFFFFFF)


@triton.jit
@no_type_check
def better(value, index, best, where):
    """Whether (value, index) comes before (best, where): NaN first, then the larger, then the lower index."""
    value_nan, best_nan = value != value, best != best
    tie = (value == best) | (value_nan & best_nan)
    return (value > best) | (value_nan & (best == best)) | (tie & (index < where))


@triton.jit
@no_type_check
def first_largest(value, index):
    """The largest value and its lowest index; NaN counts as the largest. One axis."""
    nan = value != value
    broken = tl.max(nan.to(tl.int32), 0) > 0
    top = tl.max(tl.where(nan, float("-inf"), value), 0)
    first = tl.min(tl.where(tl.where(broken, nan, value == top), index, BEYOND), 0)
    return tl.where(broken, float("nan"), top), first


@triton.jit(do_not_specialize=["n", "splits", "tiles"])
@no_type_check
def _largest(
    values, indices, logits, stride_b, stride_n, n, v, splits, tiles,
    noise, noise_b, noise_n, noise_v, seed, seed_stride, position, position_b, position_n, threshold, cut,
    temperature: tl.constexpr, source: tl.constexpr, filtered: tl.constexpr,
    kind: tl.constexpr, wide: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Largest value and first index of one of `splits` parts of a row. `source` of noise: 0 none, 1 given, 2 made."""
    line, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, node = line // n, line % n
    here = logits + row * stride_b + node * stride_n
    lanes = tl.arange(0, block)
    best = tl.full([block], float("-inf"), wide)
    where = tl.full([block], BEYOND, tl.int32)
    # With noise made here: of the tokens so far.
    top = tl.full([], float("-inf"), wide)
    index = tl.program_id(0) * 0 + BEYOND
    for tile in range(tiles):
        begin = (part * tiles + tile) * block
        token = begin + lanes
        mask = token < v
        value = tl.load(here + token, mask=mask, other=float("-inf")).to(kind)
        value = law.scaled(value, temperature, filtered)
        if filtered:
            kept = law.keeps(value, token, tl.load(threshold + line), tl.load(cut + line))
            value = tl.where(kept | (value != value), value, float("-inf"))
        if source == 2:
            place = tl.load(position + row * position_b + node * position_n)
            word = philox_triton.token_words(begin, place, tl.load(seed + row * seed_stride), block)
            # Noise in float64 costs more than all the rest, and few tiles hold a token that could win. The sum is
            # rounded, within 2^-24 of its larger part.
            most = value + (philox_triton.most_noise(word).to(kind) + tl.abs(value) * 1e-6)
            most = tl.where(value == float("-inf"), value, tl.where(value == value, most, float("inf")))
            if tl.max(most, 0).to(wide) >= top:
                exact = tl.where(mask, value.to(wide) + philox_triton.noise(word), float("-inf"))
                tile_top, tile_index = first_largest(exact, tl.where(mask, token, BEYOND))
                first = better(tile_top, tile_index, top, index)
                top, index = tl.where(first, tile_top, top), tl.where(first, tile_index, index)
        else:
            value = value.to(wide)
            if source == 1:
                given = noise + row * noise_b + node * noise_n
                value += tl.load(given + token.to(tl.int64) * noise_v, mask=mask, other=0.0).to(wide)
            first = mask & better(value, token, best, where)
            best, where = tl.where(first, value, best), tl.where(first, token, where)
    if source != 2:
        top, index = first_largest(best, where)
    tl.store(values + line * splits + part, top)
    tl.store(indices + line * splits + part, index)


@triton.jit(do_not_specialize=["n", "parts", "tiles"])
@no_type_check
def _sampled(
    choice, logits, stride_b, stride_n, n, v, parts, tiles, accept, accept_b, accept_n, seed, seed_b, round, round_b,
    maxima, totals, threshold, cut,
    made: tl.constexpr, temperature: tl.constexpr, filtered: tl.constexpr,
    kind: tl.constexpr, width: tl.constexpr, block: tl.constexpr, even: tl.constexpr,
):  # fmt: skip
    """Invert the distribution function of one node's law: find the part, then the token in it."""
    line = tl.program_id(0).to(tl.int64)
    row, node = line // n, (line % n).to(tl.int32)
    here = logits + row * stride_b + node * stride_n
    which = tl.arange(0, width)
    sums, top, total = law.parts_of(maxima, totals, line, parts, width)
    uniform = philox_triton.coins(
        node, node >= 0, row, accept, accept_b, accept_n, seed, seed_b, round, round_b, philox_triton.ACCEPTING, made
    )
    goal = uniform * total
    part, base = law.part_of(sums, which, parts, goal)
    found = tl.program_id(0) * 0 + BEYOND
    last = tl.program_id(0) * 0
    tile = tl.program_id(0) * 0
    while tile < tiles:
        start = (part * tiles + tile) * block
        token = start + tl.arange(0, block)
        mask = token < v
        weight = law.weights(
            here, token, mask, top, threshold + line, cut + line, temperature, filtered, kind
        )  # fmt: skip
        found, last_here, base = law.token_of(weight.to(tl.float64), start, base, goal, block, even)
        last = tl.maximum(last, last_here)
        tile = tl.where(found < BEYOND, tiles, tile + 1)
    tl.store(choice + line, tl.where(found < BEYOND, found, last))


@triton.jit(do_not_specialize=["n", "splits"])
@no_type_check
def _walk(
    path, count, next_token, accept_prob, values, indices, tokens, tokens_b, tokens_n,
    parents, parents_b, parents_n, valid, valid_b, valid_n, n, splits,
    chain: tl.constexpr, nodes: tl.constexpr,
):  # fmt: skip
    """Join the parts of every node's choice and follow them from the root."""
    row = tl.program_id(0).to(tl.int64)
    node = tl.arange(0, nodes)
    exists = node < n
    line = (row * n + node) * splits
    best = tl.load(values + line, mask=exists, other=0)
    choice = tl.load(indices + line, mask=exists, other=0)
    for part in range(1, splits):
        value = tl.load(values + line + part, mask=exists, other=0)
        index = tl.load(indices + line + part, mask=exists, other=0)
        first = better(value, index, best, choice)
        best, choice = tl.where(first, value, best), tl.where(first, index, choice)

    depth = tl.program_id(0) * 0
    steps = tl.full([nodes], -1, tl.int32)
    if chain:
        # Node i goes on when draft i + 1 is what it chose.
        draft = tl.load(tokens + row * tokens_b + (node + 1) * tokens_n, mask=node + 1 < n, other=-1)
        alive = tl.load(valid + row * valid_b + (node + 1) * valid_n, mask=node + 1 < n, other=0) != 0
        goes_on = alive & (draft == choice) & (node + 1 < n)
        depth = tl.min(tl.where(goes_on, nodes, node), 0)
        steps = tl.where(node < depth, node + 1, -1)
        tl.store(accept_prob + row * n + node, ((node > 0) & (node <= depth)).to(tl.float32), mask=exists)
    else:
        token = tl.load(tokens + row * tokens_b + node * tokens_n, mask=exists, other=-1)
        parent = tl.load(parents + row * parents_b + node * parents_n, mask=exists, other=-1)
        alive = tl.load(valid + row * valid_b + node * valid_n, mask=exists, other=0) != 0
        alive = alive & (node > 0) & exists
        accepted = tl.zeros([nodes], tl.float32)
        child = depth
        while child < n:
            wanted = tl.sum(tl.where(node == child, choice, 0), 0)
            child = tl.min(tl.where(alive & (parent == child) & (token == wanted), node, nodes + n), 0)
            found = child < n
            steps = tl.where(found & (node == depth), child, steps)
            accepted = tl.where(found & (node == child), 1.0, accepted)
            depth += found.to(tl.int32)
        tl.store(accept_prob + row * n + node, accepted, mask=exists)
    # A child stands behind its parent. A last node carried through the loop above comes out wrong in Triton 3.6.
    last = tl.maximum(tl.max(steps, 0), 0)
    tl.store(path + row * n + node, steps.to(tl.int64), mask=exists)
    tl.store(count + row, depth.to(tl.int64))
    tl.store(next_token + row, tl.sum(tl.where(node == last, choice, 0), 0).to(tl.int64))


def verify_greedy(
    logits: Tensor, tokens: Tensor, parents: Tensor, valid: Tensor, *, chain: bool = False
) -> Verification:
    """See `specdec_kernels.ops.verify.verify_greedy`."""
    return _verify(logits, tokens, parents, valid, chain, 1.0, 0, None, None, None, None)


def verify_coupled(
    logits: Tensor,
    tokens: Tensor,
    parents: Tensor,
    valid: Tensor,
    noise: Tensor | None = None,
    *,
    seed: Tensor | None = None,
    position: Tensor | None = None,
    chain: bool = False,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Verification:
    """See `specdec_kernels.ops.verify.verify_coupled`."""
    if noise is None and (seed is None or position is None):
        raise ValueError(f"verify_coupled {NO_NOISE}")
    if temperature == 0:
        # All mass is on one token, which no finite noise moves.
        return verify_greedy(logits, tokens, parents, valid, chain=chain)
    limits = (
        law.limits(law.dense(logits), temperature, top_k, top_p, min_p)
        if law.filters(logits, top_k, top_p, min_p)
        else None
    )
    source = 2 if noise is None else 1
    return _verify(logits, tokens, parents, valid, chain, temperature, source, noise, seed, position, limits)


def verify_match(
    logits: Tensor,
    tokens: Tensor,
    parents: Tensor,
    valid: Tensor,
    accept: Tensor | None = None,
    *,
    seed: Tensor | None = None,
    round: Tensor | None = None,
    chain: bool = False,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Verification:
    """See `specdec_kernels.ops.verify.verify_match`."""
    coins = philox_triton.told("verify_match", accept, accept, seed, round, tokens)
    b, n, v = logits.shape
    logits = law.dense(logits)
    found = law.limits(logits, temperature, top_k, top_p, min_p)
    kind, _ = law.compute_kind(logits.dtype)
    choice = torch.empty((b, n, 1), dtype=torch.int32, device=logits.device)
    block = law.tile(v, widest=1024)
    _sampled[(b * n,)](
        choice, logits, *logits.stride()[:2], n, v, found.parts, triton.cdiv(found.size, block),
        *coins.accept, *coins.source, *found.pointers(),
        made=coins.made, temperature=float(temperature) or 1.0, filtered=found.threshold is not None,
        kind=kind, width=found.width, block=block, even=v % 16 == 0, num_warps=4,
    )  # fmt: skip
    return walk(choice, choice, tokens, parents, valid, chain)


def _verify(
    logits: Tensor,
    tokens: Tensor,
    parents: Tensor,
    valid: Tensor,
    chain: bool,
    temperature: float,
    source: int,
    noise: Tensor | None,
    seed: Tensor | None,
    position: Tensor | None,
    limits: law.Limits | None,
) -> Verification:
    b, n, v = logits.shape
    logits = law.dense(logits)
    block, splits, tiles = law.partition(b * n, v, widest=1024 if source else 4096)
    kind, dtype = law.compute_kind(logits.dtype)
    # Noise is float64, and so are its sums.
    values = torch.empty((b, n, splits), dtype=torch.float64 if source else dtype, device=logits.device)
    indices = torch.empty((b, n, splits), dtype=torch.int32, device=logits.device)
    # Arguments that a variant does not read still have to be pointers.
    given = values if noise is None else noise
    seeds = indices if seed is None else seed.expand(b)
    places = indices if position is None else position
    threshold, cut = (values, indices) if limits is None else (limits.threshold, limits.cut)
    _largest[(b * n, splits)](
        values, indices, logits, logits.stride(0), logits.stride(1), n, v, splits, tiles,
        given, *given.stride(), seeds, seeds.stride(0), places, *places.stride()[:2],
        threshold, cut, temperature=float(temperature), source=source, filtered=limits is not None,
        kind=kind, wide=tl.float64 if source else kind, block=block, num_warps=4,
    )  # fmt: skip
    return walk(values, indices, tokens, parents, valid, chain)


def walk(values: Tensor, indices: Tensor, tokens: Tensor, parents: Tensor, valid: Tensor, chain: bool) -> Verification:
    """Follow the best of each node's parts: `values` and `indices [b n splits]`."""
    b, n, splits = values.shape
    path = torch.empty((b, n), dtype=torch.int64, device=values.device)
    ends = torch.empty((2, b), dtype=torch.int64, device=values.device)
    accept_prob = torch.empty((b, n), dtype=torch.float32, device=values.device)
    _walk[(b,)](
        path, ends[0], ends[1], accept_prob, values, indices, tokens, *tokens.stride(),
        parents, *parents.stride(), valid, *valid.stride(), n, splits,
        chain=chain, nodes=triton.next_power_of_2(n), num_warps=1 if n <= 64 else 4,
    )  # fmt: skip
    return Verification(path, ends[0], ends[1], accept_prob)

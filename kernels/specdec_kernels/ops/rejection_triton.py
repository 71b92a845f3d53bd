"""Rejection rules in Triton: token by token over trees, and blocks of a chain.

Nothing as large as the logits is written. A round of `verify_lossless` is four launches: the parts of every node's
law (`law_triton.limits`); the walk, one program a row, which needs p and q at the drafted tokens only, unless a
sampled sibling is rejected and another follows, when it runs over that one row of p and q for the mass they leave; the
remaining weights of the one node that each row ended at, in parts, where a rejection changed them; and the draw. Each
starts while the one ahead of it ends, where the GPU can. `verify_block` needs the mass of every position, so it reads
all of p and q twice, in six launches.

Numbers: as in `law_triton`, with scalars (masses, ratios, what a coin is compared with) in float64. A decision differs
from the definition's only where its coin lies within a few 2^-23 (float64 logits: 2^-48), relatively, of the value it
is compared with, and a draw only where `uniform * total` is that close, relative to the total, to the edge of a
token. Rows of `draft_probs` are taken to sum to one, as a proposal promises.
"""

from functools import cache
from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec_kernels.ops import law_triton as law
from specdec_kernels.ops import philox_triton
from specdec_kernels.ops.walk import Verification

# Tokens of a part of the law up to which drawing goes through one. Larger ones, which many rows have, are weighed again
# in smaller parts.
_MOST_DRAWN = 8192


@triton.jit
@no_type_check
def pick(vector, index, which):
    """One element of a vector that is spread over the program."""
    return tl.sum(tl.where(index == which, vector, tl.zeros_like(vector)), 0)


@triton.jit
@no_type_check
def remaining(
    p, draft, token, index, siblings, drafted, drawn, masses, draft_masses, n, replacement: tl.constexpr
):  # fmt: skip
    """What rejected siblings leave of the weights `p` of some tokens: before the last of them, after it (neither
    divided by what it sums to), and which tokens drawn siblings have struck from the draft law.

    Sibling j turns f into (f - q_j)+ / masses[j]; q_j is a point, or the draft law without its struck tokens over
    draft_masses[j].
    """
    before, after = p, p
    struck = token < 0
    child = tl.min(tl.where(siblings, index, n), 0)
    while child < n:
        mass = pick(masses, index, child)
        draft_mass = pick(draft_masses, index, child)
        point = token == pick(drafted, index, child)
        law_left = draft
        if not replacement:
            law_left = tl.where(draft_mass > 0, tl.where(struck, 0.0, draft) / draft_mass.to(p.dtype), draft)
        from_law = pick(drawn, index, child) > 0
        q = tl.where(from_law, law_left, tl.where(point, 1.0, 0.0).to(p.dtype))
        before = after
        rest = tl.maximum(before - q, 0.0)
        struck = struck | (point & from_law)
        child = tl.min(tl.where(siblings & (index > child), index, n), 0)
        # Where rounding leaves no mass, the rejection is not followed; the last one is divided by nobody.
        scale = tl.where(mass > 0, mass, 1.0).to(p.dtype)
        follow = tl.where(mass > 0, rest / scale, before)
        after = tl.where(child < n, follow, rest)
    return before, after, struck


@triton.jit(do_not_specialize=["n", "splits"])
@no_type_check
def _walk(
    path, count, accept_prob, node_out, stop_out, scale_out, masses_out, draft_masses_out,
    logits, stride_b, stride_n, tokens, parents, valid, sampled, draft, draft_b, draft_n,
    accept, accept_b, accept_n, seed, seed_b, round, round_b, maxima, totals, threshold, cut, n, v, splits, tiny,
    made: tl.constexpr, replacement: tl.constexpr, drafts: tl.constexpr, temperature: tl.constexpr,
    filtered: tl.constexpr, kind: tl.constexpr, nodes: tl.constexpr, width: tl.constexpr, block: tl.constexpr,
    early: tl.constexpr = False,
):  # fmt: skip
    law.follow(early)
    row = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, nodes)
    exists = index < n
    own = row * n + index
    lanes = tl.arange(0, block)
    drafted = tl.load(tokens + own, mask=exists, other=0).to(tl.int32)
    parent = tl.load(parents + own, mask=exists, other=-1).to(tl.int32)
    alive = (tl.load(valid + own, mask=exists, other=0) != 0) & (index > 0) & exists
    parent = tl.where(alive, parent, -1)
    drawn = tl.zeros([nodes], tl.int32)
    coin = philox_triton.coins(
        index, exists, row, accept, accept_b, accept_n, seed, seed_b, round, round_b, philox_triton.ACCEPTING, made
    )

    # p and q of every draft under its parent's law.
    above = tl.where(alive, parent, 0)
    top, total = law.joined(maxima, totals, row * n + above, alive, splits, width)
    place = logits + row * stride_b + above.to(tl.int64) * stride_n + drafted
    value = law.scaled(tl.load(place, mask=alive, other=0.0).to(kind), temperature, filtered)
    p = tl.exp(value - law.finite(top)).to(tl.float64) / total
    if filtered:
        line = row * n + above
        limit, last_kept = tl.load(threshold + line, mask=alive, other=0), tl.load(cut + line, mask=alive, other=0)
        p = tl.where(law.keeps(value, drafted, limit, last_kept), p, 0.0)
    q = tl.zeros([nodes], tl.float64)
    if drafts:
        drawn = tl.where(alive, tl.load(sampled + own, mask=exists, other=0).to(tl.int32), 0)
        place = draft + row * draft_b + above.to(tl.int64) * draft_n + drafted
        # Of points as well: what their siblings were drawn from takes its mass from their tokens, too.
        q = tl.load(place, mask=alive, other=0.0).to(kind).to(tl.float64)

    node = tl.program_id(0) * 0
    stop, depth = node, node
    draft_mass = tl.full([], 1.0, tl.float64)
    struck = tl.zeros([nodes], tl.int32)
    masses = tl.full([nodes], 1.0, tl.float64)
    draft_masses = tl.full([nodes], 1.0, tl.float64)
    probability = tl.zeros([nodes], tl.float64)
    steps = tl.full([nodes], -1, tl.int32)
    child = tl.min(tl.where(parent == node, index, n), 0)
    while child < n:
        current = index == child
        from_law = pick(drawn, index, child) > 0
        p_token = pick(p, index, child)
        q_token = pick(q, index, child)
        if not replacement:
            left = tl.where(pick(struck, index, child) > 0, 0.0, q_token) / tl.where(draft_mass > 0, draft_mass, 1.0)
            q_token = tl.where(draft_mass > 0, left, q_token)
        q_token = tl.where(from_law, q_token, 1.0)
        # As integers: a scalar truth about floats cannot be combined with vectors under the interpreter.
        taken = tl.where(pick(coin, index, child) * q_token < p_token, 1, 0) > 0
        ratio = tl.minimum(p_token / tl.maximum(q_token, tiny), 1.0)
        probability = tl.where(current, ratio, probability)
        draft_masses = tl.where(current, draft_mass, draft_masses)

        later = tl.min(tl.where((parent == node) & (index > child), index, n), 0)
        again = (later < n) & (taken == 0)
        mass = 1.0 - p_token
        next_draft_mass = draft_mass
        if drafts:  # noqa: SIM102 (decided when the kernel is compiled, the other when it runs)
            if again & from_law:
                # A following sibling needs to know what this rejection leaves.
                this = row * n + node
                row_top, row_total = law.joined_row(maxima, totals, this, splits, width)
                here = logits + row * stride_b + node.to(tl.int64) * stride_n
                law_row = draft + row * draft_b + node.to(tl.int64) * draft_n
                mass = tl.full([], 0.0, tl.float64)
                next_draft_mass = tl.full([], 0.0, tl.float64)
                for begin in range(0, v, block):
                    token = begin + lanes
                    mask = token < v
                    weight = (1.0 / row_total).to(kind) * law.weights(
                        here, token, mask, row_top, threshold + this, cut + this, temperature, filtered, kind
                    )
                    law_tile = tl.load(law_row + token, mask=mask, other=0.0).to(kind)
                    siblings = (parent == node) & (index <= child)
                    _, rest, gone = remaining(
                        weight, law_tile, token, index, siblings, drafted, drawn, masses, draft_masses, n, replacement
                    )
                    mass += tl.sum(rest.to(tl.float64), 0)
                    next_draft_mass += tl.sum(tl.where(gone, 0.0, law_tile).to(tl.float64), 0)
        mass = tl.maximum(mass, 0.0)
        divides = tl.where(mass > 0, 1, 0) > 0
        masses = tl.where(current & again, mass, masses)
        drafted_here = pick(drafted, index, child)
        same = drafted == drafted_here
        minus = tl.where(same, 1.0, 0.0).to(tl.float64)
        if drafts:
            law_left = q
            if not replacement:
                unstruck = tl.where(struck > 0, 0.0, q) / tl.where(draft_mass > 0, draft_mass, 1.0)
                law_left = tl.where(draft_mass > 0, unstruck, q)
            minus = tl.where(from_law, law_left, minus)
        rest = tl.maximum(p - minus, 0.0) / tl.where(divides, mass, 1.0)
        siblings = (parent == node) & (index > child)
        p = tl.where(siblings & again & divides, rest, p)
        struck = tl.where(siblings & again & from_law & same, 1, struck)

        steps = tl.where(taken & (index == depth), child, steps)
        depth += taken.to(tl.int32)
        node = tl.where(taken, child, node)
        stop = tl.where(taken, 0, child)
        draft_mass = tl.where(taken, 1.0, next_draft_mass)
        child = tl.min(tl.where((parent == node) & (index > child), index, n), 0)

    tl.store(path + own, steps.to(tl.int64), mask=exists)
    tl.store(count + row, depth.to(tl.int64))
    tl.store(accept_prob + own, probability.to(kind), mask=exists)
    tl.store(node_out + row, node)
    tl.store(stop_out + row, stop)
    tl.store(scale_out + row, tl.full([], 1.0, tl.float64))
    tl.store(masses_out + own, masses, mask=exists)
    tl.store(draft_masses_out + own, draft_masses, mask=exists)


@triton.jit
@no_type_check
def rejected(
    row, node, stop, tokens, parents, valid, sampled, masses_in, draft_masses_in, n,
    drafts: tl.constexpr, nodes: tl.constexpr,
):  # fmt: skip
    """Of a row that ended at `node`, which nodes are siblings that were rejected there, up to `stop`; and of all nodes
    the tokens, whether they were drawn from the draft law, and what their rejections left of both laws."""
    index = tl.arange(0, nodes)
    own = row * n + index
    exists = index < n
    siblings = (tl.load(valid + own, mask=exists, other=0) != 0) & (index > 0) & (index <= stop)
    siblings = siblings & (tl.load(parents + own, mask=exists, other=-1).to(tl.int32) == node)
    drafted = tl.load(tokens + own, mask=exists, other=0).to(tl.int32)
    drawn = tl.zeros([nodes], tl.int32)
    if drafts:
        drawn = tl.load(sampled + own, mask=exists, other=0).to(tl.int32)
    masses = tl.load(masses_in + own, mask=exists, other=1.0)
    draft_masses = tl.load(draft_masses_in + own, mask=exists, other=1.0)
    return siblings, drafted, drawn, masses, draft_masses


@triton.jit
@no_type_check
def last_weights(
    row, token, mask, node, stop, scale, index, siblings, drafted, drawn, masses, draft_masses, top, total,
    logits, stride_b, stride_n, draft, draft_b, draft_n, threshold, cut, n,
    replacement: tl.constexpr, drafts: tl.constexpr, temperature: tl.constexpr, filtered: tl.constexpr,
    kind: tl.constexpr,
):  # fmt: skip
    """Weights of some tokens at the node a row ended at, before and after the last rejection there."""
    line = row * n + node
    here = logits + row * stride_b + node.to(tl.int64) * stride_n
    # One division a row: by 0 it makes the same of a broken row as a division of every weight.
    p = law.weights(here, token, mask, top, threshold + line, cut + line, temperature, filtered, kind)
    p = p * (1.0 / total).to(kind) * scale.to(kind)
    law_tile = tl.zeros_like(p)
    if drafts:
        place = draft + row * draft_b + node.to(tl.int64) * draft_n + token
        law_tile = tl.load(place, mask=mask & (stop > 0), other=0.0).to(kind)
    before, after, _ = remaining(
        p, law_tile, token, index, siblings, drafted, drawn, masses, draft_masses, n, replacement
    )
    return before.to(tl.float64), after.to(tl.float64)


@triton.jit(do_not_specialize=["n", "splits", "parts", "tiles"])
@no_type_check
def _remains(
    before_out, after_out, node_in, stop_in, scale_in, masses_in, draft_masses_in,
    logits, stride_b, stride_n, tokens, parents, valid, sampled, draft, draft_b, draft_n,
    maxima, totals, threshold, cut, n, v, splits, parts, tiles,
    replacement: tl.constexpr, drafts: tl.constexpr, temperature: tl.constexpr, filtered: tl.constexpr,
    kind: tl.constexpr, nodes: tl.constexpr, width: tl.constexpr, block: tl.constexpr, known: tl.constexpr,
    early: tl.constexpr = False,
):  # fmt: skip
    """What one of `parts` parts of each row's last law weighs, before and after the last rejection.

    `known`: without a rejection, what the parts of `limits` weigh says it already.
    """
    law.follow(early)
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    index = tl.arange(0, nodes)
    node, stop, scale = tl.load(node_in + row), tl.load(stop_in + row), tl.load(scale_in + row)
    if (not known) | (stop > 0):
        siblings, drafted, drawn, masses, draft_masses = rejected(
            row, node, stop, tokens, parents, valid, sampled, masses_in, draft_masses_in, n, drafts, nodes
        )
        top, total = law.joined_row(maxima, totals, row * n + node, splits, width)
        before_sum = tl.zeros([block], tl.float64)
        after_sum = tl.zeros([block], tl.float64)
        for tile in range(tiles):
            token = (part * tiles + tile) * block + tl.arange(0, block)
            before, after = last_weights(
                row, token, token < v, node, stop, scale, index, siblings, drafted, drawn, masses, draft_masses,
                top, total, logits, stride_b, stride_n, draft, draft_b, draft_n, threshold, cut, n,
                replacement, drafts, temperature, filtered, kind,
            )  # fmt: skip
            before_sum += before
            after_sum += after
        tl.store(before_out + row * parts + part, tl.sum(before_sum, 0))
        tl.store(after_out + row * parts + part, tl.sum(after_sum, 0))


@triton.jit(do_not_specialize=["n", "splits", "parts", "tiles", "law_tiles"])
@no_type_check
def _draw(
    next_token, given, given_b, given_n, seed, seed_b, round, round_b,
    before_in, after_in, node_in, stop_in, scale_in, masses_in, draft_masses_in,
    logits, stride_b, stride_n, tokens, parents, valid, sampled, draft, draft_b, draft_n,
    maxima, totals, threshold, cut, n, v, splits, parts, tiles, law_tiles,
    replacement: tl.constexpr, drafts: tl.constexpr, temperature: tl.constexpr, filtered: tl.constexpr,
    kind: tl.constexpr, nodes: tl.constexpr, width: tl.constexpr, block: tl.constexpr, sums_width: tl.constexpr,
    made: tl.constexpr, known: tl.constexpr, unit: tl.constexpr, early: tl.constexpr = False,
):  # fmt: skip
    """Invert the distribution function of each row's last law: find the part, then the token in it.

    Parts are `tiles` times `unit` tokens, or `law_tiles` where `limits` made them; `block` tokens are seen at a time.
    """
    law.follow(early)
    row = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, nodes)
    node, stop, scale = tl.load(node_in + row), tl.load(stop_in + row), tl.load(scale_in + row)
    siblings, drafted, drawn, masses, draft_masses = rejected(
        row, node, stop, tokens, parents, valid, sampled, masses_in, draft_masses_in, n, drafts, nodes
    )
    told, top, total = law.parts_of(maxima, totals, row * n + node, splits, width)

    root = tl.program_id(0) * 0
    uniform = philox_triton.coins(
        root, root == 0, row, given, given_b, given_n, seed, seed_b, round, round_b, philox_triton.DRAWING, made
    )
    fallback = root != 0
    if (not known) | (stop > 0):
        which = tl.arange(0, sums_width)
        before_sums = tl.load(before_in + row * parts + which, mask=which < parts, other=0.0)
        after_sums = tl.load(after_in + row * parts + which, mask=which < parts, other=0.0)
        # Where the last rejection leaves nothing it was a matter of rounding, and the law before it is used.
        fallback = (tl.sum(after_sums, 0) > 0).to(tl.int32) == 0
        sums = tl.where(fallback, before_sums, after_sums)
        goal = uniform * tl.sum(sums, 0)
        part, base = law.part_of(sums, which, parts, goal)
    else:
        goal = uniform
        part, base = law.part_of(told / total, tl.arange(0, width), splits, goal)
        tiles = law_tiles

    found = tl.program_id(0) * 0 + 0x7FFFFFFF
    last = tl.program_id(0) * 0
    tile = part * tiles
    end = tile + tiles
    while tile < end:
        # Masked by what the compiler knows to be aligned, so that a thread's tokens are read together.
        token = tile * unit + tl.arange(0, block)
        before, after = last_weights(
            row, token, token < v, node, stop, scale, index, siblings, drafted, drawn, masses, draft_masses,
            top, total, logits, stride_b, stride_n, draft, draft_b, draft_n, threshold, cut, n,
            replacement, drafts, temperature, filtered, kind,
        )  # fmt: skip
        weight = tl.where(token < end * unit, tl.where(fallback, before, after), 0.0)
        found, here, base = law.token_of(weight, token, base, goal)
        last = tl.maximum(last, here)
        tile = tl.where(found < 0x7FFFFFFF, end, tile + block // unit)
    tl.store(next_token + row, tl.where(found < 0x7FFFFFFF, found, last).to(tl.int64))


@triton.jit(do_not_specialize=["n", "splits"])
@no_type_check
def _ratios(
    ratios, logits, stride_b, stride_n, tokens, valid, sampled, draft, draft_b, draft_n,
    maxima, totals, threshold, cut, n, splits, tiny,
    drafts: tl.constexpr, temperature: tl.constexpr, filtered: tl.constexpr, kind: tl.constexpr,
    width: tl.constexpr, nodes: tl.constexpr,
):  # fmt: skip
    """r_i = min(1, r_{i-1} p_i(x_i) / q_i(x_i)) along each chain."""
    row = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, nodes)
    exists = index < n
    alive = exists & (index > 0)
    own = row * n + index
    above = tl.where(alive, index - 1, 0)
    drafted = tl.load(tokens + own, mask=exists, other=0).to(tl.int32)
    top, total = law.joined(maxima, totals, row * n + above, alive, splits, width)
    place = logits + row * stride_b + above.to(tl.int64) * stride_n + drafted
    value = law.scaled(tl.load(place, mask=alive, other=0.0).to(kind), temperature, filtered)
    p = tl.exp(value - law.finite(top)).to(tl.float64) / total
    if filtered:
        line = row * n + above
        limit, last_kept = tl.load(threshold + line, mask=alive, other=0), tl.load(cut + line, mask=alive, other=0)
        p = tl.where(law.keeps(value, drafted, limit, last_kept), p, 0.0)
    step = p
    if drafts:
        drawn = alive & (tl.load(sampled + own, mask=exists, other=0) != 0)
        place = draft + row * draft_b + above.to(tl.int64) * draft_n + drafted
        q = tl.load(place, mask=drawn, other=1.0).to(kind).to(tl.float64)
        step = p / tl.maximum(q, tiny)
    made = tl.full([nodes], 1.0, tl.float64)
    ratio = tl.full([], 1.0, tl.float64)
    for i in range(1, n):
        ratio = tl.minimum(ratio * pick(step, index, i), 1.0)
        made = tl.where(index == i, ratio, made)
    tl.store(ratios + own, made, mask=exists)


@triton.jit(do_not_specialize=["n", "splits", "parts", "tiles"])
@no_type_check
def _excesses(
    sums, ratios, logits, stride_b, stride_n, tokens, sampled, draft, draft_b, draft_n,
    maxima, totals, threshold, cut, n, v, splits, parts, tiles,
    drafts: tl.constexpr, temperature: tl.constexpr, filtered: tl.constexpr, kind: tl.constexpr,
    width: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Z_i = sum (r_i p_{i+1} - q_{i+1})+ of every position but the last, in parts."""
    line, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, node = line // n, line % n
    following = tl.minimum(node + 1, n - 1)
    ratio = tl.load(ratios + line).to(kind)
    drafted = tl.load(tokens + row * n + following).to(tl.int32)
    top, total = law.joined_row(maxima, totals, line, splits, width)
    here = logits + row * stride_b + node * stride_n
    mass = tl.zeros([block], tl.float64)
    for tile in range(tiles):
        token = (part * tiles + tile) * block + tl.arange(0, block)
        mask = token < v
        p = law.weights(here, token, mask, top, threshold + line, cut + line, temperature, filtered, kind)
        p = p * (1.0 / total).to(kind)
        q = tl.where(token == drafted, 1.0, 0.0).to(kind)
        if drafts:
            drawn = tl.load(sampled + row * n + following) != 0
            place = draft + row * draft_b + node * draft_n + token
            q = tl.where(drawn, tl.load(place, mask=mask & drawn, other=0.0).to(kind), q)
        mass += tl.maximum(ratio * p - q, 0.0).to(tl.float64)
    tl.store(sums + line * parts + part, tl.sum(mass, 0))


@triton.jit(do_not_specialize=["n", "parts"])
@no_type_check
def _decide(
    path, count, accept_prob, node_out, stop_out, scale_out, masses_out, draft_masses_out, ratios, sums, valid,
    accept, accept_b, accept_n, seed, seed_b, round, round_b, n, parts, tiny,
    made: tl.constexpr, kind: tl.constexpr, nodes: tl.constexpr,
):  # fmt: skip
    """Every position's coin; the last success ends the block."""
    row = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, nodes)
    exists = index < n
    own = row * n + index
    alive = exists & (tl.load(valid + own, mask=exists, other=0) != 0)
    ratio = tl.load(ratios + own, mask=exists, other=1.0)
    coin = philox_triton.coins(
        index, exists, row, accept, accept_b, accept_n, seed, seed_b, round, round_b, philox_triton.ACCEPTING, made
    )
    mass = tl.zeros([nodes], tl.float64)
    for part in range(0, parts):
        mass += tl.load(sums + own * parts + part, mask=exists, other=0.0)
    gamma = tl.sum(alive.to(tl.int32), 0) - 1
    rest = mass + (1.0 - ratio)
    share = tl.where(rest > 0, mass / tl.maximum(rest, tiny), 1.0)
    h = tl.where((index == gamma) | (index == n - 1), ratio, share)
    taken = alive & ((coin < h) | (index == 0))
    last = tl.max(tl.where(taken, index, 0), 0)
    tl.store(path + own, tl.where(index < last, index + 1, -1).to(tl.int64), mask=exists)
    tl.store(count + row, last.to(tl.int64))
    tl.store(accept_prob + own, tl.where(alive & (index > 0), h, 0.0).to(kind), mask=exists)
    tl.store(node_out + row, last)
    tl.store(stop_out + row, tl.where(last < gamma, last + 1, 0))
    tl.store(scale_out + row, tl.where(last < gamma, pick(ratio, index, last), 1.0))
    # One rejection at most stands at the end of a block, and nothing is divided by its mass.
    tl.store(masses_out + own, tl.full([nodes], 1.0, tl.float64), mask=exists)
    tl.store(draft_masses_out + own, tl.full([nodes], 1.0, tl.float64), mask=exists)


def verify_lossless(
    logits: Tensor,
    tokens: Tensor,
    parents: Tensor,
    valid: Tensor,
    sampled: Tensor,
    draft_probs: Tensor | None,
    accept: Tensor | None = None,
    token: Tensor | None = None,
    *,
    seed: Tensor | None = None,
    round: Tensor | None = None,
    replacement: bool = True,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Verification:
    """See `specdec_kernels.ops.verify.verify_lossless`."""
    coins = philox_triton.told("verify_lossless", accept, token, seed, round, tokens)
    b, n, v = logits.shape
    logits = law.dense(logits)
    found = law.limits(logits, temperature, top_k, top_p, min_p)
    kind, dtype = law.compute_kind(logits.dtype)
    end = _End(b, n, dtype, logits.device)
    tree = (tokens.contiguous(), parents.contiguous(), valid.contiguous(), sampled.contiguous())
    draft = logits if draft_probs is None else law.dense(draft_probs)
    options = {
        "replacement": bool(replacement),
        "drafts": draft_probs is not None,
        "temperature": float(temperature) or 1.0,
        "filtered": found.threshold is not None,
        "kind": kind,
        "width": found.width,
        "nodes": triton.next_power_of_2(n),
    }
    _walk[(b,)](
        *end.verdict(), *end.ends(), *end.chain(),
        logits, *logits.stride()[:2], *tree, draft, *draft.stride()[:2], *coins.accept, *coins.source,
        *found.pointers(), n, v, found.parts, torch.finfo(dtype).tiny,
        made=coins.made, **options, block=law.tile(v, widest=4096), num_warps=8, **law.early(logits.device),
    )  # fmt: skip
    return end.draw(logits, tree, draft, coins, found, options)


def verify_block(
    logits: Tensor,
    tokens: Tensor,
    valid: Tensor,
    sampled: Tensor,
    draft_probs: Tensor | None,
    accept: Tensor | None = None,
    token: Tensor | None = None,
    *,
    seed: Tensor | None = None,
    round: Tensor | None = None,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Verification:
    """See `specdec_kernels.ops.verify.verify_block`."""
    coins = philox_triton.told("verify_block", accept, token, seed, round, tokens)
    b, n, v = logits.shape
    device = logits.device
    logits = law.dense(logits)
    found = law.limits(logits, temperature, top_k, top_p, min_p)
    kind, dtype = law.compute_kind(logits.dtype)
    end = _End(b, n, dtype, device)
    tokens, valid, sampled = tokens.contiguous(), valid.contiguous(), sampled.contiguous()
    parents = _chains(b, n, device)
    draft = logits if draft_probs is None else law.dense(draft_probs)
    laws = {
        "drafts": draft_probs is not None,
        "temperature": float(temperature) or 1.0,
        "filtered": found.threshold is not None,
        "kind": kind,
        "width": found.width,
    }
    nodes, splits, tiny = triton.next_power_of_2(n), found.parts, torch.finfo(dtype).tiny
    ratios = torch.empty((b, n), dtype=torch.float64, device=device)
    _ratios[(b,)](
        ratios, logits, *logits.stride()[:2], tokens, valid, sampled, draft, *draft.stride()[:2],
        *found.pointers(), n, splits, tiny, **laws, nodes=nodes,
        num_warps=1 if nodes * found.width <= 512 else 4,
    )  # fmt: skip
    block, parts, tiles = law.partition(b * n, v, widest=1024)
    sums = torch.empty((b, n, parts), dtype=torch.float64, device=device)
    _excesses[(b * n, parts)](
        sums, ratios, logits, *logits.stride()[:2], tokens, sampled, draft, *draft.stride()[:2],
        *found.pointers(), n, v, splits, parts, tiles, **laws, block=block, num_warps=4,
    )  # fmt: skip
    _decide[(b,)](
        *end.verdict(), *end.ends(), *end.chain(), ratios, sums, valid, *coins.accept, *coins.source, n, parts, tiny,
        made=coins.made, kind=kind, nodes=nodes, num_warps=1 if n <= 64 else 4,
    )  # fmt: skip
    options = {**laws, "replacement": True, "nodes": nodes}
    return end.draw(logits, (tokens, parents, valid, sampled), draft, coins, found, options)


@cache
def _chains(b: int, n: int, device: torch.device) -> Tensor:
    """Parents of chains. Made once and only read, as `arrays.iota` is."""
    with torch.inference_mode(False):
        return torch.arange(-1, n - 1, device=device).repeat(b, 1)


class _End:
    """Where each row's walk ended, as the draw needs it, and the verification that both fill in."""

    def __init__(self, b: int, n: int, dtype: torch.dtype, device: torch.device) -> None:
        self.path = torch.empty((b, n), dtype=torch.int64, device=device)
        self.integers = torch.empty((2, b), dtype=torch.int64, device=device)
        self.accept_prob = torch.empty((b, n), dtype=dtype, device=device)
        self.places = torch.empty((2, b), dtype=torch.int32, device=device)
        self.scale = torch.empty((b,), dtype=torch.float64, device=device)
        self.masses = torch.empty((2, b, n), dtype=torch.float64, device=device)

    def verdict(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.path, self.integers[0], self.accept_prob

    def ends(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.places[0], self.places[1], self.scale

    def chain(self) -> tuple[Tensor, Tensor]:
        return self.masses[0], self.masses[1]

    def draw(
        self,
        logits: Tensor,
        tree: tuple[Tensor, ...],
        draft: Tensor,
        coins: philox_triton.Coins,
        found: law.Limits,
        options: dict[str, object],
    ) -> Verification:
        """Draw each row's next token from what the walk left."""
        b, _, v = logits.shape
        n = logits.shape[1]
        block, parts, tiles = law.partition(b, v, widest=1024, most=4, splits=256)
        sums = torch.empty((2, b, parts), dtype=torch.float64, device=logits.device)
        common = (
            *self.ends(), *self.chain(), logits, *logits.stride()[:2], *tree, draft, *draft.stride()[:2],
            *found.pointers(), n, v, found.parts, parts,
        )  # fmt: skip
        # A filtered law has one part.
        known, early = found.threshold is None and found.size <= _MOST_DRAWN, law.early(logits.device)
        _remains[(b, parts)](
            sums[0], sums[1], *common, tiles, **options, block=block, known=known, num_warps=4, **early
        )  # fmt: skip
        # Drawing goes through one part, whose tokens a thread holds one next to the other where rows are aligned. Where
        # they are not, adding them up costs so much each time that it does so in few, large steps.
        law_tiles = triton.cdiv(found.size, block)
        most = block * max(tiles, law_tiles if known else 0)
        step = law.tile(most, widest=1024 if v % 16 == 0 else 4096)
        _draw[(b,)](
            self.integers[1], *coins.token, *coins.source, sums[0], sums[1], *common, tiles, law_tiles,
            **options, block=step, sums_width=triton.next_power_of_2(parts), made=coins.made, known=known, unit=block,
            num_warps=4 if step <= 1024 else 8, **early,
        )  # fmt: skip
        return Verification(self.path, self.integers[0], self.integers[1], self.accept_prob)

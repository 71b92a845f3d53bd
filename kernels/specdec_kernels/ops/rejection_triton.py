"""Rejection rules in Triton: token by token over trees, and blocks of a chain.

Nothing as large as the logits is written. A round of `verify_lossless` is two launches: the parts of every node's law
(`law_triton.limits`), and `_settle_tree`, in which several programs share a row. Each of them walks the row's tree,
which needs p and q at the drafted tokens only, unless a sampled sibling is rejected and another follows: then they run
over that one row of p and q together for the mass it leaves. Where a rejection changed the law that the row ended at,
they weigh what remains of it, each a few parts, and the one with the part that the draw falls into draws from it.
`verify_block` needs the mass of every position, so it reads all of p and q twice, in four launches.

Numbers: as in `law_triton`, with scalars (masses, ratios, what a coin is compared with) in float64. A decision differs
from the definition's only where its coin lies within a few 2^-23 (float64 logits: 2^-48), relatively, of the value it
is compared with, and a draw only where `uniform * total` is that close, relative to the total, to the edge of a
token. Rows of `draft_probs` are taken to sum to one, as a proposal promises.
"""

from typing import Any, NamedTuple, no_type_check

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
# Tokens that a program takes at a time, at most.
_WIDEST = 4096
# Programs that share a row, at most: what they tell each other is added up within a warp.
_MOST_PROGRAMS = tl.constexpr(32)
# What parts are a multiple of, in tokens, so that a thread's tokens are read together.
_UNIT = tl.constexpr(128)


@triton.jit
@no_type_check
def pick(vector, index, which):
    """One element of a vector that is spread over the program."""
    return tl.sum(tl.where(index == which, vector, tl.zeros_like(vector)), 0)


@triton.jit
@no_type_check
def probability(
    value, token, line, there, maxima, totals, threshold, cut, splits, filtered: tl.constexpr, width: tl.constexpr
):  # fmt: skip
    """What tokens with these scaled logits have under the laws of their lines."""
    top, total = law.joined(maxima, totals, line, there, splits, width)
    p = tl.exp(value - law.finite(top)).to(tl.float64) / total
    if filtered:
        limit, last_kept = tl.load(threshold + line, mask=there, other=0), tl.load(cut + line, mask=there, other=0)
        p = tl.where(law.keeps(value, token, limit, last_kept), p, 0.0)
    return p


@triton.jit
@no_type_check
def reject(rejections, count, token, from_law, draft_mass):
    """Write down the rejection of a sibling, as `remaining` reads it; what it leaves is written when it is known."""
    here = rejections + 4 * count
    tl.store(here, token.to(tl.float64))
    tl.store(here + 1, from_law.to(tl.float64))
    tl.store(here + 2, draft_mass)


@triton.jit
@no_type_check
def remaining(p, draft, token, rejections, count, replacement: tl.constexpr):
    """What `count` rejected siblings leave of the weights `p` of some tokens: before the last of them, after it
    (neither divided by what it sums to), and which tokens drawn siblings have struck from the draft law.

    Sibling j turns f into (f - q_j)+ / mass; q_j is a point, or the draft law without its struck tokens over its mass.
    """
    before, after = p, p
    struck = token < 0
    for i in range(count):
        here = rejections + 4 * i
        point = token == tl.load(here).to(tl.int32)
        from_law = tl.load(here + 1).to(tl.int32) > 0
        draft_mass, mass = tl.load(here + 2), tl.load(here + 3)
        law_left = draft
        if not replacement:
            law_left = tl.where(draft_mass > 0, tl.where(struck, 0.0, draft) / draft_mass.to(p.dtype), draft)
        q = tl.where(from_law, law_left, tl.where(point, 1.0, 0.0).to(p.dtype))
        before = after
        rest = tl.maximum(before - q, 0.0)
        struck = struck | (point & from_law)
        # Where rounding leaves no mass, the rejection is not followed; the last one is divided by nobody.
        scale = tl.where(mass > 0, mass, 1.0).to(p.dtype)
        follow = tl.where(mass > 0, rest / scale, before)
        after = tl.where(i + 1 < count, follow, rest)
    return before, after, struck


@triton.jit
@no_type_check
def bits(number):
    """The bits of a number, never those of -1, which say that nothing was told yet."""
    made = number.to(tl.int64, bitcast=True)
    return tl.where(made == -1, 0x7FF8000000000000, made)


@triton.jit
@no_type_check
def exchanged(first, second, slots, row, meeting, n, program, programs):
    """Two numbers of each of a row's programs, as two vectors of `_MOST_PROGRAMS`; `meeting` is below `n`.

    What is told is its own flag, in slots that the launch ahead has filled with -1, so that one way through the cache
    is all that it takes.
    """
    which = tl.arange(0, _MOST_PROGRAMS)
    firsts = tl.where(which == program, first, 0.0)
    seconds = tl.where(which == program, second, 0.0)
    if programs > 1:
        here = slots + (row * n + meeting) * programs * 2
        tl.atomic_xchg(here + program, bits(first), sem="relaxed")
        tl.atomic_xchg(here + programs + program, bits(second), sem="relaxed")
        there = which < programs
        one = tl.load(here + which, mask=there, other=0, volatile=True)
        two = tl.load(here + programs + which, mask=there, other=0, volatile=True)
        while tl.max(((one == -1) | (two == -1)).to(tl.int32), 0) > 0:
            one = tl.load(here + which, mask=there, other=0, volatile=True)
            two = tl.load(here + programs + which, mask=there, other=0, volatile=True)
        firsts, seconds = one.to(tl.float64, bitcast=True), two.to(tl.float64, bitcast=True)
    return firsts, seconds


@triton.jit
@no_type_check
def read(here, law_row, part, end, v, wanted, drafts: tl.constexpr, block: tl.constexpr):
    """Logits of the tokens of a part before `end`, and their draft law if it is wanted."""
    # Masked by what the compiler knows to be aligned, so that a thread's tokens are read together.
    token = part * block + tl.arange(0, block)
    there = (token < v) & (part < end)
    value = tl.load(here + token, mask=there, other=float("-inf"))
    tile = tl.zeros([block], tl.float32)
    if drafts:
        tile = tl.load(law_row + token, mask=there & wanted, other=0.0)
    return value, tile


@triton.jit
@no_type_check
def masses_left(
    here, law_row, top, total, threshold, cut, rejections, count, part, end, v,
    replacement: tl.constexpr, temperature: tl.constexpr, filtered: tl.constexpr, kind: tl.constexpr,
    block: tl.constexpr, several: tl.constexpr,
):  # fmt: skip
    """What `count` rejected siblings leave of the law and of the draft law over the parts up to `end`.

    `several`: whether there may be more than one.
    """
    # What was written down about rejections is there for all threads.
    tl.debug_barrier()
    rests, draft_rests = tl.zeros([block], tl.float64), tl.zeros([block], tl.float64)
    if not several:
        # What it is anyway, so that the compiler sees that it need not loop.
        end = part + 1
    value, tile = read(here, law_row, part, end, v, True, True, block)
    while part < end:
        # Asked for before what is there is used.
        if several:
            next_value, next_tile = read(here, law_row, part + 1, end, v, True, True, block)
        token = part * block + tl.arange(0, block)
        weight = law.weighed(value, token, token < v, top, threshold, cut, temperature, filtered, kind)
        weight *= (1.0 / total).to(kind)
        _, rest, gone = remaining(weight, tile.to(kind), token, rejections, count, replacement)
        rests += rest.to(tl.float64)
        draft_rests += tl.where(gone, 0.0, tile).to(tl.float64)
        if several:
            value, tile = next_value, next_tile
        part += 1
    return tl.sum(rests, 0), tl.sum(draft_rests, 0)


@triton.jit
@no_type_check
def last_weights(
    value, tile, token, mask, line, scale, rejections, count, top, total, threshold, cut,
    replacement: tl.constexpr, temperature: tl.constexpr, filtered: tl.constexpr, kind: tl.constexpr,
):  # fmt: skip
    """Weights of some tokens at the node a row ended at, before and after the last rejection there."""
    # One division a row: by 0 it makes the same of a broken row as a division of every weight.
    p = law.weighed(value, token, mask, top, threshold + line, cut + line, temperature, filtered, kind)
    p = p * (1.0 / total).to(kind) * scale.to(kind)
    before, after, _ = remaining(p, tile.to(kind), token, rejections, count, replacement)
    return before.to(tl.float64), after.to(tl.float64)


@triton.jit
@no_type_check
def draw(
    next_token, given, given_b, given_n, seed, seed_b, round, round_b, sums, slots, meeting, program, programs,
    row, node, scale, rejections, count,
    logits, stride_b, stride_n, draft, draft_b, draft_n, maxima, totals, threshold, cut, n, v, splits, parts, each,
    law_units, replacement: tl.constexpr, drafts: tl.constexpr, temperature: tl.constexpr, filtered: tl.constexpr,
    kind: tl.constexpr, width: tl.constexpr, block: tl.constexpr, sums_width: tl.constexpr, even: tl.constexpr,
    made: tl.constexpr, known: tl.constexpr,
):  # fmt: skip
    """Draw the next token of a row that ended at `node`, where it rejected `count` children, by inverting the
    distribution function: find the program, its part, and the token in that.

    A part is `block` tokens; or `law_units` times `_UNIT` where nothing was rejected and what the parts of `limits`
    weigh is `known`. `scale` is what p is multiplied with before anything is taken from it.
    """
    line = row * n + node
    here = logits + row * stride_b + node.to(tl.int64) * stride_n
    law_row = draft + row * draft_b + node.to(tl.int64) * draft_n
    told, top, total = law.parts_of(maxima, totals, line, splits, width)
    root = tl.program_id(0) * 0
    uniform = philox_triton.coins(
        root, root == 0, row, given, given_b, given_n, seed, seed_b, round, round_b, philox_triton.DRAWING, made
    )
    fallback = root != 0
    drawer = root
    # As in `masses_left`.
    tl.debug_barrier()
    if (not known) | (count > 0):
        before_sums, after_sums = sums + row * parts * 2, sums + row * parts * 2 + parts
        first = program * each
        end = tl.minimum(first + each, parts)
        if sums_width == 1:
            # As in `masses_left`.
            end = first + 1
        before_all, after_all = tl.full([], 0.0, tl.float64), tl.full([], 0.0, tl.float64)
        value, tile = read(here, law_row, first, end, v, count > 0, drafts, block)
        for part in range(first, end):
            if sums_width > 1:
                next_value, next_tile = read(here, law_row, part + 1, end, v, count > 0, drafts, block)
            token = part * block + tl.arange(0, block)
            before, after = last_weights(
                value, tile, token, token < v, line, scale, rejections, count, top, total, threshold, cut,
                replacement, temperature, filtered, kind,
            )  # fmt: skip
            before_sum, after_sum = tl.sum(before, 0), tl.sum(after, 0)
            tl.store(before_sums + part, before_sum)
            tl.store(after_sums + part, after_sum)
            before_all += before_sum
            after_all += after_sum
            if sums_width > 1:
                value, tile = next_value, next_tile
        befores, afters = exchanged(before_all, after_all, slots, row, meeting, n, program, programs)
        # Where the last rejection leaves nothing it was a matter of rounding, and the law before it is used.
        fallback = (tl.sum(afters, 0) > 0).to(tl.int32) == 0
        shares = tl.where(fallback, befores, afters)
        goal = uniform * tl.sum(shares, 0)
        drawer, base = law.part_of(shares, tl.arange(0, _MOST_PROGRAMS), programs, goal)
        part = first
        if (program == drawer) & (each > 1):
            tl.debug_barrier()
            which = tl.arange(0, sums_width)
            mine = tl.where(fallback, before_sums, after_sums) + first
            part_sums = tl.load(mine + which, mask=which < end - first, other=0.0)
            place, more = law.part_of(part_sums, which, end - first, goal - base)
            part += place
            base += more
        units = root + block // _UNIT
    else:
        goal = uniform
        part, base = law.part_of(told / total, tl.arange(0, width), splits, goal)
        units = root + law_units

    if program == drawer:
        found = root + 0x7FFFFFFF
        last = root
        unit = part * units
        end = unit + units
        while unit < end:
            token = unit * _UNIT + tl.arange(0, block)
            mask = token < v
            value = tl.load(here + token, mask=mask, other=float("-inf"))
            tile = tl.zeros([block], tl.float32)
            if drafts:
                tile = tl.load(law_row + token, mask=mask & (count > 0), other=0.0)
            before, after = last_weights(
                value, tile, token, mask, line, scale, rejections, count, top, total, threshold, cut,
                replacement, temperature, filtered, kind,
            )  # fmt: skip
            weight = tl.where(token < end * _UNIT, tl.where(fallback, before, after), 0.0)
            found, last_here, base = law.token_of(weight, unit * _UNIT, base, goal, block, even)
            last = tl.maximum(last, last_here)
            unit = tl.where(found < 0x7FFFFFFF, end, unit + block // _UNIT)
        tl.store(next_token + row, tl.where(found < 0x7FFFFFFF, found, last).to(tl.int64))


@triton.jit(do_not_specialize=["n", "splits", "parts", "each", "law_units", "programs"])
@no_type_check
def _settle_tree(
    path, accepted, accept_prob, next_token, sums, slots, rejections, programs,
    logits, stride_b, stride_n, tokens, parents, valid, sampled, draft, draft_b, draft_n,
    accept, accept_b, accept_n, given, given_b, given_n, seed, seed_b, round, round_b,
    maxima, totals, threshold, cut, n, v, splits, parts, each, law_units, tiny,
    made: tl.constexpr, replacement: tl.constexpr, drafts: tl.constexpr, temperature: tl.constexpr,
    filtered: tl.constexpr, kind: tl.constexpr, nodes: tl.constexpr, width: tl.constexpr, block: tl.constexpr,
    sums_width: tl.constexpr, even: tl.constexpr, known: tl.constexpr, early: tl.constexpr = False,
):  # fmt: skip
    """Walk a row's tree and draw what follows, by `programs` programs that all take the same steps."""
    row, program = tl.program_id(0).to(tl.int64), tl.program_id(1)
    index = tl.arange(0, nodes)
    exists = index < n
    own = row * n + index
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
    place = logits + row * stride_b + above.to(tl.int64) * stride_n + drafted
    value = law.scaled(tl.load(place, mask=alive, other=0.0).to(kind), temperature, filtered)
    q = tl.zeros([nodes], tl.float64)
    if drafts:
        drawn = tl.where(alive, tl.load(sampled + own, mask=exists, other=0).to(tl.int32), 0)
        place = draft + row * draft_b + above.to(tl.int64) * draft_n + drafted
        # Of points as well: what their siblings were drawn from takes its mass from their tokens, too.
        q = tl.load(place, mask=alive, other=0.0).to(kind).to(tl.float64)
    # The laws come from the kernel ahead; all else was there before that one began.
    law.follow(early)
    p = probability(value, drafted, row * n + above, alive, maxima, totals, threshold, cut, splits, filtered, width)

    # What decides about each node if it is the next: as its parent's first child, until a sibling is rejected.
    left = q
    stands = tl.where(drawn > 0, q, 1.0)
    taken = (coin * stands < p).to(tl.int32)
    ratio = tl.minimum(p / tl.maximum(stands, tiny), 1.0)

    node = tl.program_id(0) * 0
    depth, meeting, count = node, node, node
    draft_mass = tl.full([], 1.0, tl.float64)
    struck = tl.zeros([nodes], tl.int32)
    rejections += (row * programs + program) * n * 4
    looked = tl.zeros([nodes], tl.float64)
    steps = tl.full([nodes], -1, tl.int32)
    child = tl.min(tl.where(parent == node, index, n), 0)
    while child < n:
        looked = tl.where(index == child, ratio, looked)
        # All that is asked about the child at once.
        said = pick(4 * drafted + 2 * drawn + taken, index, child)
        if (said & 1) > 0:
            steps = tl.where(index == depth, child, steps)
            depth += 1
            node = child
            count = count * 0
            draft_mass = tl.full([], 1.0, tl.float64)
            child = tl.min(tl.where(parent == node, index, n), 0)
        else:
            token, from_law = said >> 2, (said & 2) > 0
            reject(rejections, count, token, from_law, draft_mass)
            count += 1
            siblings = (parent == node) & (index > child)
            later = tl.min(tl.where(siblings, index, n), 0)
            if later < n:
                # A following sibling needs to know what this rejection leaves.
                same = drafted == token
                mass = tl.full([], 0.0, tl.float64)
                minus = tl.where(same, 1.0, 0.0).to(tl.float64)
                if drafts:
                    minus = tl.where(from_law, left, minus)
                    struck = tl.where(siblings & from_law & same, 1, struck)
                if from_law:
                    if drafts:
                        this = row * n + node
                        row_top, row_total = law.joined_row(maxima, totals, this, splits, width)
                        here = logits + row * stride_b + node.to(tl.int64) * stride_n
                        law_row = draft + row * draft_b + node.to(tl.int64) * draft_n
                        mass, draft_mass = masses_left(
                            here, law_row, row_top, row_total, threshold + this, cut + this, rejections, count,
                            program * each, tl.minimum(program * each + each, parts), v, replacement, temperature,
                            filtered, kind, block, sums_width > 1,
                        )  # fmt: skip
                        firsts, seconds = exchanged(mass, draft_mass, slots, row, meeting, n, program, programs)
                        mass, draft_mass = tl.sum(firsts, 0), tl.sum(seconds, 0)
                        meeting += 1
                else:
                    mass = 1.0 - pick(p, index, child)
                mass = tl.maximum(mass, 0.0)
                # As an integer: a scalar truth about floats cannot be combined with vectors under the interpreter.
                divides = tl.where(mass > 0, 1, 0) > 0
                tl.store(rejections + 4 * (count - 1) + 3, mass)
                rest = tl.maximum(p - minus, 0.0) / tl.where(divides, mass, 1.0)
                p = tl.where(siblings & divides, rest, p)
                if drafts and not replacement:
                    unstruck = tl.where(struck > 0, 0.0, q) / tl.where(draft_mass > 0, draft_mass, 1.0)
                    left = tl.where(siblings, tl.where(draft_mass > 0, unstruck, q), left)
                stands = tl.where(drawn > 0, left, 1.0)
                taken = (coin * stands < p).to(tl.int32)
                ratio = tl.minimum(p / tl.maximum(stands, tiny), 1.0)
            child = later

    if program == 0:
        tl.store(path + own, steps.to(tl.int64), mask=exists)
        tl.store(accepted + row, depth.to(tl.int64))
        tl.store(accept_prob + own, looked.to(kind), mask=exists)
    draw(
        next_token, given, given_b, given_n, seed, seed_b, round, round_b,
        sums, slots, meeting, program, programs,
        row, node, tl.full([], 1.0, tl.float64), rejections, count,
        logits, stride_b, stride_n, draft, draft_b, draft_n, maxima, totals, threshold, cut, n, v, splits, parts,
        each, law_units, replacement, drafts, temperature, filtered, kind, width, block, sums_width, even, made, known,
    )  # fmt: skip


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
    place = logits + row * stride_b + above.to(tl.int64) * stride_n + drafted
    value = law.scaled(tl.load(place, mask=alive, other=0.0).to(kind), temperature, filtered)
    p = probability(value, drafted, row * n + above, alive, maxima, totals, threshold, cut, splits, filtered, width)
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


@triton.jit(do_not_specialize=["n", "splits", "parts", "each", "law_units", "programs", "mass_parts"])
@no_type_check
def _settle_block(
    path, accepted, accept_prob, next_token, sums, slots, rejections, programs, ratios, excesses, mass_parts,
    logits, stride_b, stride_n, tokens, valid, sampled, draft, draft_b, draft_n,
    accept, accept_b, accept_n, given, given_b, given_n, seed, seed_b, round, round_b,
    maxima, totals, threshold, cut, n, v, splits, parts, each, law_units, tiny,
    made: tl.constexpr, drafts: tl.constexpr, temperature: tl.constexpr,
    filtered: tl.constexpr, kind: tl.constexpr, nodes: tl.constexpr, width: tl.constexpr, block: tl.constexpr,
    sums_width: tl.constexpr, even: tl.constexpr, known: tl.constexpr, early: tl.constexpr = False,
):  # fmt: skip
    """Every position's coin; the last success ends the block, and what follows is drawn."""
    law.follow(early)
    row, program = tl.program_id(0).to(tl.int64), tl.program_id(1)
    index = tl.arange(0, nodes)
    exists = index < n
    own = row * n + index
    alive = exists & (tl.load(valid + own, mask=exists, other=0) != 0)
    drafted = tl.load(tokens + own, mask=exists, other=0).to(tl.int32)
    drawn = tl.zeros([nodes], tl.int32)
    if drafts:
        drawn = tl.load(sampled + own, mask=exists, other=0).to(tl.int32)
    ratio = tl.load(ratios + own, mask=exists, other=1.0)
    coin = philox_triton.coins(
        index, exists, row, accept, accept_b, accept_n, seed, seed_b, round, round_b, philox_triton.ACCEPTING, made
    )
    mass = tl.zeros([nodes], tl.float64)
    for part in range(0, mass_parts):
        mass += tl.load(excesses + own * mass_parts + part, mask=exists, other=0.0)
    gamma = tl.sum(alive.to(tl.int32), 0) - 1
    rest = mass + (1.0 - ratio)
    share = tl.where(rest > 0, mass / tl.maximum(rest, tiny), 1.0)
    h = tl.where((index == gamma) | (index == n - 1), ratio, share)
    taken = alive & ((coin < h) | (index == 0))
    last = tl.max(tl.where(taken, index, 0), 0)
    if program == 0:
        tl.store(path + own, tl.where(index < last, index + 1, -1).to(tl.int64), mask=exists)
        tl.store(accepted + row, last.to(tl.int64))
        tl.store(accept_prob + own, tl.where(alive & (index > 0), h, 0.0).to(kind), mask=exists)
    # One rejection at most stands at the end of a block, and nothing is divided by its mass.
    count, following = (last < gamma).to(tl.int32), index == last + 1
    rejections += (row * programs + program) * n * 4
    token, from_law = tl.sum(tl.where(following, drafted, 0), 0), tl.sum(tl.where(following, drawn, 0), 0) > 0
    reject(rejections, count * 0, token, from_law, tl.full([], 1.0, tl.float64))
    draw(
        next_token, given, given_b, given_n, seed, seed_b, round, round_b,
        sums, slots, count * 0, program, programs,
        row, last, tl.where(last < gamma, pick(ratio, index, last), 1.0), rejections, count,
        logits, stride_b, stride_n, draft, draft_b, draft_n, maxima, totals, threshold, cut, n, v, splits, parts,
        each, law_units, True, drafts, temperature, filtered, kind, width, block, sums_width, even, made, known,
    )  # fmt: skip


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
    # All that is read has to be there before the launch that `_settle_tree` follows.
    logits = law.dense(logits)
    draft = logits if draft_probs is None else law.dense(draft_probs)
    tree = (tokens.contiguous(), parents.contiguous(), valid.contiguous(), sampled.contiguous())
    end = _End.of(logits)
    found = law.limits(logits, temperature, top_k, top_p, min_p, blank=end.slots)
    _settle_tree[(logits.shape[0], end.programs)](
        *end.output(), end.programs, logits, *logits.stride()[:2], *tree, draft, *draft.stride()[:2],
        *coins.accept, *coins.token, *coins.source, *end.laws(logits, found), made=coins.made,
        replacement=bool(replacement), drafts=draft_probs is not None, **end.options(logits, found, temperature),
    )  # fmt: skip
    return end.verification


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
    end = _End.of(logits)
    found = law.limits(logits, temperature, top_k, top_p, min_p, blank=end.slots)
    tokens, valid, sampled = tokens.contiguous(), valid.contiguous(), sampled.contiguous()
    draft = logits if draft_probs is None else law.dense(draft_probs)
    options = end.options(logits, found, temperature)
    laws = {name: options[name] for name in ("temperature", "filtered", "kind", "width")}
    laws["drafts"] = draft_probs is not None
    nodes, splits, tiny = options["nodes"], found.parts, torch.finfo(end.verification.accept_prob.dtype).tiny
    ratios = torch.empty((b, n), dtype=torch.float64, device=device)
    _ratios[(b,)](
        ratios, logits, *logits.stride()[:2], tokens, valid, sampled, draft, *draft.stride()[:2],
        *found.pointers(), n, splits, tiny, **laws, nodes=nodes, num_warps=8,
    )  # fmt: skip
    block, parts, tiles = law.partition(b * n, v, widest=1024)
    excesses = torch.empty((b, n, parts), dtype=torch.float64, device=device)
    _excesses[(b * n, parts)](
        excesses, ratios, logits, *logits.stride()[:2], tokens, sampled, draft, *draft.stride()[:2],
        *found.pointers(), n, v, splits, parts, tiles, **laws, block=block, num_warps=4,
    )  # fmt: skip
    _settle_block[(b, end.programs)](
        *end.output(), end.programs, ratios, excesses, parts, logits, *logits.stride()[:2],
        tokens, valid, sampled, draft, *draft.stride()[:2], *coins.accept, *coins.token, *coins.source,
        *end.laws(logits, found), made=coins.made, drafts=draft_probs is not None, **options,
    )  # fmt: skip
    return end.verification


class _End(NamedTuple):
    """What the last launch of a verification fills in, and how `programs` programs share a row: each weighs `each` of
    its `parts` parts of `block` tokens, and tells the others through `slots`."""

    verification: Verification
    sums: Tensor
    slots: Tensor
    rejections: Tensor
    programs: int
    block: int
    parts: int
    each: int

    @classmethod
    def of(cls, logits: Tensor) -> "_End":
        b, n, v = logits.shape
        device, dtype = logits.device, law.compute_kind(logits.dtype)[1]
        programs = min(max(law.together(device) // max(b, 1), 1), _MOST_PROGRAMS.value)
        block = law.tile(triton.cdiv(v, programs), widest=_WIDEST)
        parts = triton.cdiv(v, block)
        each = triton.cdiv(parts, programs)
        programs = triton.cdiv(parts, each)
        integers = torch.empty((2, b), dtype=torch.int64, device=device)
        path = torch.empty((b, n), dtype=torch.int64, device=device)
        made = Verification(path, integers[0], integers[1], torch.empty((b, n), dtype=dtype, device=device))
        sums = torch.empty((b, 2, parts), dtype=torch.float64, device=device)
        slots = torch.empty((b, n, 2 * programs), dtype=torch.int64, device=device)
        rejections = torch.empty((b, programs, n, 4), dtype=torch.float64, device=device)
        return cls(made, sums, slots, rejections, programs, block, parts, each)

    def output(self) -> tuple[Tensor, ...]:
        path, count, token, accept_prob = self.verification
        return path, count, accept_prob, token, self.sums, self.slots, self.rejections

    def laws(self, logits: Tensor, found: law.Limits) -> tuple[Any, ...]:
        """The arguments that say what the law is, and the sizes."""
        n, v = logits.shape[1:]
        tiny = torch.finfo(self.verification.accept_prob.dtype).tiny
        return *found.pointers(), n, v, found.parts, self.parts, self.each, found.size // _UNIT.value, tiny

    def options(self, logits: Tensor, found: law.Limits, temperature: float) -> dict[str, Any]:
        """What the kernels are compiled for, and how they are launched."""
        nodes = triton.next_power_of_2(logits.shape[1])
        made = {
            "temperature": float(temperature) or 1.0,
            "filtered": found.threshold is not None,
            "kind": law.compute_kind(logits.dtype)[0],
            "width": found.width,
            "nodes": nodes,
            "block": self.block,
            "sums_width": triton.next_power_of_2(self.each),
            "even": logits.shape[-1] % 16 == 0,
            # A filtered law has one part.
            "known": found.threshold is None and found.size <= _MOST_DRAWN,
            # More where the parts of many laws are put together.
            "num_warps": 16 if nodes * found.width >= 1024 else 8,
            **law.early(logits.device),
        }
        # Programs that wait for each other have to run at the same time.
        return {**made, "launch_cooperative_grid": True} if self.programs > 1 else made

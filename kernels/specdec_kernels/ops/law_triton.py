"""Laws in Triton without sorting: the reductions that verification needs, and `warp` on top of them.

A row's law is p(v) = exp(x(v) - maximum) / total over the kept tokens, x being the logits over the temperature; so
three numbers a row say it all where every token is kept, and a threshold with the last kept id among its ties where
not (`Limits`). Top-k and top-p search the threshold on the sortable bits of x: every pass over the row tries 16
candidates at once, so 8 passes suffice for float32 and 16 for float64, whatever the vocabulary.

Numbers: x, weights exp(x - maximum) and their differences are float32 (float64 for float64 logits), and so are sums of
up to 16 weights; totals are float64 always. A probability is within (4 x + 40) * 2^-23 (2^-52) of exact arithmetic,
relatively, where x is the largest of its row in size. What is
kept is what the definition keeps, but for tokens at the edge of top-p or min-p whose mass lies within that bound of it.
"""

from functools import cache
from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda

_TRIED = tl.constexpr(16)
# As many programs of 4 warps as a large device holds at once (132 multiprocessors of 64 warps), rounded.
_PROGRAMS = 2048
_MAX_SPLITS = 64
# A lane of a part adds up so many weights in the type of the weights, which keeps the sum within 16 units of its last
# place; lanes and parts are then added in float64.
_MOST_TILES = 16
# Slots that a line may have for kernels behind.
MOST_SLOTS = tl.constexpr(64)


class Limits(NamedTuple):
    """A row's law: kept are tokens whose sortable bits exceed `threshold`, and those equal to it up to id `cut`.

    `maxima` and `totals`: largest x and sum of weights of every part of a row, a part being `size` tokens.
    """

    threshold: Tensor | None
    cut: Tensor | None
    maxima: Tensor
    totals: Tensor
    size: int

    @property
    def parts(self) -> int:
        return self.maxima.shape[-1]

    def pointers(self) -> tuple[Tensor, ...]:
        """`maxima`, `totals`, `threshold`, `cut`; arguments that a variant does not read still have to be pointers."""
        unread = self.maxima
        return self.maxima, self.totals, *(unread if limit is None else limit for limit in (self.threshold, self.cut))

    @property
    def width(self) -> int:
        """A power of two with room for the parts."""
        return int(triton.next_power_of_2(self.parts))


@triton.jit
@no_type_check
def follow(early: tl.constexpr):
    """What an `early` launch begins with: wait for the kernel ahead, and let the next one come."""
    if early:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()


@triton.jit
@no_type_check
def scaled(value, temperature: tl.constexpr, exact: tl.constexpr):
    """The logits over the temperature; `exact`: rounded as division rounds, which what is kept depends on."""
    if temperature == 1.0:
        made = value
    elif not exact:
        # A tenth of the instructions, and within 2 units of the last place.
        made = value * (1.0 / temperature)
    elif value.dtype == tl.float64:
        made = value / temperature
    else:
        made = tl.div_rn(value, tl.full(value.shape, temperature, tl.float32))
    return made


@triton.jit
@no_type_check
def sortable(value):
    """int64 keys in the order of the values; both zeros have one key, and NaN ranks as the least."""
    value = tl.where(value == value, value, float("-inf"))
    value = tl.where(value == 0, 0.0, value)
    if value.dtype == tl.float64:
        bits = value.to(tl.int64, bitcast=True)
        key = tl.where(bits < 0, bits ^ 0x7FFFFFFFFFFFFFFF, bits)
    else:
        narrow = value.to(tl.int32, bitcast=True)
        key = tl.where(narrow < 0, narrow ^ 0x7FFFFFFF, narrow).to(tl.int64)
    return key


@triton.jit
@no_type_check
def keeps(value, token, threshold, cut):
    """Whether a law keeps a token of this scaled logit."""
    key = sortable(value)
    return (key > threshold) | ((key == threshold) & (token <= cut))


@triton.jit
@no_type_check
def finite(maximum):
    """A maximum to subtract: 0 where everything is -inf, so that nothing but zeros comes out."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
@no_type_check
def clear(blank, slots, line, there):
    """Fill a line's slots with -1."""
    if there:
        slot = tl.arange(0, MOST_SLOTS)
        tl.store(blank + line * slots + slot, -1, mask=slot < slots)


@triton.jit(do_not_specialize=["slots", "n", "splits", "tiles"])
@no_type_check
def _parts(
    maxima, totals, blank, slots, logits, stride_b, stride_n, n, v, splits, tiles,
    temperature: tl.constexpr, kind: tl.constexpr, block: tl.constexpr, early: tl.constexpr = False,
):  # fmt: skip
    """Maximum and sum of weights of one of `splits` parts of a row.

    Every lane has a maximum and a sum of its own until the end, so that no tile waits for other lanes. A value x at
    distance d of the lane's maximum weighs exp(-d) against it if it is smaller, and the sum weighs exp(-d) against x
    if it is larger: one exponential for each.
    """
    follow(early)
    line, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    here = logits + (line // n) * stride_b + (line % n) * stride_n
    lanes = tl.arange(0, block)
    if blank is not None:
        clear(blank, slots, line, part == 0)
    # The least finite number, so that no difference is one of infinities.
    if kind == tl.float64:
        top = tl.full([block], -1.7976931348623157e308, kind)
    else:
        top = tl.full([block], -3.4028234663852886e38, kind)
    total = tl.zeros([block], kind)
    for tile in range(tiles):
        token = (part * tiles + tile) * block + lanes
        value = tl.load(here + token, mask=token < v, other=float("-inf")).to(kind)
        value = scaled(value, temperature, False)
        # exp(-x) is 2^(-x log2(e)); so written it is one multiplication, which takes the sign with it.
        factor = tl.exp2(tl.abs(value - top) * -1.4426950408889634)
        total = tl.where(value > top, total * factor + 1.0, total + factor)
        top = tl.maximum(top, value)
    highest = tl.max(top, 0)
    whole = tl.sum(total.to(tl.float64) * tl.exp(top - highest).to(tl.float64), 0)
    # Lanes of nothing but -inf have kept the least number, and infinity has no law.
    tl.store(maxima + line * splits + part, tl.where(whole == 0, float("-inf"), highest))
    tl.store(totals + line * splits + part, tl.where(highest == float("inf"), float("nan"), whole))


@triton.jit
@no_type_check
def weighed(
    value, token, mask, top, threshold, cut, temperature: tl.constexpr, filtered: tl.constexpr, kind: tl.constexpr
):  # fmt: skip
    """What some tokens of one row with these logits weigh: p, up to the sum of weights. `threshold`, `cut`: where the
    row's are."""
    value = scaled(value.to(kind), temperature, filtered)
    weight = tl.exp(value - finite(top))
    if filtered:
        weight = tl.where(keeps(value, token, tl.load(threshold), tl.load(cut)), weight, 0.0)
    return tl.where(mask, weight, 0.0)


@triton.jit
@no_type_check
def weights(
    here, token, mask, top, threshold, cut, temperature: tl.constexpr, filtered: tl.constexpr, kind: tl.constexpr
):  # fmt: skip
    """`weighed`, with the row's logits where `here` points."""
    value = tl.load(here + token, mask=mask, other=float("-inf"))
    return weighed(value, token, mask, top, threshold, cut, temperature, filtered, kind)


@triton.jit
@no_type_check
def merged(tops, shares, axis: tl.constexpr):
    """Maximum and sum of weights of what has these parts along an axis."""
    top = tl.max(tops, axis)
    shift = finite(top)
    if axis == 1:
        shift = shift[:, None]
    # A part of nothing but -inf weighs nothing, and has no finite distance from the top.
    factor = tl.where(tops == float("-inf"), 0.0, tl.exp(tops - shift))
    return top, tl.sum(shares * factor.to(tl.float64), axis)


@triton.jit
@no_type_check
def joined(maxima, totals, line, mask, splits, width: tl.constexpr):
    """Maximum and sum of weights of a vector of whole rows from their parts; 0 and 1 outside the mask."""
    part = tl.arange(0, width)[None, :]
    place = line[:, None] * splits + part
    there = mask[:, None] & (part < splits)
    outside = tl.where(mask[:, None] | (part > 0), float("-inf"), 0.0).to(maxima.dtype.element_ty)
    tops = tl.load(maxima + place, mask=there, other=0.0)
    shares = tl.load(totals + place, mask=there, other=1.0)
    return merged(tl.where(there, tops, outside), shares, 1)


@triton.jit
@no_type_check
def parts_of(maxima, totals, line, splits, width: tl.constexpr):
    """What the parts of one whole row weigh, each relative to the row's maximum; that, and what all weigh."""
    part = tl.arange(0, width)
    there = part < splits
    tops = tl.load(maxima + line * splits + part, mask=there, other=float("-inf"))
    shares = tl.load(totals + line * splits + part, mask=there, other=0.0)
    top, total = merged(tops, shares, 0)
    # As in `merged`.
    factor = tl.where(tops == float("-inf"), 0.0, tl.exp(tops - finite(top)))
    return shares * factor.to(tl.float64), top, total


@triton.jit
@no_type_check
def joined_row(maxima, totals, line, splits, width: tl.constexpr):
    """Maximum and sum of weights of one whole row from its parts."""
    _, top, total = parts_of(maxima, totals, line, splits, width)
    return top, total


@triton.jit
@no_type_check
def part_of(sums, which, parts, goal):
    """Of parts that weigh `sums`, the first that reaches beyond `goal`, and what weighs before it."""
    part = tl.sum(((tl.cumsum(sums, 0) <= goal) & (which < parts)).to(tl.int32), 0)
    part = tl.minimum(part, tl.max(tl.where(sums > 0, which, 0), 0))
    return part, tl.sum(tl.where(which < part, sums, 0.0), 0)


@triton.jit
@no_type_check
def token_of(weight, start, base, goal, block: tl.constexpr, even: tl.constexpr):
    """Of the `block` tokens from `start` on: the first at which their weights, above `base`, reach beyond `goal`, or
    0x7FFFFFFF; if so, the last one of positive weight, or 0, and `base` with all of them.

    `even`: a thread has neighbouring tokens, because rows are aligned. Where it has not, adding up all in order costs
    more than finding the sum of 32 first, and then the token in that.
    """
    if even:
        beyond = (base + tl.cumsum(weight, 0) > goal) & (weight > 0)
        found = tl.min(tl.where(beyond, start + tl.arange(0, block), 0x7FFFFFFF), 0)
    else:
        lines = tl.reshape(weight, [block // 32, 32])
        sums = tl.sum(lines, 1)
        which, lane = tl.arange(0, block // 32), tl.arange(0, 32)
        line = tl.min(tl.where((base + tl.cumsum(sums, 0) > goal) & (sums > 0), which, 0x7FFFFFFF), 0)
        inside = tl.sum(tl.where(which[:, None] == line, lines, 0.0), 0)
        before = base + tl.sum(tl.where(which < line, sums, 0.0), 0)
        beyond = tl.min(tl.where((before + tl.cumsum(inside, 0) > goal) & (inside > 0), lane, 32), 0)
        # Rounding may reach beyond in the one sum and not in the other.
        beyond = tl.minimum(beyond, tl.max(tl.where(inside > 0, lane, 0), 0))
        found = tl.where(line < 0x7FFFFFFF, start + line * 32 + beyond, 0x7FFFFFFF)
    last = found * 0
    if found == 0x7FFFFFFF:
        last = tl.max(tl.where(weight > 0, start + tl.arange(0, block), 0), 0)
        base += tl.sum(weight, 0)
    return found, last, base


@triton.jit(do_not_specialize=["slots", "n", "top_k"])
@no_type_check
def _limits(
    threshold, cut, maxima, totals, blank, slots, logits, stride_b, stride_n, n, v, top_k,
    temperature: tl.constexpr, top_p: tl.constexpr, min_p: tl.constexpr, kind: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """One row's law, one program: a few passes over logits that stay in the cache."""
    line = tl.program_id(0).to(tl.int64)
    here = logits + (line // n) * stride_b + (line % n) * stride_n
    lanes = tl.arange(0, block)
    tried = tl.arange(0, _TRIED)
    if blank is not None:
        clear(blank, slots, line, line >= 0)

    top = tl.full([], float("-inf"), kind)
    low = tl.full([], float("inf"), kind)
    broken = tl.program_id(0) * 0
    for begin in range(0, v, block):
        token = begin + lanes
        value = scaled(tl.load(here + token, mask=token < v, other=float("-inf")).to(kind), temperature, True)
        nan = value != value
        broken += tl.max(nan.to(tl.int32), 0)
        value = tl.where(nan, float("-inf"), value)
        top = tl.maximum(top, tl.max(value, 0))
        low = tl.minimum(low, tl.min(tl.where(token < v, value, float("inf")), 0))
    shift = finite(top)
    floor = sortable(low)
    last = tl.program_id(0) * 0 + 0x7FFFFFFF

    if top_k > 0:
        # The largest key that at least k tokens reach.
        ceiling = sortable(top) + 1
        while floor + 1 < ceiling:
            step = tl.maximum((ceiling >> 4) - (floor >> 4), 1)
            candidate = floor + (tried + 1) * step
            count = tl.zeros([_TRIED], tl.int32)
            for begin in range(0, v, block):
                token = begin + lanes
                value = scaled(tl.load(here + token, mask=token < v, other=float("-inf")).to(kind), temperature, True)
                reached = (sortable(value)[:, None] >= candidate[None, :]) & (token < v)[:, None]
                count += tl.sum(reached.to(tl.int32), 0)
            enough = count >= top_k
            floor = tl.maximum(floor, tl.max(tl.where(enough, candidate, floor), 0))
            ceiling = tl.minimum(ceiling, tl.min(tl.where(enough, ceiling, candidate), 0))

    if top_p < 1.0:
        base = floor
        kept = tl.full([], 0.0, tl.float64)
        for begin in range(0, v, block):
            token = begin + lanes
            value = scaled(tl.load(here + token, mask=token < v, other=float("-inf")).to(kind), temperature, True)
            weights = tl.where((sortable(value) >= base) & (token < v), tl.exp(value - shift), 0.0)
            kept += tl.sum(tl.where(value == value, weights, 0.0), 0).to(tl.float64)
        wanted = kept * top_p
        # The largest key such that the tokens which reach it have the mass.
        ceiling = sortable(top) + 1
        above = tl.full([], 0.0, tl.float64)
        while floor + 1 < ceiling:
            step = tl.maximum((ceiling >> 4) - (floor >> 4), 1)
            candidate = floor + (tried + 1) * step
            mass = tl.zeros([_TRIED], tl.float64)
            for begin in range(0, v, block):
                token = begin + lanes
                value = scaled(tl.load(here + token, mask=token < v, other=float("-inf")).to(kind), temperature, True)
                reached = (sortable(value)[:, None] >= candidate[None, :]) & (token < v)[:, None]
                weights = tl.exp(value - shift)
                mass += tl.sum(tl.where(reached, weights[:, None], 0.0), 0).to(tl.float64)
            enough = mass >= wanted
            floor = tl.maximum(floor, tl.max(tl.where(enough, candidate, floor), 0))
            lacking = tl.min(tl.where(enough, ceiling, candidate), 0)
            # What lies above the threshold is the mass that reached the least candidate which was too high.
            found = tl.max(tl.where((candidate == lacking) & (lacking < ceiling), mass, -1.0), 0)
            above = tl.where(found >= 0, found, above)
            ceiling = tl.minimum(ceiling, lacking)
        # Of the tokens at the threshold the first few are kept.
        weight = tl.full([], 0.0, tl.float64)
        ties = tl.program_id(0) * 0
        for begin in range(0, v, block):
            token = begin + lanes
            value = scaled(tl.load(here + token, mask=token < v, other=float("-inf")).to(kind), temperature, True)
            equal = (sortable(value) == floor) & (token < v)
            ties += tl.sum(equal.to(tl.int32), 0)
            weight = tl.maximum(weight, tl.max(tl.where(equal, tl.exp(value - shift), 0.0), 0).to(tl.float64))
        room = tl.where(weight > 0, tl.ceil((wanted - above) / tl.where(weight > 0, weight, 1.0)), 1.0)
        few = tl.minimum(tl.maximum(room, 1.0), 2147483647.0).to(tl.int32)
        if few < ties:
            seen = tl.program_id(0) * 0
            begin = tl.program_id(0) * 0
            while seen < few:
                token = begin + lanes
                value = scaled(tl.load(here + token, mask=token < v, other=float("-inf")).to(kind), temperature, True)
                equal = ((sortable(value) == floor) & (token < v)).to(tl.int32)
                rank = seen + tl.cumsum(equal, 0)
                last = tl.minimum(last, tl.min(tl.where((rank == few) & (equal > 0), token, 0x7FFFFFFF), 0))
                seen += tl.sum(equal, 0)
                begin += block

    if min_p > 0.0:
        least = sortable((shift + tl.log(tl.full([], min_p, kind))).to(kind))
        last = tl.where(least > floor, 0x7FFFFFFF, last)
        floor = tl.maximum(floor, least)

    total = tl.full([], 0.0, tl.float64)
    for begin in range(0, v, block):
        token = begin + lanes
        value = scaled(tl.load(here + token, mask=token < v, other=float("-inf")).to(kind), temperature, True)
        weights = tl.where(keeps(value, token, floor, last) & (token < v), tl.exp(value - shift), 0.0)
        total += tl.sum(weights, 0).to(tl.float64)
    tl.store(threshold + line, floor)
    tl.store(cut + line, last)
    tl.store(maxima + line, top)
    tl.store(totals + line, tl.where(broken > 0, float("nan"), total))


@triton.jit(do_not_specialize=["n", "splits"])
@no_type_check
def _apply(
    out, logits, stride_b, stride_n, n, v, maxima, totals, splits, threshold, cut,
    temperature: tl.constexpr, filtered: tl.constexpr, kind: tl.constexpr, block: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * block + tl.arange(0, block)
    top, total = joined_row(maxima, totals, line, splits, width)
    here = logits + (line // n) * stride_b + (line % n) * stride_n
    value = scaled(tl.load(here + token, mask=token < v, other=float("-inf")).to(kind), temperature, filtered)
    law = tl.exp(value - finite(top)) / total.to(kind)
    if filtered:
        kept = keeps(value, token, tl.load(threshold + line), tl.load(cut + line))
        # Zero, unless the row is broken.
        law = tl.where(kept, law, 0.0 / total.to(kind))
    tl.store(out + line * v + token, law, mask=token < v)


def _nvidia(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.cuda is not None


@cache
def early(device: torch.device) -> dict[str, bool]:
    """Options of a launch of a kernel that takes `early`: where the GPU can, it starts while the one ahead ends."""
    able = _nvidia(device) and torch.cuda.get_device_capability(device) >= (9, 0)
    return {"early": True, "launch_pdl": True} if able else {}


@cache
def together(device: torch.device) -> int:
    """Programs of up to 16 warps that run at the same time, so that they may wait for each other."""
    return torch.cuda.get_device_properties(device).multi_processor_count if _nvidia(device) else 1


def crowded(device: torch.device) -> dict[str, int]:
    """Options with which `_PROGRAMS` of 4 warps run at once: as many registers as a thread of a full device has."""
    return {"maxnreg": 32} if _nvidia(device) else {}


def tile(v: int, widest: int) -> int:
    """Tokens that a program takes at a time."""
    return int(min(widest, max(128, triton.next_power_of_2(v))))


def partition(
    lines: int, v: int, widest: int, most: int | None = None, splits: int = _MAX_SPLITS
) -> tuple[int, int, int]:
    """Tokens a tile, parts a row (up to `splits`) and tiles a part (at most `most` while parts suffice), so that
    `lines` rows keep a large device busy."""
    block = tile(v, widest)
    tiles = triton.cdiv(v, block)
    wanted = max(triton.cdiv(_PROGRAMS, max(lines, 1)), 1 if most is None else triton.cdiv(tiles, most))
    each = triton.cdiv(tiles, min(tiles, splits, wanted))
    return block, triton.cdiv(tiles, each), each


def compute_kind(dtype: torch.dtype) -> tuple[tl.dtype, torch.dtype]:
    """The type in which logits of `dtype` are computed with, for Triton and for torch."""
    return (tl.float64, torch.float64) if dtype == torch.float64 else (tl.float32, torch.float32)


def filters(logits: Tensor, top_k: int, top_p: float, min_p: float) -> bool:
    """Whether a law of these settings may leave tokens out."""
    return 0 < top_k < logits.shape[-1] or top_p < 1 or min_p > 0


def limits(
    logits: Tensor,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    blank: Tensor | None = None,
) -> Limits:
    """The law of every row of `logits [b n v]` (last axis dense): threshold, cut, maximum and total weight `[b n 1]`.

    With nothing filtered there is no threshold, and maximum and total come in parts `[b n splits]`. `blank
    [b n slots]`: up to `MOST_SLOTS` integers a line that the same launch sets to -1, for kernels behind it.
    """
    b, n, v = logits.shape
    if temperature == 0:
        # The first largest logit is the one token that the least mass needs.
        temperature, top_k, top_p, min_p = 1.0, 0, 1e-30, 0.0
    kind, dtype = compute_kind(logits.dtype)
    device, slots = logits.device, 0 if blank is None else blank.shape[-1]
    if not filters(logits, top_k, top_p, min_p):
        block, splits, tiles = partition(b * n, v, widest=1024, most=_MOST_TILES)
        maxima = torch.empty((b, n, splits), dtype=dtype, device=device)
        totals = torch.empty((b, n, splits), dtype=torch.float64, device=device)
        _parts[(b * n, splits)](
            maxima, totals, blank, slots, logits, logits.stride(0), logits.stride(1), n, v, splits, tiles,
            temperature=float(temperature), kind=kind, block=block, num_warps=4, **early(device), **crowded(device),
        )  # fmt: skip
        return Limits(None, None, maxima, totals, block * tiles)
    threshold = torch.empty((b, n, 1), dtype=torch.int64, device=device)
    cut = torch.empty((b, n, 1), dtype=torch.int32, device=device)
    maxima = torch.empty((b, n, 1), dtype=dtype, device=device)
    totals = torch.empty((b, n, 1), dtype=torch.float64, device=device)
    _limits[(b * n,)](
        threshold, cut, maxima, totals, blank, slots, logits, logits.stride(0), logits.stride(1), n, v,
        top_k if top_k < v else 0,
        temperature=float(temperature), top_p=float(top_p), min_p=float(min_p), kind=kind,
        block=tile(v, widest=1024), num_warps=8,
    )  # fmt: skip
    return Limits(threshold, cut, maxima, totals, v)


def dense(logits: Tensor) -> Tensor:
    """The logits with their vocabulary in consecutive places, copied only if they are not."""
    return logits if logits.stride(-1) == 1 or logits.shape[-1] == 1 else logits.contiguous()


def warp(logits: Tensor, *, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
    """See `specdec_kernels.ops.law.warp`."""
    kind, dtype = compute_kind(logits.dtype)
    rows = dense(logits.reshape(1, -1, logits.shape[-1]))
    n, v = rows.shape[1:]
    out = torch.empty(logits.shape, dtype=dtype, device=logits.device)
    if not out.numel():
        return out
    law = limits(rows, temperature, top_k, top_p, min_p)
    block = tile(v, widest=1024)
    _apply[(n, triton.cdiv(v, block))](
        out, rows, rows.stride(0), rows.stride(1), n, v, *law.pointers()[:2], law.parts, *law.pointers()[2:],
        temperature=float(temperature) or 1.0, filtered=law.threshold is not None, kind=kind, block=block,
        width=law.width, num_warps=4,
    )  # fmt: skip
    return out

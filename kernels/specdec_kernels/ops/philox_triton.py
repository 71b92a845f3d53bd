"""Philox4x32-10, uniforms and Gumbel noise in Triton: the same words and uniforms as `philox.py`, bit for bit.

`words`, `coins` and the functions of noise are for other kernels to call. Noise takes float64 logarithms as the
definition does; the device's differ from the host's in the last place, so two noises agree within 4 x 2^-52 of their
size plus 2^-50.
"""

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec_kernels.ops.philox import ACCEPT, COUPLED, TOKEN
from specdec_kernels.ops.verify import NO_COINS

_COUPLED = tl.constexpr(COUPLED)
ACCEPTING, DRAWING = tl.constexpr(ACCEPT), tl.constexpr(TOKEN)
_BLOCK = 1024
# Counters of a program: four words of 64 bits each are stored.
_COUNTERS = 256
# Counters from which on their places take 64 bits.
_WIDE = 2**31


@triton.jit
@no_type_check
def words(c0, c1, c2, c3, seed):
    """Four words (uint32) of broadcast counters of any integer type and a seed of 64 bits."""
    k0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    k1 = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    c0, c1, c2, c3 = c0.to(tl.uint32), c1.to(tl.uint32), c2.to(tl.uint32), c3.to(tl.uint32)
    for _ in tl.static_range(10):
        product0 = c0.to(tl.uint64) * 0xD2511F53
        product1 = c2.to(tl.uint64) * 0xCD9E8D57
        high0, low0 = (product0 >> 32).to(tl.uint32), (product0 & 0xFFFFFFFF).to(tl.uint32)
        high1, low1 = (product1 >> 32).to(tl.uint32), (product1 & 0xFFFFFFFF).to(tl.uint32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = ((k0.to(tl.uint64) + 0x9E3779B9) & 0xFFFFFFFF).to(tl.uint32)
        k1 = ((k1.to(tl.uint64) + 0xBB67AE85) & 0xFFFFFFFF).to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
@no_type_check
def uniform(node, round, purpose, seed):
    """The uniforms (float64) of nodes (int32) in a round, for one purpose."""
    zero = node * 0
    first, second, _, _ = words(zero, node, zero + round, zero + purpose, seed)
    # Below 2^53, so nothing is rounded.
    return ((first >> 5).to(tl.int64) * 67108864 + (second >> 6).to(tl.int64)).to(tl.float64) * (1.0 / 9007199254740992)


@triton.jit
@no_type_check
def coins(
    node, mask, row, given, given_b, given_n, seed, seed_b, round, round_b, purpose: tl.constexpr, made: tl.constexpr
):  # fmt: skip
    """The uniforms (float64) of nodes (int32) of a row: `made` from its seed and round, or those given."""
    if made:
        coin = uniform(node, tl.load(round + row * round_b), purpose, tl.load(seed + row * seed_b))
    else:
        coin = tl.load(given + row * given_b + node * given_n, mask=mask, other=1.0).to(tl.float64)
    return coin


@triton.jit
@no_type_check
def token_words(begin, position, seed, block: tl.constexpr):
    """The words that the noise of `block` tokens from `begin` (a multiple of 4) is made of, at a position."""
    lane = begin // 4 + tl.arange(0, block // 4)
    zero = lane * 0
    w0, w1, w2, w3 = words(lane, zero, zero + position, zero + _COUPLED, seed)
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [block])


@triton.jit
@no_type_check
def noise(word):
    """The Gumbel noise (float64) of a word."""
    unit = (word.to(tl.float64) + 0.5) * (1.0 / 4294967296.0)
    return -tl.log(-tl.log(unit))


@triton.jit
@no_type_check
def most_noise(word):
    """A float32 that the Gumbel noise of a word is at most, by less than 0.4.

    With u = (word + 1/2) / 2^32, -log u is at least 1 - u, which float32 holds to its last place where u is near 1;
    below 1/2 it is taken by itself. The margins are far above the errors of a device's fast logarithm (2^-22).
    """
    low = (word.to(tl.float32) + 0.5) * (1.0 / 4294967296.0)
    rest = ((0xFFFFFFFF - word).to(tl.float32) + 0.5) * (1.0 / 4294967296.0)
    least = tl.where(low < 0.5, -tl.log(low), rest)
    return 1e-4 - tl.log(least)


@triton.jit(do_not_specialize=["count", "columns", "depth"])
@no_type_check
def _philox(
    out, c0, c1, c2, c3, seed, count, columns, depth,
    s00, s01, s02, s10, s11, s12, s20, s21, s22, s30, s31, s32, seed_stride,
    wide: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64 if wide else tl.int32) * block + tl.arange(0, block)
    mask = index < count
    # Divided in 32 bits where they suffice: in 64 that takes longer than making the words.
    row, column, lane = index // (columns * depth), (index // depth) % columns, index % depth
    row, column, lane = row.to(tl.int64), column.to(tl.int64), lane.to(tl.int64)
    w0, w1, w2, w3 = words(
        tl.load(c0 + row * s00 + column * s01 + lane * s02, mask=mask, other=0) & 0xFFFFFFFF,
        tl.load(c1 + row * s10 + column * s11 + lane * s12, mask=mask, other=0) & 0xFFFFFFFF,
        tl.load(c2 + row * s20 + column * s21 + lane * s22, mask=mask, other=0) & 0xFFFFFFFF,
        tl.load(c3 + row * s30 + column * s31 + lane * s32, mask=mask, other=0) & 0xFFFFFFFF,
        tl.load(seed + row * seed_stride, mask=mask, other=0),
    )
    # A step at a time, because three counts may not fit the type of one.
    tl.store(out + index, w0.to(tl.int64), mask=mask)
    tl.store(out + count + index, w1.to(tl.int64), mask=mask)
    tl.store(out + count + count + index, w2.to(tl.int64), mask=mask)
    tl.store(out + count + count + count + index, w3.to(tl.int64), mask=mask)


@triton.jit(do_not_specialize=["n", "columns", "purpose", "last"])
@no_type_check
def _uniforms(out, seed, round, n, columns, purpose, last, seed_stride, round_stride, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    behind = column >= n
    made = uniform(
        tl.where(behind, 0, column),
        tl.load(round + row * round_stride),
        tl.where(behind, last, purpose),
        tl.load(seed + row * seed_stride),
    )
    tl.store(out + row * columns + column, made, mask=column < columns)


@triton.jit(do_not_specialize=["n"])
@no_type_check
def _gumbel(out, seed, position, n, v, seed_stride, pos_b, pos_n, block: tl.constexpr):
    line = tl.program_id(0).to(tl.int64)
    row, node = line // n, line % n
    begin = tl.program_id(1) * block
    place = tl.load(position + row * pos_b + node * pos_n)
    made = noise(token_words(begin, place, tl.load(seed + row * seed_stride), block))
    token = begin + tl.arange(0, block)
    tl.store(out + line * v + token, made, mask=token < v)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: Tensor) -> tuple[Tensor, ...]:
    """See `specdec_kernels.ops.philox.philox`; counters of up to three axes."""
    axes = max(word.dim() for word in counter)
    every = (*counter, seed.view(-1, *(1,) * (axes - 1)))
    counter = torch.broadcast_tensors(*every)[:4]  # type: ignore[no-untyped-call]
    shape = tuple(counter[0].shape)
    out = torch.empty((4, *shape), dtype=torch.int64, device=seed.device)
    count = out[0].numel()
    if count:
        full = (*shape, 1, 1)[:3]
        spread = [word.long() for word in counter]
        strides = [stride for word in spread for stride in (*word.stride(), 0, 0)[:3]]
        grid = (triton.cdiv(count, _COUNTERS),)
        _philox[grid](
            out, *spread, seed, count, full[1], full[2], *strides, seed.expand(shape[0]).stride(0),
            wide=count + _COUNTERS > _WIDE, block=_COUNTERS,
        )  # fmt: skip
    return tuple(out)


def uniforms(seed: Tensor, round: Tensor, purpose: int, n: int, last: int | None = None) -> Tensor:
    """See `specdec_kernels.ops.philox.uniforms`."""
    seed, round = torch.broadcast_tensors(seed, round)  # type: ignore[no-untyped-call]
    rows, columns = seed.shape[0], n + (last is not None)
    out = torch.empty((rows, columns), dtype=torch.float64, device=seed.device)
    if out.numel():
        block = min(_BLOCK, triton.next_power_of_2(columns))
        _uniforms[(rows, triton.cdiv(columns, block))](
            out, seed, round, n, columns, purpose, last or 0, seed.stride(0), round.stride(0), block=block
        )
    return out


class Coins(NamedTuple):
    """What the kernels of a verification take of its uniforms: `accept` and `token` are a tensor and its strides each,
    `source` is seed and round with theirs, and `made` says which of them is read."""

    accept: tuple[Tensor | int, ...]
    token: tuple[Tensor | int, ...]
    source: tuple[Tensor | int, ...]
    made: bool


def told(
    rule: str, accept: Tensor | None, token: Tensor | None, seed: Tensor | None, round: Tensor | None, unread: Tensor
) -> Coins:
    """The coins of a rule; `unread`: a tensor for pointers that nobody follows."""
    if accept is not None and token is not None:
        return Coins((accept, *accept.stride()), (token, *token.stride(), 0), (unread, 0, unread, 0), made=False)
    if seed is None or round is None:
        raise ValueError(f"{rule} {NO_COINS}")
    return Coins((unread, 0, 0), (unread, 0, 0), (seed, *seed.stride(), round, *round.stride()), made=True)


def gumbel(seed: Tensor, position: Tensor, vocab_size: int) -> Tensor:
    """See `specdec_kernels.ops.philox.gumbel`."""
    b, n = position.shape
    out = torch.empty((b, n, vocab_size), dtype=torch.float64, device=seed.device)
    if out.numel():
        seed = seed.expand(b)
        grid = (b * n, triton.cdiv(vocab_size, _BLOCK))
        _gumbel[grid](out, seed, position, n, vocab_size, seed.stride(0), *position.stride(), block=_BLOCK)
    return out

"""`tree_attention` in Triton: split over the cache as flash decoding does (Dao et al., 2023), then combined.

The query heads that share a key head and the n nodes are the rows of one tile, so keys and values are read once for
all of them (up to 8 nodes, and up to tiles of 64 rows). `length` is read on the device and the launch depends on
shapes alone, so a captured launch stays right while rows grow; programs past the end of their row leave at once.

A node's result is the same bits for every n up to 8, whatever its neighbours, `extent` and capacity: splits and blocks
begin at fixed slots, tiles have one shape, sums run in slot order, and slots that are not seen add exact zeros. Many
rows have longer splits than few, so a row's bits may differ between a small batch and a large one.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from specdec_kernels.ops.attention import MAX_WIDTH
from specdec_kernels.ops.dot_triton import dot, stages

_MAX_HEAD_SIZE = 128
# Nodes up to which a tile has one shape. A verification of 1 to 7 drafts is what speculation mostly runs.
_FEW = 8
# Nodes past which the cache is not split: a prompt has parallelism enough.
_MOST_SPLIT_NODES = 64
# Pairs of rows and key heads from which on long splits do.
_MANY_PAIRS = 64
# Programs that keep a large device busy.
_PROGRAMS = 128
# Partial results, and channels of them, that a warp adds up at once.
_COMBINED, _CHANNELS = 32, 32


def refuse(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> str | None:
    """Why the kernel cannot take a query of this type and shape `[b n heads d]`, or `None`."""
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"computes in float32 and narrower, not in {str(dtype).removeprefix('torch.')}"
    if shape and shape[-1] > _MAX_HEAD_SIZE:
        return f"is built for heads of up to {_MAX_HEAD_SIZE} channels, not of {shape[-1]}"
    return None


def tree_attention(
    query: Float[Tensor, "b n heads d"],
    keys: Float[Tensor, "b c kv_heads d"],
    values: Float[Tensor, "b c kv_heads d"],
    length: Int[Tensor, " b"],
    ancestors: Int[Tensor, "b n"] | None = None,
    *,
    width: int | None = None,
    extent: int | None = None,
) -> Float[Tensor, "b n heads d"]:
    """See `attention.tree_attention`. Raises `ValueError` for a tree wider than its masks and for strided heads."""
    rows, n, heads, size = query.shape
    kv_heads = keys.shape[2]
    width = n if width is None else width
    if ancestors is not None and not n <= width <= MAX_WIDTH:
        raise ValueError(f"a tree of {n} new nodes over a window of {width}: masks hold n to {MAX_WIDTH} slots")
    if keys.stride() != values.stride() or keys.stride(3) != 1 or query.stride(3) != 1:
        raise ValueError("tree_attention reads keys and values of one layout with contiguous heads; copy them first")
    out = torch.empty((rows, n, heads, size), dtype=query.dtype, device=query.device)
    if not out.numel():
        return out
    extent = min(keys.shape[1], extent or keys.shape[1])
    group = heads // kv_heads
    padded = max(16, triton.next_power_of_2(size))
    narrow = query.element_size() == 2
    block_m = max(16, min(64, triton.next_power_of_2(group * max(n, _FEW))))
    if n > _FEW and narrow and stages(query.device, 3) == 3 and rows * kv_heads * n * group >= 128 * _PROGRAMS:
        # Half as many reads of keys and values from the L2 cache.
        block_m = 128
    tiles = triton.cdiv(n * group, block_m)
    split = choose_split(n, rows * kv_heads, tiles, extent)
    splits = triton.cdiv(extent, split)
    masks = (0, 0) if ancestors is None else ancestors.stride()
    partial, stats = out, out
    if splits > 1:
        partial = torch.empty((rows, n, heads, splits, size), dtype=torch.float32, device=query.device)
        stats = torch.empty((2, rows, n, heads, splits), dtype=torch.float32, device=query.device)
    # Programs that read the same slots are neighbours, so all but the first find them in the L2 cache.
    _attend[(tiles * rows * kv_heads, splits)](
        query, keys, values, length, length if ancestors is None else ancestors, out, partial, stats,
        n, kv_heads, tiles, width, split, splits, rows * n * heads * splits, size**-0.5 * 1.4426950408889634,
        *query.stride()[:3], *keys.stride()[:3], length.stride(0), *masks,
        GROUP=group, SIZE=size, PADDED=padded, BLOCK_M=block_m, BLOCK_N=64 if narrow else 32,
        TREE=ancestors is not None, WHOLE=splits == 1, WIDE=query.device.type == "cpu",
        num_warps=8 if block_m > 64 else 4, num_stages=stages(query.device, 3) if narrow else 2,
    )  # fmt: skip
    if splits > 1:
        channels = min(padded, _CHANNELS)
        _combine[(rows * n * heads, padded // channels)](
            partial, stats, length, out, n, heads, splits, split, rows * n * heads * splits, length.stride(0),
            SIZE=size, CHANNELS=channels, BLOCK=_COMBINED, num_warps=1,
        )  # fmt: skip
    return out


def choose_split(n: int, pairs: int, tiles: int, extent: int) -> int:
    """Slots that one program reads, for `n` nodes in so many tiles, pairs of rows and key heads, and slots in all.

    A split leaves a partial result of each node, so there are no more than keep the device busy, and in long caches
    some more for what is left at the end. Up to `_FEW` nodes it is a fixed number of slots: 128 are 64 KiB of a 16-bit
    cache with heads of 128.
    """
    if n > _MOST_SPLIT_NODES:
        return extent
    if n <= _FEW:
        return 128 if pairs < _MANY_PAIRS else 1024 if pairs < _PROGRAMS else 8192
    splits = max(-(-_PROGRAMS // (pairs * tiles)), extent // 4096)
    return max(-(-extent // (64 * splits)) * 64, 128 if n <= 2 * _FEW else 16 * n)


# Not specialized by what varies from call to call: one binary for every n and extent.
@triton.jit(do_not_specialize=("n", "tiles", "width", "split", "splits", "total"))
@no_type_check
def _attend(
    query, keys, values, length, ancestors, out, partial, stats,
    n, kv_heads, tiles, width, split, splits, total, scale,
    query_row, query_node, query_head, slot_row, slot_slot, slot_head, length_row, mask_row, mask_node,
    GROUP: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TREE: tl.constexpr, WHOLE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    pair, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    row = (pair // kv_heads).to(tl.int64)
    kv_head = pair % kv_heads
    part = tl.program_id(1)
    used = tl.load(length + row * length_row).to(tl.int32)
    place = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    node = place // GROUP
    head = kv_head * GROUP + place % GROUP
    live = node < n
    end = used + n
    if not TREE:
        end = tl.minimum(end, used + (tile * BLOCK_M + BLOCK_M - 1) // GROUP + 1)
    begin = part * split
    if begin >= end:
        return
    end = tl.minimum(end, begin + split)

    channel = tl.arange(0, PADDED)
    whole = channel < SIZE
    q = tl.load(
        query + row * query_row + node[:, None] * query_node + head[:, None] * query_head + channel[None, :],
        mask=live[:, None] & whole[None, :], other=0.0,
    )  # fmt: skip
    window = used
    if TREE:
        window = used + n - width
        sees = tl.load(ancestors + row * mask_row + node * mask_node, mask=live, other=0)
    base = row * slot_row + kv_head * slot_head
    highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    weight = tl.zeros((BLOCK_M,), tl.float32)
    mixed = tl.zeros((BLOCK_M, PADDED), tl.float32)
    for start in range(begin, end, BLOCK_N):
        slot = start + tl.arange(0, BLOCK_N)
        inside = slot < end
        offset = base + slot.to(tl.int64) * slot_slot
        k = tl.load(keys + offset[None, :] + channel[:, None], mask=inside[None, :] & whole[:, None], other=0.0)
        scores = dot(q, k, tl.zeros((BLOCK_M, BLOCK_N), tl.float32), WIDE) * scale
        # Before the window everything is seen by all.
        if start + BLOCK_N > window:
            if TREE:
                bit = slot - window
                named = ((sees[:, None] >> tl.minimum(tl.maximum(bit, 0), 63).to(tl.int64)[None, :]) & 1) == 1
                own = slot[None, :] == (used + node)[:, None]
                seen = (bit < 0)[None, :] | (named & (bit < width)[None, :]) | own
            else:
                seen = slot[None, :] <= (used + node)[:, None]
            scores = tl.where(seen & inside[None, :], scores, float("-inf"))
        raised = tl.maximum(highest, tl.max(scores, 1))
        # A node that has seen nothing yet: any finite reference gives it weights of exactly 0.
        reference = tl.where(raised == float("-inf"), 0.0, raised)
        share = tl.exp2(scores - reference[:, None])
        fade = tl.exp2(highest - reference)
        weight = weight * fade + tl.sum(share, 1)
        v = tl.load(values + offset[:, None] + channel[None, :], mask=inside[:, None] & whole[None, :], other=0.0)
        mixed = dot(share.to(v.dtype), v, mixed * fade[:, None], WIDE)
        highest = raised

    line = (row * n + node) * (kv_heads * GROUP) + head
    kept = live[:, None] & whole[None, :]
    if WHOLE:
        # Rows of the tile without a node have no weights.
        result = mixed / tl.where(live, weight, 1.0)[:, None]
        tl.store(out + line[:, None] * SIZE + channel[None, :], result.to(out.dtype.element_ty), mask=kept)
    else:
        line = line * splits + part
        tl.store(partial + line[:, None] * SIZE + channel[None, :], mixed, mask=kept)
        tl.store(stats + line, highest, mask=live)
        tl.store(stats + total + line, weight, mask=live)


@triton.jit(do_not_specialize=("n", "splits", "split", "total"))
@no_type_check
def _combine(
    partial, stats, length, out, n, heads, splits, split, total, length_row,
    SIZE: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(0).to(tl.int64)
    node = (line // heads) % n
    used = tl.load(length + line // heads // n * length_row)
    # What stands past the node itself it does not see, and the programs there may have left nothing behind.
    count = tl.minimum((used + node) // split + 1, splits).to(tl.int32)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    whole = channel < SIZE
    highest = tl.full((), float("-inf"), tl.float32)
    weight = tl.full((), 0.0, tl.float32)
    mixed = tl.zeros((CHANNELS,), tl.float32)
    for first in range(0, count, BLOCK):
        part = first + tl.arange(0, BLOCK)
        there = part < count
        tops = tl.load(stats + line * splits + part, mask=there, other=float("-inf"))
        sums = tl.load(stats + total + line * splits + part, mask=there, other=0.0)
        pieces = tl.load(
            partial + (line * splits + part)[:, None] * SIZE + channel[None, :],
            mask=there[:, None] & whole[None, :], other=0.0,
        )  # fmt: skip
        raised = tl.maximum(highest, tl.max(tops, 0))
        reference = tl.where(raised == float("-inf"), 0.0, raised)
        share = tl.exp2(tops - reference)
        fade = tl.exp2(highest - reference)
        weight = weight * fade + tl.sum(share * sums, 0)
        mixed = mixed * fade + tl.sum(share[:, None] * pieces, 0)
        highest = raised
    tl.store(out + line * SIZE + channel, (mixed / weight).to(out.dtype.element_ty), mask=whole)

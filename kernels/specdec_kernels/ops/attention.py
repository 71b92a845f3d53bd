"""Attention of a few new nodes to a slot cache: every node sees its row's committed slots and its own ancestors.

Arguments that all implementations share: `query [b n heads d]`; `keys`, `values [b c kv_heads d]`, a layer's groups of
the cache, where the keys and values of the n new nodes already stand at slots `length .. length + n`; `length [b]`, on
the device, the slots of each row before those nodes. Query head i reads key head `i * kv_heads // heads`.

Trees: `ancestors [b n]` are 64-bit masks over the `width` slots that end with the new nodes (n <= width <= 64; more
than n when an earlier call wrote the first nodes of the tree): bit j of node i says that it sees slot
`length + n - width + j`. Slots before those are seen by all, and a node always sees itself. Without `ancestors` the
nodes are a chain: node i sees the slots up to `length + i`.

`extent`: no row has more slots in use after the append; a bound known to the host, default the capacity. What a node
does not see may hold anything, NaN included.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from specdec_kernels.arrays import iota

MAX_WIDTH = 64


def pack_ancestors(visible: Bool[Tensor, "b n w"]) -> Int[Tensor, "b n"]:
    """The bit masks `tree_attention` takes: bit j of node i is `visible[:, i, j]`. Raises `ValueError` past 64 bits."""
    width = visible.shape[2]
    if width > MAX_WIDTH:
        raise ValueError(f"a tree of {width} nodes has no bit mask; tree_attention takes up to {MAX_WIDTH}")
    # Distinct powers of two, so the sum is their union, and bit 63 wraps to the sign as it should.
    return (visible.long() << iota(width, visible.device)).sum(-1)


def unpack_ancestors(ancestors: Int[Tensor, "b n"], width: int) -> Bool[Tensor, "b n w"]:
    """The inverse of `pack_ancestors`."""
    return (ancestors[..., None] >> iota(width, ancestors.device) & 1).bool()


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
    """softmax(Q K^T / sqrt(d)) V over what each node sees; computed in float32, or in float64 for float64."""
    extent = min(keys.shape[1], extent or keys.shape[1])
    width = query.shape[1] if width is None else width
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    group = query.shape[2] // keys.shape[2]
    seen = visible_slots(length, query.shape[1], extent, ancestors, width)[:, None]
    used = (iota(extent, length.device) < (length + query.shape[1])[:, None])[:, :, None, None]
    q = query.to(wide).transpose(1, 2)
    # Zeros where nothing was written: a weight of 0 does not silence a NaN.
    k, v = (
        torch.where(used, slots[:, :extent], 0).to(wide).transpose(1, 2).repeat_interleave(group, 1)
        for slots in (keys, values)
    )
    scores = (q @ k.transpose(2, 3) * query.shape[3] ** -0.5).masked_fill(~seen, float("-inf"))
    mixed: Tensor = scores.softmax(-1) @ v
    return mixed.transpose(1, 2).to(query.dtype).contiguous()


def visible_slots(
    length: Int[Tensor, " b"], n: int, extent: int, ancestors: Int[Tensor, "b n"] | None, width: int
) -> Bool[Tensor, "b n s"]:
    """Which of the first `extent` slots each node sees."""
    slot = iota(extent, length.device)
    own = length[:, None] + iota(n, length.device)
    if ancestors is None:
        return slot <= own[:, :, None]
    offset = (slot - (length[:, None] + (n - width)))[:, None, :]
    inside = (offset >= 0) & (offset < width)
    named = (ancestors[:, :, None] >> offset.clamp(0, MAX_WIDTH - 1) & 1).bool()
    return torch.where(inside, named, offset < 0) | (slot == own[:, :, None])

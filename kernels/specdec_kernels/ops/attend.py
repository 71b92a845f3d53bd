"""What stands between two products of a layer: rotation, cache write and attention of a few new nodes.

The arguments are those of `fused.rope_write` and `attention.tree_attention`; the new nodes of a row go to the slots
`length .. length + n`.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from specdec_kernels.arrays import iota
from specdec_kernels.ops.attention import tree_attention
from specdec_kernels.ops.fused import rope_write


def attend(
    heads: Float[Tensor, "b n all_heads d"],
    rotation: Float[Tensor, "b n half_d 2"],
    keys: Float[Tensor, "b c kv_heads d"],
    values: Float[Tensor, "b c kv_heads d"],
    length: Int[Tensor, " b"],
    ancestors: Int[Tensor, "b n"] | None = None,
    *,
    head_norm: Float[Tensor, "turning d"] | None = None,
    eps: float = 0.0,
    width: int | None = None,
    extent: int | None = None,
) -> Float[Tensor, "b n heads d"]:
    """`tree_attention` of the queries that `rope_write` returns, over the cache that it writes to."""
    slots = length[:, None] + iota(heads.shape[1], length.device)
    query = rope_write(heads, rotation, slots, keys, values, head_norm, eps)
    mixed: torch.Tensor = tree_attention(query, keys, values, length, ancestors, width=width, extent=extent)
    return mixed


def pays(rows: int, n: int, capacity: int) -> bool:
    """Whether one launch beats those of `rope_write` and `tree_attention`, for so many rows, new nodes and slots of a
    row of the cache.

    Measured on an H100, 32 heads over 8 of 128 channels, microseconds: 8 to 13 for one row and node behind 512 slots,
    23 to 20 behind 4096, 107 to 81 behind 32768; 27 to 19 for 8 rows; 34 to 15 for 16 nodes. In forwards of 1B, 3B and
    8B behind 450 slots, up to 6 % less for 1 to 4 nodes, within 1 % for 5 to 8, and 1 to 9 % more for 9. The answer is
    the same for 1 to 8 nodes and for all that a cache holds, so that drafts are verified with the bits of decoding.
    """
    return rows == 1 and n <= 8 and capacity <= 2048

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

"""`tree_attention` by torch's FlexAttention, compiled on CUDA."""

from collections.abc import Callable
from functools import cache
from typing import Any, no_type_check

import torch
from jaxtyping import Float, Int
from torch import Tensor

from specdec_kernels.ops.attention import MAX_WIDTH


def refuse(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> str | None:
    """Why FlexAttention cannot run here, or `None`."""
    if device.type != "cuda":
        return f"is compiled for NVIDIA GPUs, not for {device.type}"
    if dtype == torch.float64:
        return "computes in float32 and narrower, not in float64"
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
    """See `attention.tree_attention`; what stands in unseen slots below `extent` must be finite."""
    n, extent = query.shape[1], min(keys.shape[1], extent or keys.shape[1])
    shift = n - (n if width is None else width)

    # Traced by the compiler, which knows no shape checks.
    @no_type_check
    def chain(score, row, head, node, slot):
        return torch.where(slot <= length[row] + node, score, -float("inf"))

    @no_type_check
    def tree(score, row, head, node, slot):
        bit = slot - (length[row] + shift)
        named = (ancestors[row, node] >> bit.clamp(0, MAX_WIDTH - 1) & 1) == 1
        seen = torch.where(bit < 0, True, named & (bit < n - shift)) | (slot == length[row] + node)
        return torch.where(seen, score, -float("inf"))

    mixed: Tensor = _attention(query.device.type)(
        query.transpose(1, 2),
        keys[:, :extent].transpose(1, 2),
        values[:, :extent].transpose(1, 2),
        score_mod=chain if ancestors is None else tree,
        enable_gqa=keys.shape[2] != query.shape[2],
    )
    return mixed.transpose(1, 2).contiguous()


@cache
def _attention(device: str) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    function: Callable[..., Any] = flex_attention
    return torch.compile(function, dynamic=False) if device == "cuda" else function

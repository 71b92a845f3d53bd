"""A linear layer together with what stands around it in a decoder layer."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from specdec_kernels.ops.fused import silu_mul


def product(
    x: Float[Tensor, "*rows into"],
    weight: Float[Tensor, "out into"],
    bias: Float[Tensor, " out"] | None = None,
    *,
    norm: Float[Tensor, " into"] | None = None,
    eps: float = 0.0,
    gated: bool = False,
    residual: Float[Tensor, "*rows made"] | None = None,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "*rows made"]:
    """`rms_norm(x) W^T + bias`, then silu(gate) * up of its halves, then `residual` added: each part where asked for.

    `norm`: weights of the norm, with its `eps`. `gated`: the rows of `weight` are gate, then up, and half as many
    channels come out. `dtype` of the result, default that of `x`.
    """
    if norm is not None:
        x = functional.rms_norm(x, norm.shape, norm, eps)
    made = functional.linear(x, weight, bias)
    if gated:
        made = silu_mul(made)
    if residual is not None:
        made = residual + made
    return made if dtype is None else made.to(dtype)

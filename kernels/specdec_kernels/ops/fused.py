"""The operations between the matrix products of a Llama-like layer, each one pass over what it reads.

Arithmetic is float32 for what is narrower, and results are of the type of what came in. Channels of query and key
heads are ordered so that neighbours rotate together.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from specdec_kernels.arrays import iota


def rms_norm_residual(
    hidden: Float[Tensor, "*rows h"],
    delta: Float[Tensor, "*rows h"] | None,
    weight: Float[Tensor, " h"],
    eps: float,
) -> tuple[Float[Tensor, "*rows h"], Float[Tensor, "*rows h"]]:
    """`(hidden + delta, rms_norm(hidden + delta) * weight)`; without `delta` the first is `hidden` itself."""
    total = hidden if delta is None else hidden + delta
    return total, functional.rms_norm(total, weight.shape, weight, eps)


def silu_mul(inner: Float[Tensor, "*rows two_h"]) -> Float[Tensor, "*rows h"]:
    """silu(gate) * up of a row that holds gate, then up."""
    gate, up = inner.chunk(2, -1)
    return functional.silu(gate) * up


def rope_write(
    heads: Float[Tensor, "b n all_heads d"],
    rotation: Float[Tensor, "b n half_d 2"],
    slots: Int[Tensor, "b n"],
    keys: Float[Tensor, "b c kv_heads d"],
    values: Float[Tensor, "b c kv_heads d"],
    head_norm: Float[Tensor, "turning d"] | None = None,
    eps: float = 0.0,
) -> Float[Tensor, "b n heads d"]:
    """Rotate queries and keys, write keys and values to the cache, return the queries.

    `heads`: query, key and value heads in that order. `rotation`: cosine and sine for each pair of channels. `slots`:
    where each node goes in `keys` and `values`, a layer's groups of the cache. `head_norm`: RMSNorm weights of query
    and key heads, applied before the rotation (Qwen3).
    """
    kv_heads = keys.shape[2]
    queries = heads.shape[2] - 2 * kv_heads
    turning = heads[:, :, : queries + kv_heads]
    wide = turning if turning.dtype == torch.float64 else turning.float()
    if head_norm is not None:
        wide = functional.rms_norm(wide, wide.shape[-1:], None, eps) * head_norm.to(wide.dtype)
    pairs = torch.view_as_complex(wide.reshape(*wide.shape[:-1], -1, 2))
    turn = torch.view_as_complex(rotation.to(wide.dtype).contiguous())[:, :, None]
    turned = torch.view_as_real(pairs * turn).flatten(-2).to(heads.dtype)
    rows = iota(heads.shape[0], heads.device)[:, None]
    keys[rows, slots] = turned[:, :, queries:]
    values[rows, slots] = heads[:, :, queries + kv_heads :]
    return turned[:, :, :queries].contiguous()

"""Constant index arrays, made once: a round needs the same few again and again, and never writes to them."""

from functools import cache

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from specdec_kernels.arrays import iota

__all__ = ["chain_parents", "iota", "lone_roots", "zeros"]


@cache
def chain_parents(n: int, device: torch.device) -> Int[Tensor, "1 n"]:
    """-1, 0, ..., n - 2: the parents of a chain, as a row to be expanded over the batch. Read it only."""
    with torch.inference_mode(False):
        return torch.arange(-1, n - 1, device=device)[None]


@cache
def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Shaped[Tensor, "..."]:
    """Zeros, or `False`. Read them only."""
    with torch.inference_mode(False):
        return torch.zeros((), dtype=dtype, device=device).expand(shape)


@cache
def lone_roots(rows: int, device: torch.device) -> tuple[Int[Tensor, "b 1"], Bool[Tensor, "b 1"], Bool[Tensor, "b 1"]]:
    """`parents`, `valid` and `sampled` of trees that are a root alone. Read them only."""
    nothing = zeros((rows, 1), torch.bool, device)
    return chain_parents(1, device).expand(rows, 1), ~nothing, nothing

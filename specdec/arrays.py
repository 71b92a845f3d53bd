"""Constant index arrays, made once: a round needs the same few again and again, and never writes to them."""

from functools import cache

import torch
from jaxtyping import Int
from torch import Tensor

from specdec_kernels.arrays import iota

__all__ = ["chain_parents", "iota"]


@cache
def chain_parents(n: int, device: torch.device) -> Int[Tensor, "1 n"]:
    """-1, 0, ..., n - 2: the parents of a chain, as a row to be expanded over the batch. Read it only."""
    with torch.inference_mode(False):
        return torch.arange(-1, n - 1, device=device)[None]

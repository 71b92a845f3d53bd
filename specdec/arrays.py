"""Constant index arrays, made once: a round needs the same few again and again, and never writes to them."""

from functools import lru_cache

import torch
from jaxtyping import Int
from torch import Tensor


@lru_cache(maxsize=256)
def iota(n: int, device: torch.device) -> Int[Tensor, " n"]:
    """0, 1, ..., n - 1. Shared by all callers: read it only."""
    # A tensor first asked for under inference mode would be refused by autograd ever after.
    with torch.inference_mode(False):
        return torch.arange(n, device=device)


@lru_cache(maxsize=256)
def chain_parents(n: int, device: torch.device) -> Int[Tensor, "1 n"]:
    """-1, 0, ..., n - 2: the parents of a chain, as a row to be expanded over the batch. Read it only."""
    with torch.inference_mode(False):
        return torch.arange(-1, n - 1, device=device)[None]

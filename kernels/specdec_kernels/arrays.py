"""Constant index arrays, made once: a round needs the same few again and again, and never writes to them.

They are never given up: a captured graph goes on reading the memory that it was recorded with.
"""

from functools import cache

import torch
from jaxtyping import Int
from torch import Tensor


@cache
def iota(n: int, device: torch.device) -> Int[Tensor, " n"]:
    """0, 1, ..., n - 1. Shared by all callers: read it only."""
    # A tensor first asked for under inference mode would be refused by autograd ever after.
    with torch.inference_mode(False):
        return torch.arange(n, device=device)

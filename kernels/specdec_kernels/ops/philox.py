"""Counter-based randomness: Philox4x32-10 (Salmon et al., SC 2011, "Parallel random numbers: as easy as 1, 2, 3").

A draw is a pure function of a row's seed and of four counter words, so it is the same whatever else is drawn with it
and on whatever device. The words are 32-bit numbers in int64 tensors: not every device has unsigned ones.
"""

from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
# The fourth counter word of what a verification draws; `specdec.rng.Purpose` lists all of them.
ACCEPT, TOKEN, COUPLED = 2, 3, 4


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: Int[Tensor, " b"]) -> tuple[Tensor, ...]:
    """Philox4x32-10 over broadcast int64 counters with rows first; returns four tensors of 32-bit words."""
    c0, c1, c2, c3 = counter
    rows = (-1,) + (1,) * (max(word.dim() for word in counter) - 1)
    k0, k1 = (seed & MASK).view(rows), ((seed >> 32) & MASK).view(rows)
    for _ in range(10):
        # The product of two 32-bit words wraps in int64, which leaves all 64 bits right; the mask undoes the sign.
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        high0, high1 = (product0 >> 32) & MASK, (product1 >> 32) & MASK
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, product1 & MASK, high0 ^ c3 ^ k1, product0 & MASK
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return c0, c1, c2, c3


def uniforms(
    seed: Int[Tensor, " #b"], round: Int[Tensor, " #b"], purpose: int, n: int, last: int | None = None
) -> Float[Tensor, "b m"]:
    """One uniform in [0, 1) per node of a round, with 53 random bits (24 on MPS); one seed may serve all rows.

    Node i takes the first two words of the counter (0, i, round, purpose). `last`: with it there is one more column,
    node 0 of that purpose.
    """
    zero, node, purposes = _streams(purpose, n, last, seed.device)
    first, second, _, _ = philox((zero, node, round[:, None], purposes), seed)
    if seed.device.type == "mps":
        return (first >> 8).to(torch.float32) * 2.0**-24
    return ((first >> 5) * 2**26 + (second >> 6)).to(torch.float64) * 2.0**-53


@cache
def _streams(purpose: int, n: int, last: int | None, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Zeros, nodes and purposes of the columns of `uniforms`, as rows to be broadcast over the batch. Read them only.
    They are made once, as `arrays.iota` is, for the same reasons."""
    with torch.inference_mode(False):
        column = torch.arange(n + (last is not None), device=device)[None]
        behind = column >= n
        purposes = torch.where(behind, last or 0, torch.full_like(column, purpose))
        return torch.zeros_like(column), torch.where(behind, 0, column), purposes


def gumbel(seed: Int[Tensor, " b"], position: Int[Tensor, "b n"], vocab_size: int) -> Float[Tensor, "b n v"]:
    """Standard Gumbel noise -log(-log(u)) for each token at absolute positions.

    Token t takes word t % 4 of the counter (t // 4, 0, position, 4) and u = (word + 1/2) / 2**32, in float64 (float32
    on MPS).
    """
    lane = torch.arange((vocab_size + 3) // 4, device=seed.device)[None, None, :]
    zero = torch.zeros_like(lane)
    words = philox((lane, zero, position[:, :, None], zero + COUPLED), seed)
    wide = torch.float32 if seed.device.type == "mps" else torch.float64
    unit = (torch.stack(words, dim=-1).flatten(2)[..., :vocab_size].to(wide) + 0.5) / 2**32
    return -torch.log(-torch.log(unit))

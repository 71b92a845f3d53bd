"""Counter-based randomness: a draw is a pure function of the row's seed and of what it is for.

The generator is `specdec_kernels.ops.philox`. The key is the row's 64-bit seed; the four counter words are (lane, node,
round, purpose), as fields and not a hash, so no two streams collide.
Draws are numbered by round, not by position: block verification looks ahead, and reusing a position's uniforms in
the next round would bias it. Only Gumbel coupling wants noise by position, and has a purpose of its own.
"""

from enum import IntEnum

import torch
from jaxtyping import Float, Int
from torch import Tensor

from specdec.records import record
from specdec_kernels.dispatch import resolve
from specdec_kernels.ops.philox import ACCEPT, COUPLED, TOKEN


class Purpose(IntEnum):
    """What a draw is for: the fourth counter word."""

    DRAFT = 1
    ACCEPT = ACCEPT
    TOKEN = TOKEN
    COUPLED = COUPLED


@record
class Key:
    """The randomness of each row: `seed [b]`, 64 bits. Subclasses may supply uniforms of their own (see `testing`)."""

    seed: Int[Tensor, " b"]

    def uniforms(self, round: Int[Tensor, " b"], purpose: Purpose, n: int) -> Float[Tensor, "b n"]:
        """One uniform in [0, 1) per node, with 53 random bits (24 where the device has no float64)."""
        return self._made(round, purpose, n)

    def verification(self, round: Int[Tensor, " b"], n: int) -> tuple[Float[Tensor, "b n"], Float[Tensor, " b"]]:
        """The uniforms of `Purpose.ACCEPT` for `n` nodes and of `Purpose.TOKEN`, in one launch."""
        made = self._made(round, Purpose.ACCEPT, n, Purpose.TOKEN)
        return made[:, :n], made[:, n]

    def _made(self, round: Tensor, *what: int) -> Tensor:
        made: Tensor = resolve("uniforms", self.seed.device, torch.int64)(self.seed, round, *what)
        return made

    def gumbels(self, position: Int[Tensor, "b n"], vocab_size: int) -> Float[Tensor, "b n v"]:
        """Standard Gumbel noise for each token at absolute positions: the same for every drafter, k and batch."""
        noise: Tensor = resolve("gumbel", self.seed.device, torch.int64)(self.seed, position, vocab_size)
        return noise


def seeded(seed: int, rows: int, device: torch.device | str = "cpu") -> Key:
    """A key for `rows` rows, row r seeded with `seed + r` (modulo 2**63)."""
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    return Key(torch.tensor([(seed + row) % 2**63 for row in range(rows)], dtype=torch.int64, device=device))


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: Int[Tensor, " b"]) -> tuple[Tensor, ...]:
    """Philox4x32-10 over broadcast int64 counters with rows first; returns four tensors of 32-bit words."""
    words: tuple[Tensor, ...] = resolve("philox", seed.device, torch.int64)(counter, seed)
    return words

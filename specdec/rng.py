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
from specdec_kernels.ops.philox import COUPLED


class Purpose(IntEnum):
    """What a draw is for: the fourth counter word."""

    DRAFT = 1
    ACCEPT = 2
    TOKEN = 3
    COUPLED = COUPLED


@record
class Key:
    """The randomness of each row: `seed [b]`, 64 bits. Subclasses may supply uniforms of their own (see `testing`)."""

    seed: Int[Tensor, " b"]

    def uniforms(self, round: Int[Tensor, " b"], purpose: Purpose, n: int) -> Float[Tensor, "b n"]:
        """One uniform in [0, 1) per node, with 53 random bits (24 where the device has no float64)."""
        node = torch.arange(n, device=self.seed.device)[None, :]
        words = philox((torch.zeros_like(node), node, round[:, None], torch.full_like(node, purpose)), self.seed)
        return _unit(words)

    def verification(self, round: Int[Tensor, " b"], n: int) -> tuple[Float[Tensor, "b n"], Float[Tensor, " b"]]:
        """The uniforms of `Purpose.ACCEPT` for `n` nodes and of `Purpose.TOKEN`, in one launch."""
        node = torch.arange(n + 1, device=self.seed.device)[None, :]
        last = node == n
        purpose = torch.where(last, int(Purpose.TOKEN), int(Purpose.ACCEPT))
        words = philox((torch.zeros_like(node), torch.where(last, 0, node), round[:, None], purpose), self.seed)
        unit = _unit(words)
        return unit[:, :n], unit[:, n]

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


def _unit(words: tuple[Tensor, ...]) -> Tensor:
    if words[0].device.type == "mps":
        return (words[0] >> 8).to(torch.float32) * 2.0**-24
    return ((words[0] >> 5) * 2**26 + (words[1] >> 6)).to(torch.float64) * 2.0**-53

"""Acceptance on order: a target that writes a given text, and drafters that guess it right as often as asked.

Models with random weights run as fast as trained ones and agree with nobody. To measure what a given acceptance is
worth, the target is steered to a text of our choice (`steer`), and each place of the text is guessed right or wrong
once and for all (`guesses`): with probability `rate`, independently, so a chain of k drafts has on average
rate + rate^2 + ... + rate^k of them accepted. Rounding cannot change what is accepted, which it does when a model with
flat random logits is to repeat in a forward of n tokens what it said in forwards of one.
"""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from specdec import tree
from specdec.arrays import iota
from specdec.cache import KVCache
from specdec.drafters.common import last_token, unchanged
from specdec.records import record
from specdec.rng import Purpose, seeded
from specdec.sampling import Sampling
from specdec.types import DecodeState, Drafter, Model, Plan, Proposal

# Above every logit of a random model, and exact in bfloat16.
_PUSH = 16384.0


@record
class GuessState:
    """`guess`: the token the drafter proposes for each place of a row."""

    guess: Int[Tensor, "b t"]


def random_text(rows: int, length: int, vocab_size: int, seed: int = 0) -> Int[Tensor, "b t"]:
    """Tokens without a pattern."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (rows, length), generator=generator)


def guesses(text: Int[Tensor, "b t"], rate: float, vocab_size: int, seed: int = 0) -> Int[Tensor, "b t"]:
    """`text` with each token replaced by another one with probability 1 - `rate`; the coins are Philox draws."""
    if not 0 <= rate <= 1:
        raise ValueError(f"rate must be in [0, 1], got {rate}")
    rows, length = text.shape
    coin = seeded(seed, rows, text.device).uniforms(torch.zeros_like(text[:, 0]), Purpose.DRAFT, length)
    return torch.where(coin < rate, text, (text + 1) % vocab_size)


def steer(model: Model, text: Int[Tensor, "b t"]) -> Model:
    """`model`, whose most likely token at place i of a row is always `text[:, i]`; every forward costs what it did.

    `text` must reach past the last place that a draft can have.
    """

    def forward(
        cache: KVCache,
        tokens: Tensor,
        depth: Tensor | None = None,
        visible: Tensor | None = None,
        *,
        logits: bool = True,
        features: bool = False,
    ) -> tuple[Tensor | None, Tensor | None, KVCache]:
        offset = iota(tokens.shape[1], tokens.device) if depth is None else depth
        place = cache.length[:, None] + offset + 1
        scores, hidden, after = model.forward(cache, tokens, depth, visible, logits=logits, features=features)
        if scores is not None:
            scores = scores.scatter(2, text.gather(1, place)[:, :, None], _PUSH)
        return scores, hidden, after

    return model._replace(forward=forward, early_exit=None)


def guessing(guess: Int[Tensor, "b t"]) -> Drafter:
    """A drafter that costs nothing and proposes `guess` at the places of the draft."""

    def init(tokens: Tensor, length: Tensor, capacity: int) -> GuessState:
        return GuessState(guess)

    def propose(state: DecodeState[Any, Any], plan: Plan, sampling: Sampling) -> tuple[Proposal, GuessState, int]:
        if plan.max_depth == 0:
            return tree.root_only(last_token(state)), state.drafter, 0
        place = state.length[:, None] + iota(plan.max_depth, state.length.device)
        drafts = state.drafter.guess.gather(1, place)
        return tree.chain(last_token(state), drafts, plan.depth), state.drafter, 0

    return Drafter("guessing", init, propose, unchanged, chain=True, max_nodes=lambda depth: 1 + depth, capturable=True)


def rate_for(mean_length: float, depth: int) -> float:
    """The rate at which rounds of `depth` drafts commit `mean_length` tokens on average, by bisection."""
    if not 1 <= mean_length <= depth + 1:
        raise ValueError(f"a round of {depth} drafts commits 1 to {depth + 1} tokens, got {mean_length}")
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if expected_length(middle, depth) < mean_length else (low, middle)
    return (low + high) / 2


def expected_length(rate: float, depth: int) -> float:
    """1 + rate + ... + rate^depth: the tokens that a round of `depth` drafts commits on average."""
    return sum(rate**place for place in range(depth + 1))

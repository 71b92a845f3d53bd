"""Where two outputs of one model part, and whether rounding explains it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from specdec.sampling import Sampling, penalize, seen_tokens
from specdec.state import prefill
from specdec.types import Model

# A forward over many tokens and one over a single token round differently. Ten times the difference measured at the
# very place leaves room for the other shapes in which a round may have computed it.
NOISE_FACTOR = 10.0


class Divergence(NamedTuple):
    """`position`: index of the new token. `token`, `other`: both outputs' tokens there, `None` past an end. `margin`:
    distance of the target's two largest logits. `noise`: the largest difference between the logits there computed in
    one forward and token by token. `numerics`: the margin is within `NOISE_FACTOR` times the noise, so that neither
    token is wrong; otherwise it is a bug."""

    position: int
    token: int | None
    other: int | None
    margin: float
    noise: float
    numerics: bool

    def __str__(self) -> str:
        kind = "numerics" if self.numerics else "a bug"
        return (
            f"outputs part at new token {self.position} ({self.token} against {self.other}): {kind}, the two largest "
            f"logits are {self.margin:.3g} apart and rounding moves them by {self.noise:.3g}"
        )


def first_divergence(
    model: Model,
    prompt: Sequence[int],
    tokens: Sequence[int],
    other: Sequence[int],
    sampling: Sampling | None = None,
) -> Divergence | None:
    """The first place where two greedy outputs after `prompt` differ, or `None` when they are identical."""
    if list(tokens) == list(other):
        return None
    pairs = zip(tokens, other, strict=False)
    at = next((index for index, (one, two) in enumerate(pairs) if one != two), min(len(tokens), len(other)))
    text = [*prompt, *tokens[:at]]
    together, alone = (
        _last_logits(model, text, sampling, window=len(text)),
        _last_logits(model, text, sampling, window=1),
    )
    noise = float((together - alone).abs().nan_to_num(0).max())
    best = alone.topk(2).values
    margin = float(best[0] - best[1])
    here, there = (row[at] if at < len(row) else None for row in (tokens, other))
    # An output that ends early has not chosen another token.
    explained = here is not None and there is not None and margin <= NOISE_FACTOR * noise
    return Divergence(at, here, there, margin, noise, explained)


def _last_logits(model: Model, text: list[int], sampling: Sampling | None, *, window: int) -> Tensor:
    """Logits after `text`, its last `window` tokens scored in one forward."""
    tokens = torch.tensor([text], device=model.device)
    length = torch.tensor([len(text)], device=model.device)
    cache, _ = prefill(model, tokens, length - window, len(text) + 1)
    logits, _, _ = model.forward(cache, tokens[:, len(text) - window :])
    assert logits is not None
    last = logits[:, -1]
    if sampling is not None and sampling.repetition_penalty != 1:
        last = penalize(last, seen_tokens(tokens, length, model.vocab_size), sampling)
    return last[0]

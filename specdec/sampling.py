"""From logits to laws, and from laws to tokens.

The transforms run in the order of Hugging Face's processors: repetition penalty, temperature, top-k, top-p, min-p.
Target and draft go through the same transforms, which is what makes verification exact.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from specdec.records import register


@register
@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. `temperature` 0 means the most likely token; 0 and 1 switch the others off.

    `top_k`: keep the k largest logits (ties with the k-th stay). `top_p`: keep the smallest set of mass >= top_p.
    `min_p`: keep tokens of at least `min_p` times the largest probability. `repetition_penalty`: divide positive and
    multiply negative logits of tokens that stand in the prefix (Keskar et al., arXiv:1909.05858).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        bounds = {
            "temperature": (self.temperature >= 0 and math.isfinite(self.temperature), "a finite number >= 0"),
            "top_k": (self.top_k >= 0, "an integer >= 0 (0: off)"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1] (1: off)"),
            "min_p": (0 <= self.min_p < 1, "in [0, 1) (0: off)"),
            "repetition_penalty": (
                self.repetition_penalty > 0 and math.isfinite(self.repetition_penalty),
                "a finite number > 0 (1: off)",
            ),
        }
        for name, (fine, expected) in bounds.items():
            if not fine:
                raise ValueError(f"{name} must be {expected}, got {getattr(self, name)}")


def warp(logits: Float[Tensor, "*rows v"], sampling: Sampling) -> Float[Tensor, "*rows v"]:
    """The law after temperature, top-k, top-p and min-p, in float32 or wider.

    At temperature 0 it is one at the first largest logit. Ties at top-p's edge go to the lower token id.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if sampling.temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        smallest = logits.topk(sampling.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = torch.sort(logits, dim=-1, descending=True, stable=True)
        mass = torch.softmax(ordered, dim=-1)
        above = mass.cumsum(-1) - mass
        dropped = above >= sampling.top_p
        dropped[..., 0] = False
        logits = logits.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), -torch.inf)
    probs = torch.softmax(logits, dim=-1)
    if sampling.min_p > 0:
        probs = probs * (probs >= sampling.min_p * probs.amax(-1, keepdim=True))
        probs = probs / probs.sum(-1, keepdim=True)
    return probs


def sample(weights: Float[Tensor, "b v"], uniform: Float[Tensor, " b"]) -> Int[Tensor, " b"]:
    """Inverse-CDF draw from rows of non-negative weights, which need not sum to one.

    Counts the tokens whose cumulative weight is at most `uniform * total` and stops at the last token of positive
    weight. Accumulates in float64 where the device has it: with 10^5 tokens a float32 sum loses three digits.
    """
    wide = weights if weights.device.type == "mps" else weights.double()
    cumulative = wide.cumsum(-1)
    total = cumulative[:, -1:]
    last = (cumulative < total).sum(-1)
    return torch.minimum((cumulative <= uniform[:, None] * total).sum(-1), last)


def residual(p: Float[Tensor, "b v"], q: Float[Tensor, "b v"]) -> Float[Tensor, "b v"]:
    """norm((p - q)+), the law of the correction after a rejection (Leviathan et al., arXiv:2211.17192, Alg. 1).

    Where no positive mass is left, a rejection has probability zero up to rounding, and `p` itself is returned.
    """
    rest = (p - q).clamp_min(0)
    mass = rest.sum(-1, keepdim=True)
    return torch.where(mass > 0, rest / mass.clamp_min(torch.finfo(rest.dtype).tiny), p)


def seen_tokens(tokens: Int[Tensor, "b t"], length: Int[Tensor, " b"], vocab_size: int) -> Bool[Tensor, "b v"]:
    """Which tokens occur among the first `length` of each row."""
    live = torch.arange(tokens.shape[1], device=tokens.device) < length[:, None]
    # Dead entries all point at the first token, which is always live.
    index = torch.where(live, tokens, tokens[:, :1])
    seen = torch.zeros(tokens.shape[0], vocab_size, dtype=torch.bool, device=tokens.device)
    return seen.scatter(1, index, True)


def penalize(
    logits: Float[Tensor, "*rows v"], seen: Bool[Tensor, "*rows v"], sampling: Sampling
) -> Float[Tensor, "*rows v"]:
    """Apply the repetition penalty for the tokens marked in `seen`."""
    penalized = torch.where(logits < 0, logits * sampling.repetition_penalty, logits / sampling.repetition_penalty)
    return torch.where(seen, penalized, logits)

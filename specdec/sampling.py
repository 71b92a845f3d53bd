"""From logits to laws, and from laws to tokens, over `specdec_kernels.ops.law`.

The transforms run in the order of Hugging Face's processors: repetition penalty, temperature, top-k, top-p, min-p.
Target and draft go through the same transforms, which is what makes verification exact.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from specdec.records import register
from specdec_kernels.dispatch import resolve
from specdec_kernels.ops.law import residual, sample

__all__ = ["Sampling", "penalize", "residual", "sample", "seen_tokens", "warp"]


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

    @property
    def transforms(self) -> dict[str, Any]:
        """What turns logits into a law once the penalty is applied: the options of `specdec_kernels.ops.law.warp`."""
        return {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p, "min_p": self.min_p}


def warp(logits: Float[Tensor, "*rows v"], sampling: Sampling) -> Float[Tensor, "*rows v"]:
    """The law after temperature, top-k, top-p and min-p, in float32 or wider.

    At temperature 0 it is one at the first largest logit. Ties at top-p's edge go to the lower token id.
    """
    law: Tensor = resolve("warp", logits.device, logits.dtype)(logits, **sampling.transforms)
    return law


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

"""From logits to laws, and from laws to tokens.

The transforms run in the order of Hugging Face's processors: temperature, top-k, top-p, min-p.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def warp(
    logits: Float[Tensor, "*rows v"], *, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Float[Tensor, "*rows v"]:
    """The law after temperature, top-k, top-p and min-p, in float32 or wider.

    `top_k`: keep the k largest logits (ties with the k-th stay; 0: off). `top_p`: keep the smallest set of mass
    >= top_p; ties at its edge go to the lower token id (1: off). `min_p`: keep tokens of at least `min_p` times the
    largest probability (0: off). At temperature 0 the law is one at the first largest logit.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        smallest = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p < 1:
        ordered, order = torch.sort(logits, dim=-1, descending=True, stable=True)
        mass = torch.softmax(ordered, dim=-1)
        above = mass.cumsum(-1) - mass
        dropped = above >= top_p
        dropped[..., 0] = False
        logits = logits.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), -torch.inf)
    probs = torch.softmax(logits, dim=-1)
    if min_p > 0:
        probs = probs * (probs >= min_p * probs.amax(-1, keepdim=True))
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

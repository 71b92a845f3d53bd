"""Verification rules on plain tensors: which nodes of a draft tree are kept, and the one token that follows them.

Arguments that several rules share: `logits [b n v]`, row i being the target's law after node i before temperature;
`tokens`, `parents` (-1 at the root, smaller than the node's own index elsewhere) and `valid` of the tree's nodes;
`sampled`: nodes drawn from their parent's row of `draft_probs` (the others are point masses); `chain`: every row is a
chain; `accept [b n]` and `token [b]`: uniforms in [0, 1), or `seed` and `round` of each row, from which they are made
as `coins` makes them; and the settings of `law.warp`. Token ids and parents may be int32 or int64; what is returned is
int64.

A NaN among logits counts as the largest, as in `torch.argmax`. A row whose token was chosen from NaN logits names a
token of the vocabulary all the same; the caller sees it by looking at the logits of the path's last node.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from specdec_kernels.ops.law import residual, sample, warp
from specdec_kernels.ops.philox import ACCEPT, TOKEN, gumbel, uniforms
from specdec_kernels.ops.walk import Verification, follow, pack_path

NO_COINS = "needs accept and token, or seed and round to make them from; got neither"
NO_NOISE = "needs the noise, or seed and position to make it from; got neither"


def verify_greedy(
    logits: Float[Tensor, "b n v"],
    tokens: Int[Tensor, "b n"],
    parents: Int[Tensor, "b n"],
    valid: Bool[Tensor, "b n"],
    *,
    chain: bool = False,
) -> Verification:
    """Keep a draft while it is the most likely token; ties go to the lowest id."""
    return follow(logits.argmax(-1), tokens, parents, valid, chain=chain)


def verify_match(
    logits: Float[Tensor, "b n v"],
    tokens: Int[Tensor, "b n"],
    parents: Int[Tensor, "b n"],
    valid: Bool[Tensor, "b n"],
    accept: Float[Tensor, "b n"] | None = None,
    *,
    seed: Int[Tensor, " b"] | None = None,
    round: Int[Tensor, " b"] | None = None,
    chain: bool = False,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Verification:
    """Sample the target at every node with the node's uniform, keep a draft if it is the sampled token."""
    p = warp(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    if accept is None:
        accept, _ = coins("verify_match", None, None, seed, round, tokens.shape[1])
    choice = sample(p.flatten(0, 1), accept.flatten()).view_as(tokens)
    return follow(choice, tokens, parents, valid, chain=chain)


def verify_coupled(
    logits: Float[Tensor, "b n v"],
    tokens: Int[Tensor, "b n"],
    parents: Int[Tensor, "b n"],
    valid: Bool[Tensor, "b n"],
    noise: Float[Tensor, "b n v"] | None = None,
    *,
    seed: Int[Tensor, " b"] | None = None,
    position: Int[Tensor, "b n"] | None = None,
    chain: bool = False,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Verification:
    """Choose argmax(log p + Gumbel noise) at every node (Daliri et al., arXiv:2408.07978), keep a draft that is it.

    The noise is given, or made from `seed` and each node's `position` as `philox.gumbel` makes it.
    """
    if noise is None:
        if seed is None or position is None:
            raise ValueError(f"verify_coupled {NO_NOISE}")
        noise = gumbel(seed, position, logits.shape[-1])
    p = warp(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    return follow((p.log() + noise).argmax(-1), tokens, parents, valid, chain=chain)


def verify_lossless(
    logits: Float[Tensor, "b n v"],
    tokens: Int[Tensor, "b n"],
    parents: Int[Tensor, "b n"],
    valid: Bool[Tensor, "b n"],
    sampled: Bool[Tensor, "b n"],
    draft_probs: Float[Tensor, "b n v"] | None,
    accept: Float[Tensor, "b n"] | None = None,
    token: Float[Tensor, " b"] | None = None,
    *,
    seed: Int[Tensor, " b"] | None = None,
    round: Int[Tensor, " b"] | None = None,
    replacement: bool = True,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Verification:
    """Accept a draft with probability min(1, p/q), correct a rejection from the residual law (see `policies.lossless`).

    Siblings are tried in index order; after each rejection p becomes norm((p - q)+). `replacement=False`: sampled
    siblings were drawn without replacement, and q loses the rejected token.
    """
    accept, token = coins("verify_lossless", accept, token, seed, round, tokens.shape[1])
    rows = torch.arange(tokens.shape[0], device=tokens.device)
    tokens = tokens.long()
    law = warp(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    p = law[:, 0]
    node = torch.zeros_like(rows)
    struck = torch.zeros_like(p, dtype=torch.bool)
    accepted = torch.zeros_like(valid)
    accept_prob = torch.zeros(tokens.shape, dtype=p.dtype, device=p.device)
    wide = torch.float32 if p.device.type == "mps" else torch.float64
    for i in range(1, tokens.shape[1]):
        drafted = tokens[:, i, None]
        tried = valid[:, i] & (parents[:, i] == node)
        q = child_law(tokens, sampled, draft_probs, node, i, p)
        if not replacement:
            # Only sampled siblings draw from q without its earlier tokens; a point mass is what it is.
            left = q.masked_fill(struck & sampled[:, i, None], 0)
            mass = left.sum(-1, keepdim=True)
            q = torch.where(mass > 0, left / mass.clamp_min(torch.finfo(p.dtype).tiny), q)
        p_token, q_token = p.gather(1, drafted)[:, 0].to(wide), q.gather(1, drafted)[:, 0].to(wide)
        # Strict, so that a token the target excludes is rejected even for a uniform of 0.
        taken = tried & (accept[:, i] * q_token < p_token)
        probability = (p_token / q_token.clamp_min(torch.finfo(p.dtype).tiny)).clamp_max(1)
        accept_prob[:, i] = torch.where(tried, probability.to(p.dtype), 0)
        accepted[:, i] = taken
        rejected = tried & ~taken
        p = torch.where(taken[:, None], law[:, i], torch.where(rejected[:, None], residual(p, q), p))
        now = struck.scatter(1, drafted, True)
        drawn = (rejected & sampled[:, i])[:, None]
        struck = torch.where(taken[:, None], False, torch.where(drawn, now, struck))
        node = torch.where(taken, i, node)
    path, count = pack_path(accepted)
    return Verification(path, count, sample(p, token), accept_prob)


def verify_block(
    logits: Float[Tensor, "b n v"],
    tokens: Int[Tensor, "b n"],
    valid: Bool[Tensor, "b n"],
    sampled: Bool[Tensor, "b n"],
    draft_probs: Float[Tensor, "b n v"] | None,
    accept: Float[Tensor, "b n"] | None = None,
    token: Float[Tensor, " b"] | None = None,
    *,
    seed: Int[Tensor, " b"] | None = None,
    round: Int[Tensor, " b"] | None = None,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Verification:
    """Block verification of chains (Sun et al., arXiv:2403.10444, Alg. 2; see `policies.block`)."""
    n = tokens.shape[1]
    accept, token = coins("verify_block", accept, token, seed, round, n)
    rows = torch.arange(tokens.shape[0], device=tokens.device)
    tokens = tokens.long()
    law = warp(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    gamma = valid.sum(-1) - 1
    ratio = torch.ones_like(law[:, 0, 0], dtype=torch.float64 if law.device.type != "mps" else torch.float32)
    last, correction = torch.zeros_like(rows), law[:, 0]
    accept_prob = torch.zeros(tokens.shape, dtype=law.dtype, device=law.device)
    for i in range(n):
        p = law[:, i]
        is_end = gamma == i
        if i + 1 < n:
            q = child_law(tokens, sampled, draft_probs, torch.full_like(rows, i), i + 1, p)
            scaled = ratio[:, None] * p
            mass = (scaled - q).clamp_min(0).sum(-1)
            rest = mass + (1 - ratio)
            share = torch.where(rest > 0, mass / rest.clamp_min(torch.finfo(rest.dtype).tiny), 1.0)
            # Past its last draft a row has no next law; there h is r itself, and the correction is p.
            h = torch.where(is_end, ratio, share)
            here = torch.where(is_end[:, None], p, residual(scaled, q.to(scaled.dtype)).to(p.dtype))
            drafted = tokens[:, i + 1, None]
            p_token, q_token = p.gather(1, drafted)[:, 0], q.gather(1, drafted)[:, 0]
            step = p_token.to(ratio.dtype) / q_token.to(ratio.dtype).clamp_min(torch.finfo(p.dtype).tiny)
            following = (ratio * step).clamp_max(1)
        else:
            h, here, following = ratio, p, ratio
        exists = valid[:, i]
        # Every position draws its coin, also behind a failure. The root is accepted without one.
        taken = exists & (accept[:, i] < h) if i else exists
        last = torch.where(taken, i, last)
        correction = torch.where(taken[:, None], here, correction)
        if i:
            accept_prob[:, i] = torch.where(exists, h, 0).to(law.dtype)
        ratio = following
    index = torch.arange(1, n + 1, device=tokens.device)
    path = torch.where(index <= last[:, None], index, -1)
    return Verification(path, last, sample(correction, token), accept_prob)


def coins(
    rule: str,
    accept: Float[Tensor, "b n"] | None,
    token: Float[Tensor, " b"] | None,
    seed: Int[Tensor, " b"] | None,
    round: Int[Tensor, " b"] | None,
    n: int,
) -> tuple[Float[Tensor, "b n"], Float[Tensor, " b"]]:
    """The uniforms of a round's `n` nodes and of its token: those given, or those that `philox.uniforms` makes."""
    if accept is not None and token is not None:
        return accept, token
    if seed is None or round is None:
        raise ValueError(f"{rule} {NO_COINS}")
    made = uniforms(seed, round, ACCEPT, n, TOKEN)
    return made[:, :n], made[:, n]


def child_law(
    tokens: Int[Tensor, "b n"],
    sampled: Bool[Tensor, "b n"],
    draft_probs: Float[Tensor, "b n v"] | None,
    node: Int[Tensor, " b"],
    index: int,
    like: Float[Tensor, "b v"],
) -> Float[Tensor, "b v"]:
    """The law that node `index` was drawn from given its parent `node`: a draft row, or a point mass."""
    point = torch.zeros_like(like).scatter(1, tokens[:, index : index + 1], 1)
    if draft_probs is None:
        return point
    rows = torch.arange(len(node), device=node.device)
    drawn = draft_probs[rows, node].to(like.dtype)
    return torch.where(sampled[:, index, None], drawn, point)

"""Drafting with a model: a separate one with its own cache, or the target's own first layers over the target's."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from specdec import cache as kv
from specdec import tree
from specdec.arrays import iota
from specdec.cache import KVCache
from specdec.drafters.common import last_token, stateless, unchanged
from specdec.records import record
from specdec.rng import Purpose
from specdec.sampling import Sampling, penalize, sample, warp
from specdec.scoring import prefix_tokens
from specdec.state import prefill
from specdec.types import DecodeState, Drafter, Model, Plan, Proposal, StepInfo

Mode = Literal["sample", "greedy", "coupled"]
MODES = ("sample", "greedy", "coupled")


@record
class DraftState:
    """The draft model's `cache`, and the tree of this round as far as it stands in it: `tokens`, `parents`, `valid`
    of its first nodes, the root at slot `base`. Nothing drafted: no nodes."""

    cache: KVCache
    tokens: Int[Tensor, "b n"]
    parents: Int[Tensor, "b n"]
    valid: Bool[Tensor, "b n"]
    base: Int[Tensor, " b"]


def draft_model(
    model: Model, *, mode: Mode = "sample", branching: Sequence[int] = (), replacement: bool = False
) -> Drafter:
    """Draft with a separate model that shares the target's vocabulary.

    `mode`: `sample` draws from the draft law (needed by lossless verification to gain from it), `greedy` takes the
    most likely tokens as point masses, `coupled` takes argmax(log q + noise) with the noise of `policies.coupled`.
    `branching` (for example (3, 2)): children per node and level of a static tree, drawn independently
    (`replacement=True`, SpecInfer) or without replacement (Sequoia, RSD); empty: a chain as deep as planned.
    """
    shape = _check(mode, branching)

    def init(tokens: Tensor, length: Tensor, capacity: int) -> DraftState:
        if capacity > model.max_length:
            raise ValueError(
                f"the draft model {model.name!r} has a context of {model.max_length} tokens and {capacity} are needed; "
                "shorten the prompt or lower max_new_tokens"
            )
        cache, _ = prefill(model, tokens, length - 1, capacity)
        return _nothing_drafted(cache, length)

    def propose(state: DecodeState[Any, Any], plan: Plan, sampling: Sampling) -> tuple[Proposal, DraftState, int]:
        if plan.max_depth == 0:
            drafter = state.drafter
            return tree.root_only(last_token(state)), _nothing_drafted(drafter.cache, state.length), 0
        # Usually one token, two when the whole draft was accepted: the last draft has never been the model's input.
        # Where the host may not ask, two: an earlier token's slot is then written again.
        behind = state.length - state.drafter.cache.length
        pending = 2 if state.drafter.cache.store.static else int(behind.max())
        cache = kv.truncate(state.drafter.cache, (state.length - pending).clamp_min(0))
        proposal, cache, forwards = _expand(
            model, cache, state, plan, sampling, mode, shape, replacement, pending=pending
        )
        written = forwards if not shape else sum(_level_sizes(shape[: plan.max_depth])[:-1])
        drafted = DraftState(
            cache,
            proposal.tokens[:, :written],
            proposal.parents[:, :written],
            proposal.valid[:, :written],
            state.length - 1,
        )
        return proposal, drafted, forwards

    def observe(state: DecodeState[Any, Any], info: StepInfo) -> DraftState:
        drafter: DraftState = state.drafter
        if drafter.tokens.shape[1] == 0:
            return drafter
        nodes, count = _follow_emitted(drafter, info.emitted)
        count = torch.minimum(count, info.num_emitted)
        cache = kv.keep(drafter.cache, drafter.base, nodes if shape else None, count)
        return _nothing_drafted(cache, state.length)

    return Drafter(
        _name(model.name, mode, shape),
        init,
        propose,
        observe,
        chain=not shape,
        max_nodes=lambda depth: sum(_level_sizes(shape[:depth])) if shape else 1 + depth,
        vocab_size=model.vocab_size,
        capturable=True,
    )


def early_exit(target: Model, layers: int, *, mode: Mode = "sample", branching: Sequence[int] = ()) -> Drafter:
    """Draft with the target's first `layers` layers and its head (LayerSkip, arXiv:2404.16710), training-free.

    Needs no cache of its own: the target's committed slots are already those of its first layers, and the drafts go to
    scratch slots past them, which the verifying forward then overwrites. Raises `ValueError` when the target cannot be
    cut (see `Model.early_exit`).
    """
    shape = _check(mode, branching)
    if target.early_exit is None:
        raise ValueError(
            f"model {target.name!r} ({target.adapter} adapter) cannot exit early; use adapter 'decoder' or "
            "another drafter"
        )
    model = target.early_exit(layers)

    def propose(state: DecodeState[Any, Any], plan: Plan, sampling: Sampling) -> tuple[Proposal, None, int]:
        if plan.max_depth == 0:
            return tree.root_only(last_token(state)), None, 0
        cache = kv.borrow(state.cache)
        proposal, _, forwards = _expand(model, cache, state, plan, sampling, mode, shape, False)
        return proposal, None, forwards

    return Drafter(
        _name(f"early_exit:layers={layers}", mode, shape),
        stateless,
        propose,
        unchanged,
        chain=not shape,
        max_nodes=lambda depth: sum(_level_sizes(shape[:depth])) if shape else 1 + depth,
        vocab_size=target.vocab_size,
        capturable=True,
        shares_cache=True,
    )


def _expand(
    model: Model,
    cache: KVCache,
    state: DecodeState[Any, Any],
    plan: Plan,
    sampling: Sampling,
    mode: Mode,
    shape: tuple[int, ...],
    replacement: bool,
    pending: int = 1,
) -> tuple[Proposal, KVCache, int]:
    """Grow the tree level by level from the root, one forward of the draft model a level.

    `cache` must end before the last `pending` committed tokens, of which the root is the last. Nodes are numbered
    level by level, so a node's number, and with it its uniform, does not depend on how deep the rest of the batch is
    drafted.
    """
    rows, device = state.tokens.shape[0], state.tokens.device
    widths = shape[: plan.max_depth] or (1,) * plan.max_depth
    sizes = _level_sizes(widths)
    total = sum(sizes)
    uniforms = state.key.uniforms(state.round, Purpose.DRAFT, total) if mode == "sample" else None
    noise = None
    if mode == "coupled":
        noise = state.key.gumbels(state.length[:, None] + torch.arange(len(widths), device=device), model.vocab_size)
    tokens = last_token(state)[:, None]
    parents = torch.full_like(tokens, -1)
    valid = torch.ones_like(tokens, dtype=torch.bool)
    laws: list[Tensor] = []
    begin, visible = 0, None
    for level, width in enumerate(widths):
        here = slice(begin, begin + sizes[level])
        depth = None
        if shape:
            visible = tree.ancestors(parents)[:, here]
            # Relative to the cache's end, which has moved on by all earlier nodes.
            depth = torch.full_like(tokens[:, here], level - begin)
        if level == 0 and pending > 1:
            logits, cache = _catch_up(model, cache, state, pending)
        else:
            found, _, cache = model.forward(cache, tokens[:, here], depth, visible)
            assert found is not None
            logits = found
        if sampling.repetition_penalty != 1:
            logits = _penalized(logits, tokens, parents, here, state, sampling)
        children, exists, law = _children(
            logits, width, begin + sizes[level], level, sampling, uniforms, noise, replacement
        )
        if law is not None:
            laws.append(law)
        parent = torch.arange(begin, begin + sizes[level], device=device).repeat_interleave(width).expand(rows, -1)
        exists = exists & valid.gather(1, parent) & (level < plan.depth)[:, None]
        begin += sizes[level]
        tokens = torch.cat([tokens, torch.where(exists, children, tokens[:, :1])], dim=1)
        parents = torch.cat([parents, parent], dim=1)
        valid = torch.cat([valid, exists], dim=1)
    probs = None
    if laws:
        leaves = laws[0].new_zeros(rows, sizes[-1], model.vocab_size)
        probs = torch.cat([*laws, leaves], dim=1)
    sampled = valid & (parents >= 0) if mode == "sample" else torch.zeros_like(valid)
    return Proposal(tokens, parents, valid, sampled, probs, replacement, not shape), cache, len(widths)


def _catch_up(
    model: Model, cache: KVCache, state: DecodeState[Any, Any], pending: int
) -> tuple[Float[Tensor, "b 1 v"], KVCache]:
    """The last `pending` committed tokens in one forward: the logits after the root, and the cache that ends with it.

    A row shorter than that is given from its beginning, with whatever stands behind its end.
    """
    begin = (state.length - pending).clamp_min(0)
    tokens = state.tokens.gather(1, begin[:, None] + iota(pending, begin.device))
    logits, _, cache = model.forward(cache, tokens)
    assert logits is not None
    last = (state.length - 1 - begin)[:, None, None].expand(-1, -1, logits.shape[2])
    return logits.gather(1, last), kv.truncate(cache, state.length)


def _children(
    logits: Float[Tensor, "b m v"],
    width: int,
    first: int,
    level: int,
    sampling: Sampling,
    uniforms: Float[Tensor, "b n"] | None,
    noise: Float[Tensor, "b d v"] | None,
    replacement: bool,
) -> tuple[Int[Tensor, "b c"], Bool[Tensor, "b c"], Float[Tensor, "b m v"] | None]:
    """`width` children of each of m nodes, whether they exist, and the law they were drawn from."""
    rows, parents = logits.shape[:2]
    if uniforms is None:
        law = logits if noise is None else warp(logits, sampling).log() + noise[:, level, None]
        children = law.topk(width, dim=-1).indices.flatten(1) if width > 1 else law.argmax(-1)
        return children, torch.ones_like(children, dtype=torch.bool), None
    law = warp(logits, sampling)
    left = law.flatten(0, 1)
    drawn, exists = [], []
    for sibling in range(width):
        index = first + torch.arange(parents, device=logits.device) * width + sibling
        token = sample(left, uniforms[:, index].flatten())
        drawn.append(token.view(rows, parents))
        # Without replacement the support can run out; such a child does not exist.
        exists.append((left.sum(-1) > 0).view(rows, parents))
        if not replacement:
            left = left.scatter(1, token[:, None], 0)
    return torch.stack(drawn, -1).flatten(1), torch.stack(exists, -1).flatten(1), law


def _penalized(
    logits: Tensor, tokens: Tensor, parents: Tensor, here: slice, state: DecodeState[Any, Any], sampling: Sampling
) -> Tensor:
    visible = tree.ancestors(parents)[:, here]
    seen = prefix_tokens(tokens, visible, state.tokens, state.length, logits.shape[-1])
    return penalize(logits, seen, sampling)


def _follow_emitted(drafter: DraftState, emitted: Int[Tensor, "b m"]) -> tuple[Int[Tensor, "b d"], Int[Tensor, " b"]]:
    """The nodes of the drafter's own tree that the committed tokens followed, root included, and their number.

    Goes by the tokens and not by the verdict's path: in a combined tree the nodes are numbered differently.
    """
    rows = emitted.shape[0]
    node = torch.zeros(rows, dtype=torch.int64, device=emitted.device)
    alive = torch.ones(rows, dtype=torch.bool, device=emitted.device)
    nodes, count = [node], torch.ones_like(node)
    for step in range(min(emitted.shape[1], drafter.tokens.shape[1] - 1)):
        child = drafter.valid & (drafter.parents == node[:, None]) & (drafter.tokens == emitted[:, step, None])
        alive = alive & child.any(-1)
        node = torch.where(alive, child.int().argmax(-1), node)
        nodes.append(node)
        count = count + alive
    return torch.stack(nodes, dim=1), count


def _nothing_drafted(cache: KVCache, length: Int[Tensor, " b"]) -> DraftState:
    nothing = torch.zeros(length.shape[0], 0, dtype=torch.int64, device=length.device)
    return DraftState(cache, nothing, nothing, nothing.bool(), length - 1)


def _level_sizes(widths: Sequence[int]) -> list[int]:
    sizes = [1]
    for width in widths:
        sizes.append(sizes[-1] * width)
    return sizes


def _check(mode: str, branching: Sequence[int]) -> tuple[int, ...]:
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if any(width < 1 for width in branching):
        raise ValueError(f"branching needs at least one child on every level, got {tuple(branching)}")
    return tuple(branching)


def _name(model: str, mode: str, shape: tuple[int, ...]) -> str:
    return f"{model},mode={mode}" + (f",tree={'x'.join(map(str, shape))}" if shape else "")

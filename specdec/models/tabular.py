"""Exact toy language models over a tiny vocabulary: the fake model of tests, proofs and dry runs.

The law after a context is a row of a table, picked by a hash of every token of the context and its position as they
stand in the cache. A token that is missing from the cache, doubled or misplaced therefore changes the law.
"""

import torch
from torch import Tensor

from specdec import cache as kv
from specdec.cache import KVCache
from specdec.rng import Key, Purpose
from specdec.types import Model

# Odd 32-bit constants that spread tokens and positions (golden ratio, and the second multiplier of murmur3).
_TOKEN_MIX, _POSITION_MIX, _WORD = 0x9E3779B1, 0xC2B2AE35, 0x7FFFFFFF


def tabular(
    vocab_size: int,
    *,
    seed: int = 0,
    contexts: int = 251,
    sharpness: float = 1.0,
    max_length: int = 4096,
    device: torch.device | str = "cpu",
) -> Model:
    """A model whose laws are drawn once from `seed`: softmax(sharpness * Gumbel) rows, the same in every process.

    `sharpness` 0 makes them uniform; large values make them nearly deterministic. float64 logits.
    """
    uniform = _rows(seed, contexts, vocab_size)
    return from_table(-sharpness * torch.log(-torch.log(uniform)), seed=seed, max_length=max_length, device=device)


def tabular_draft(target: Model, *, agreement: float, seed: int = 1) -> Model:
    """A draft model for a tabular target: q = agreement * p + (1 - agreement) * noise, for every context.

    Its acceptance at temperature 1 is at least `agreement`, since TV(p, q) <= 1 - agreement.
    """
    if not 0 <= agreement <= 1:
        raise ValueError(f"agreement must be in [0, 1], got {agreement}")
    table = target.about["table"]
    uniform = _rows(seed, *table.shape)
    noise = torch.softmax(-torch.log(-torch.log(uniform)), -1).to(table.device)
    law = agreement * torch.softmax(table, -1) + (1 - agreement) * noise
    return from_table(
        law.log(), seed=target.about["seed"], max_length=target.max_length, device=target.device, name="tabular_draft"
    )


def from_table(
    table: Tensor,
    *,
    seed: int = 0,
    max_length: int = 4096,
    device: torch.device | str = "cpu",
    name: str = "tabular",
) -> Model:
    """A model whose logits are rows of `table [contexts v]`; `-inf` excludes a token."""
    device = torch.device(device)
    table = table.to(device)
    contexts, vocab_size = table.shape

    def init_cache(rows: int, capacity: int) -> KVCache:
        # -1 is no token: a read of a slot that was never written shows up as another law.
        return kv.init_cache(torch.full((1, rows, capacity, 1, 2), -1, dtype=torch.int64, device=device))

    def forward(
        cache: KVCache,
        tokens: Tensor,
        depth: Tensor | None = None,
        visible: Tensor | None = None,
        *,
        logits: bool = True,
        features: bool = False,
    ) -> tuple[Tensor | None, Tensor | None, KVCache]:
        n = tokens.shape[1]
        slots, extent = kv.window(cache, n)
        position = slots if depth is None else cache.length[:, None] + depth
        buffer = cache.store.slots[0][0]
        kv.write(buffer, slots, torch.stack([tokens, position], -1)[:, :, None, :])
        seen = kv.slot_visibility(cache, n, extent, visible)
        used = buffer[:, :extent, 0]
        mixed = ((used[..., 0] + 1) * _TOKEN_MIX ^ (used[..., 1] + 1 + seed) * _POSITION_MIX) & _WORD
        context = (torch.where(seen, mixed[:, None, :], 0).sum(-1) & _WORD) % contexts
        scores = table[context] if logits else None
        hidden = context[:, :, None].to(table.dtype) if features else None
        return scores, hidden, kv.advance(cache, n, extent)

    return Model(
        name=name,
        adapter="tabular",
        vocab_size=vocab_size,
        max_length=max_length,
        device=device,
        dtype=table.dtype,
        init_cache=init_cache,
        forward=forward,
        about={"table": table, "seed": seed},
    )


def _rows(seed: int, contexts: int, vocab_size: int) -> Tensor:
    """Uniforms in (0, 1), one per table entry, from the counter-based generator."""
    key = Key(torch.full((contexts,), seed, dtype=torch.int64))
    return key.uniforms(torch.arange(contexts), Purpose.DRAFT, vocab_size).clamp_min(2.0**-53)

"""The part of a forward that every cached model shares: where the new nodes go, where they stand, whom they see."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from specdec import cache as kv
from specdec.cache import KVCache
from specdec.records import record


@record
class Window:
    """`slots`: cache slots of the new nodes. `positions`: their places in the text. `extent`: slots in use after the
    append, in the longest row; exact on the CPU and an upper bound elsewhere."""

    slots: Int[Tensor, "b n"]
    positions: Int[Tensor, "b n"]
    extent: int


def open_window(cache: KVCache, n: int, depth: Int[Tensor, "b n"] | None, max_length: int) -> Window:
    """The window of the next `n` nodes; `depth` as in `specdec.types.Forward`, `max_length` the model's context.

    Raises `StaleCacheError` for a consumed handle and `CacheFullError` when the nodes do not fit.
    """
    slots, extent = kv.window(cache, n)
    if slots.device.type == "cpu" and not cache.store.static:
        # The handle's bound is loose after rows were selected; reading a number back is free here.
        extent = max(cache.length.tolist()) + n
    positions = slots if depth is None else cache.length[:, None] + depth
    # Drafts may hang past the end of the context. No verdict commits them, but tables of positions end there.
    return Window(slots, positions.clamp(max=max_length - 1), extent)


def additive_mask(
    cache: KVCache,
    window: Window,
    visible: Bool[Tensor, "b n w"] | None,
    dtype: torch.dtype,
    *,
    reach: int | None = None,
) -> Float[Tensor, "b 1 n extent"]:
    """What to add to attention scores: 0 where a node sees a slot, -inf elsewhere.

    `visible` as in `specdec.types.Forward`; every node sees itself whatever it says, because a row of nothing but
    -inf is NaN after the softmax, and a padding node's NaN would spread through the cache. `reach`: a sliding window
    of so many positions, the node's own included. `cache` is the handle before the append.
    """
    n, extent = window.slots.shape[1], window.extent
    if visible is not None:
        itself = torch.eye(n, dtype=torch.bool, device=visible.device)
        visible = visible | torch.nn.functional.pad(itself, (visible.shape[2] - n, 0))
    seen = kv.slot_visibility(cache, n, extent, visible)
    if reach is not None:
        # What a node sees is its own prefix, each position once, so positions back are seen slots back.
        seen = seen & (seen.flip(-1).cumsum(-1).flip(-1) <= reach)
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))
    return mask[:, None]

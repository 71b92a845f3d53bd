"""The KV cache as a handle: append a window, keep what was accepted, give back the rest.

Memory is a `SlotStore`: tensors `[g b c h d]` (groups such as keys and values of each layer, rows, slots, heads,
head size). A `KVCache` is a handle on it: how many slots of each row count (`length`), and a generation number.
Writing consumes a handle and returns the next one; using a consumed handle raises `StaleCacheError`, so a script
that branches must say so with `fork`.

Laws, tested in `property_tests/test_cache_laws.py`:

- `truncate(append(c, x), c.length)` reads as `c`.
- `keep` of a chain prefix equals `truncate`.
- Two appends of one token equal one append of two.
- Slots at and past `length` are scratch: nobody may read one it has not written.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from specdec.arrays import iota
from specdec.records import record
from specdec_kernels.dispatch import resolve


class StaleCacheError(RuntimeError):
    """A consumed cache handle was used. Use the handle the last call returned, or `fork` before branching."""


class CacheFullError(ValueError):
    """The window does not fit into the capacity that the cache was made with."""


class SlotStore:
    """Device memory behind cache handles; `slots` are tensors `[g b c h d]`, `generation` counts the writes.

    `static`: the host may not ask how full it is, because what runs over it is captured as a graph. Its capacity then
    stands for every extent, and whoever captures answers for the room.
    """

    __slots__ = ("__weakref__", "generation", "slots", "static")

    def __init__(self, slots: tuple[Tensor, ...], generation: int = 0, static: bool = False) -> None:
        self.slots = slots
        self.generation = generation
        self.static = static


@record
class KVCache:
    """A handle: `length [b]` slots of each row are committed; `extent` bounds their maximum on the host."""

    store: SlotStore
    length: Int[Tensor, " b"]
    generation: int
    extent: int

    @property
    def capacity(self) -> int:
        """Slots per row."""
        return int(self.store.slots[0].shape[2])

    @property
    def rows(self) -> int:
        return int(self.length.shape[0])

    def map_rows(self, function: Callable[[Tensor], Tensor]) -> "KVCache":
        """A copy on new memory with `function` applied along the rows (see `records.select_rows`)."""
        check_fresh(self)
        slots = tuple(
            function(buffer.transpose(0, 1)).transpose(0, 1).contiguous().clone() for buffer in self.store.slots
        )
        return KVCache(SlotStore(slots), function(self.length), 0, self.extent)


def init_cache(*slots: Tensor) -> KVCache:
    """An empty cache over freshly allocated `slots [g b c h d]`, which may hold anything: scratch is never read."""
    rows = slots[0].shape[1]
    length = torch.zeros(rows, dtype=torch.int64, device=slots[0].device)
    return KVCache(SlotStore(slots), length, 0, 0)


def check_fresh(cache: KVCache) -> None:
    if cache.generation != cache.store.generation:
        raise StaleCacheError(
            "this cache handle was consumed by a later call; use the newest handle, or fork() before branching"
        )


def window(cache: KVCache, n: int) -> tuple[Int[Tensor, "b n"], int]:
    """Where the next `n` nodes of each row go: slot indices and the number of slots in use afterwards.

    Raises `StaleCacheError` for a consumed handle and `CacheFullError` when `n` slots do not fit.
    """
    check_fresh(cache)
    slots = cache.length[:, None] + iota(n, cache.length.device)
    if cache.store.static:
        return slots, cache.capacity
    extent = cache.extent
    if extent + n > cache.capacity:
        extent = int(cache.length.max())
    if extent + n > cache.capacity:
        raise CacheFullError(
            f"{n} more slots do not fit: {extent} of {cache.capacity} are used; make the state with a larger capacity"
        )
    return slots, extent + n


def advance(cache: KVCache, n: int, extent: int) -> KVCache:
    """The handle after `n` slots of every row were written; consumes `cache`."""
    cache.store.generation += 1
    return KVCache(cache.store, cache.length + n, cache.store.generation, extent)


def write(buffer: Tensor, slots: Int[Tensor, "b n"], values: Tensor) -> None:
    """Put `values [b n h d]` into `buffer [b c h d]` at `slots`, in place."""
    if buffer.shape[0] == 1:
        buffer[0].index_copy_(0, slots[0], values[0])
    else:
        buffer[torch.arange(buffer.shape[0], device=buffer.device)[:, None], slots] = values


def truncate(cache: KVCache, length: Int[Tensor, " b"]) -> KVCache:
    """Forget all slots at and past `length`, without a copy; consumes `cache`. Rows never grow by it."""
    check_fresh(cache)
    cache.store.generation += 1
    kept = torch.minimum(length, cache.length)
    return KVCache(cache.store, kept, cache.store.generation, _extent(kept, cache.extent))


def keep(
    cache: KVCache, base: Int[Tensor, " b"], nodes: Int[Tensor, "b m"] | None, count: Int[Tensor, " b"]
) -> KVCache:
    """Move the slots `base + nodes[:, i]` to `base + i` for `i < count`, forget the rest; consumes `cache`.

    `nodes` must be strictly increasing within the first `count` entries of a row (a root-to-leaf path in
    topological order is); later entries are ignored. `None` stands for 0, 1, 2, ... (a chain): nothing has to move.
    """
    check_fresh(cache)
    cache.store.generation += 1
    if nodes is not None and nodes.shape[1]:
        slots = cache.store.slots
        resolve("kv_keep", slots[0].device, slots[0].dtype, base.shape)(slots, base, nodes, count)
    length = base + count
    return KVCache(cache.store, length, cache.store.generation, _extent(length, cache.extent))


def fork(cache: KVCache) -> KVCache:
    """An independent copy of the memory, for scripts that branch; `cache` stays usable."""
    return cache.map_rows(lambda tensor: tensor.clone())


def borrow(cache: KVCache) -> KVCache:
    """A second handle on the same memory that may only use the scratch slots past `length`.

    For drafters that run a part of the target over the target's own cache. The lender's handle stays valid,
    because what it can read is never written; what the borrower wrote is lost at the lender's next append.
    """
    check_fresh(cache)
    return KVCache(SlotStore(cache.store.slots, static=cache.store.static), cache.length, 0, cache.extent)


def _extent(length: Int[Tensor, " b"], bound: int) -> int:
    # Reading a number back is free on the CPU and a stall elsewhere; there the bound stands until `window` needs it.
    return max(length.tolist()) if length.device.type == "cpu" else bound


def slot_visibility(
    cache: KVCache, n: int, extent: int, visible: Bool[Tensor, "b n w"] | None
) -> Bool[Tensor, "b n s"]:
    """Who sees what over the first `extent` slots: node i sees the committed slots and what `visible` allows.

    `visible` covers the last w slots after the append, w >= n (see `types.Forward`); `None` means a chain. `cache` is
    the handle before the append.
    """
    slot = torch.arange(extent, device=cache.length.device)
    offset = slot - cache.length[:, None]
    if visible is None:
        return offset[:, None, :] <= torch.arange(n, device=offset.device)[None, :, None]
    width = visible.shape[2]
    offset = offset + (width - n)
    inside = (offset >= 0) & (offset < width)
    index = offset.clamp(0, width - 1)[:, None, :].expand(-1, n, -1)
    return torch.where(inside[:, None, :], visible.gather(2, index), (offset < 0)[:, None, :])

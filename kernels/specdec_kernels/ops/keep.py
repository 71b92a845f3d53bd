"""Moving the slots of what was accepted to the front of the window they were written to."""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from specdec_kernels.arrays import iota


def keep(
    buffers: Sequence[Tensor], base: Int[Tensor, " b"], nodes: Int[Tensor, "b m"], count: Int[Tensor, " b"]
) -> None:
    """In `buffers [g b c h d]`, move the slots `base + nodes[:, i]` to `base + i` for `i < count`, in place.

    `nodes` must be strictly increasing within the first `count` entries of a row, as a root-to-leaf path in
    topological order is; later entries are ignored, and `base + m` slots must exist. Source and target may overlap.
    Other slots keep their bits.
    """
    index = iota(nodes.shape[1], nodes.device)
    live = index < count[:, None]
    # A node that is not kept is written onto itself, so every row moves the same number of slots.
    source = base[:, None] + torch.where(live, nodes, index)
    target = base[:, None] + index
    rows = iota(nodes.shape[0], nodes.device)[:, None]
    for buffer in buffers:
        # The gather copies before the scatter writes, so overlapping source and target are safe.
        buffer[:, rows, target] = buffer[:, rows, source]

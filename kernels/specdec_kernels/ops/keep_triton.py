"""`keep` in Triton: one launch a buffer, whatever the number of layers."""

from collections.abc import Sequence
from typing import no_type_check

import triton
import triton.language as tl
from jaxtyping import Int
from torch import Tensor

from specdec_kernels.ops import keep as definition

# Slots in flight per program, and the most channels it moves of each: 8 KiB of 16-bit numbers on their way.
_BATCH, _BLOCK = 8, 512


def keep(
    buffers: Sequence[Tensor], base: Int[Tensor, " b"], nodes: Int[Tensor, "b m"], count: Int[Tensor, " b"]
) -> None:
    """See `keep.keep`; a buffer whose slots are not contiguous memory is left to the definition."""
    nodes = nodes.contiguous()
    for buffer in buffers:
        groups, rows, _, heads, size = buffer.shape
        group, row, slot, head, unit = buffer.stride()
        if (unit, head) != (1, size):
            definition.keep((buffer,), base, nodes, count)
            continue
        if not buffer.numel() or not nodes.numel():
            continue
        block = min(_BLOCK, triton.next_power_of_2(heads * size))
        grid = (groups * rows, triton.cdiv(heads * size, block))
        _move[grid](
            buffer, base, nodes, count, rows, nodes.shape[1], heads * size, group, row, slot,
            base.stride(0), count.stride(0), BATCH=_BATCH, BLOCK=block, num_warps=4,
        )  # fmt: skip


@triton.jit
@no_type_check
def _move(
    slots, base, nodes, count, rows, width, channels, group_stride, row_stride, slot_stride, base_stride, count_stride,
    BATCH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0)
    row = pair % rows
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < channels
    kept = tl.minimum(tl.load(count + row * count_stride), width).to(tl.int32)
    first_slot = tl.load(base + row * base_stride).to(tl.int64)
    start = slots + (pair // rows).to(tl.int64) * group_stride + row.to(tl.int64) * row_stride
    start += first_slot * slot_stride
    for first in range(0, kept, BATCH):
        index = first + tl.arange(0, BATCH)
        node = tl.load(nodes + row.to(tl.int64) * width + index, mask=index < kept, other=0).to(tl.int64)
        moved = (index < kept) & (node != index)
        mask = moved[:, None] & inside[None, :]
        held = tl.load(start + node[:, None] * slot_stride + channel[None, :], mask=mask)
        # Node j >= i may lie where another thread's node i came from: all of the batch is read before any is written.
        tl.debug_barrier()
        tl.store(start + index.to(tl.int64)[:, None] * slot_stride + channel[None, :], held, mask=mask)

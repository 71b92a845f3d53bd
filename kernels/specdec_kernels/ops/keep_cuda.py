"""`keep` in CUDA C++: one launch a buffer, whatever the number of layers."""

from collections.abc import Sequence
from ctypes import c_int64, c_void_p

import torch
from jaxtyping import Int
from torch import Tensor

from specdec_kernels.cuda import library
from specdec_kernels.ops import keep as definition

_ARGUMENTS = (*(c_void_p,) * 4, *(c_int64,) * 7)


def keep(
    buffers: Sequence[Tensor], base: Int[Tensor, " b"], nodes: Int[Tensor, "b m"], count: Int[Tensor, " b"]
) -> None:
    """See `keep.keep`; a buffer whose slots are not contiguous memory is left to the definition."""
    base, nodes, count = (index.to(torch.int64).contiguous() for index in (base, nodes, count))
    for buffer in buffers:
        groups, rows, _, heads, size = buffer.shape
        group, row, slot, head, unit = buffer.stride()
        if (unit, head) != (1, size):
            definition.keep((buffer,), base, nodes, count)
            continue
        item = buffer.element_size()
        library.load("kv_keep", _ARGUMENTS, buffer.device)(
            buffer.data_ptr(),
            base.data_ptr(),
            nodes.data_ptr(),
            count.data_ptr(),
            groups,
            rows,
            nodes.shape[1],
            heads * size * item,
            group * item,
            row * item,
            slot * item,
        )

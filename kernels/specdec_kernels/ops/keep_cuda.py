"""`keep` in CUDA C++: one launch a buffer, whatever the number of layers."""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from specdec_kernels.cuda import library
from specdec_kernels.ops import keep as definition

_PARAMETERS, _THREADS = "4P8q", 256
# Vectors of a slot that a block has at most, and blocks that keep a large device busy.
_ACROSS, _BLOCKS = 128, 128


def keep(
    buffers: Sequence[Tensor], base: Int[Tensor, " b"], nodes: Int[Tensor, "b m"], count: Int[Tensor, " b"]
) -> None:
    """See `keep.keep`; a buffer whose slots are not contiguous memory is left to the definition."""
    base, nodes, count = (index.to(torch.int64).contiguous() for index in (base, nodes, count))
    for buffer in buffers:
        groups, rows, _, heads, size = buffer.shape
        *strides, head, unit = buffer.stride()
        if (unit, head) != (1, size):
            definition.keep((buffer,), base, nodes, count)
            continue
        item = buffer.element_size()
        width, slot = nodes.shape[1], heads * size * item
        if not groups * rows * width * slot:
            continue
        steps = [stride * item for stride in strides]
        vector = vector_bytes(buffer.data_ptr(), slot, *steps)
        vectors = slot // vector
        across = choose_across(groups * rows, vectors)
        chunks = -(-vectors // across)
        library.load("kv_keep", f"kv_keep_{vector}", _PARAMETERS, _THREADS, buffer.device)(
            (groups * rows * chunks, 1),
            buffer.data_ptr(),
            base.data_ptr(),
            nodes.data_ptr(),
            count.data_ptr(),
            rows,
            width,
            chunks,
            across,
            vectors,
            *(step // vector for step in steps),
        )


def choose_across(pairs: int, vectors: int) -> int:
    """Vectors of a slot that a block has, a power of two, for so many groups and rows.

    The fewer, the more nodes its threads have on their way at once, which few blocks need and many do not.
    """
    across = _ACROSS if pairs * vectors > _ACROSS * _BLOCKS else _ACROSS // 2
    return max(32, min(across, 1 << (vectors - 1).bit_length()))


def vector_bytes(*numbers: int) -> int:
    """The widest vector, up to 16 bytes, that addresses, sizes and strides in bytes are multiples of."""
    return next(width for width in (16, 8, 4, 2, 1) if not any(number % width for number in numbers))

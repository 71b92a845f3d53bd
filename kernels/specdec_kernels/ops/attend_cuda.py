"""`attend` in CUDA C++: one launch, a cluster of blocks for each key head; see `cuda/attend.cu`.

A node's result is the same bits for any number of nodes up to 16, whatever its neighbours, `extent`, capacity and the
other rows.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from specdec_kernels.cuda import library
from specdec_kernels.ops.attention import MAX_WIDTH

MOST_NODES = 16
# Clusters came with Hopper.
_CAPABILITY = (9, 0)
_HEAD_SIZES = (64, 128)
_PARAMETERS = "8P10q2f"
_BLOCKS, _QUERIES, _THREADS = 8, 16, 128


def refuse(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> str | None:
    """Why the kernel cannot take heads of this type and shape `[b n all_heads d]`, or `None`."""
    if dtype not in (torch.float16, torch.bfloat16):
        return f"is built for float16 and bfloat16, not for {str(dtype).removeprefix('torch.')}"
    if shape and shape[-1] not in _HEAD_SIZES:
        return f"is built for heads of 64 and 128 channels, not of {shape[-1]}"
    if shape and shape[1] > MOST_NODES:
        return f"is built for up to {MOST_NODES} nodes, not for {shape[1]}"
    reason = library.available("attend", device)
    if reason is None and torch.cuda.get_device_capability(device) < _CAPABILITY:
        return "needs clusters of blocks, which GPUs have from compute capability 9.0 on"
    return reason


def attend(
    heads: Float[Tensor, "b n all_heads d"],
    rotation: Float[Tensor, "b n half_d 2"],
    keys: Float[Tensor, "b c kv_heads d"],
    values: Float[Tensor, "b c kv_heads d"],
    length: Int[Tensor, " b"],
    ancestors: Int[Tensor, "b n"] | None = None,
    *,
    head_norm: Float[Tensor, "turning d"] | None = None,
    eps: float = 0.0,
    width: int | None = None,
    extent: int | None = None,
    early: bool = False,
) -> Float[Tensor, "b n heads d"]:
    """See `attend.attend`; `rotation` is float32 and `head_norm` of the type of `heads`. It reads what a row uses,
    whatever `extent`.

    `early`: begin to read the committed slots while the kernel before still runs. That one must be `product` in CUDA
    C++, which lets the next begin when all before itself is done, and must have written none of them.

    Raises `ValueError` for more than `MOST_NODES` nodes, a tree wider than its masks and strides it cannot read.
    """
    rows, n, every, size = heads.shape
    kv_heads = keys.shape[2]
    width = n if width is None else width
    if n > MOST_NODES:
        raise ValueError(f"attend holds {MOST_NODES} new nodes in shared memory, not {n}; use tree_attention")
    if ancestors is not None and not n <= width <= MAX_WIDTH:
        raise ValueError(f"a tree of {n} new nodes over a window of {width}: masks hold n to {MAX_WIDTH} slots")
    if keys.stride() != values.stride() or not fits(keys) or values.data_ptr() % 16:
        raise ValueError("attend reads keys and values of one layout, heads contiguous and aligned to 16 bytes")
    queries = every - 2 * kv_heads
    out = heads.new_empty((rows, n, queries, size))
    if not out.numel():
        return out
    kind = str(heads.dtype).removeprefix("torch.")
    heads, rotation = heads.contiguous(), rotation.contiguous()
    group = queries // kv_heads
    library.load("attend", f"attend_{kind}_{size}", _PARAMETERS, _THREADS, heads.device, early=early)(
        (_BLOCKS * -(-n * group // _QUERIES), rows * kv_heads),
        heads.data_ptr(),
        rotation.data_ptr(),
        0 if head_norm is None else head_norm.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        length.data_ptr(),
        0 if ancestors is None else ancestors.data_ptr(),
        out.data_ptr(),
        n,
        kv_heads,
        group,
        width,
        *keys.stride()[:3],
        length.stride(0),
        *((0, 0) if ancestors is None else ancestors.stride()),
        eps,
        size**-0.5 * math.log2(math.e),
    )
    return out


def fits(slots: Float[Tensor, "b c kv_heads d"]) -> bool:
    """Whether every head of every slot is contiguous and begins at a multiple of 16 bytes."""
    *strides, unit = slots.stride()
    item = slots.element_size()
    return unit == 1 and not any(number % 16 for number in (slots.data_ptr(), *(step * item for step in strides)))

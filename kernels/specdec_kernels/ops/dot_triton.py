"""What the Triton kernels with matrix products share."""

from functools import lru_cache
from typing import no_type_check

import torch
import triton
import triton.language as tl


@triton.jit
@no_type_check
def dot(a, b, sums, WIDE: tl.constexpr):
    """`sums + a b` with float32 sums, no TF32. `WIDE`: multiply in float32 what is narrower, because Triton's
    interpreter takes the bits of bfloat16 numbers for integers."""
    if WIDE:
        result = tl.dot(a.to(tl.float32), b.to(tl.float32), sums, input_precision="ieee")
    else:
        result = tl.dot(a, b, sums, input_precision="ieee")
    return result


@lru_cache
def stages(device: torch.device, wanted: int) -> int:
    """Tiles a program may have in flight: `wanted` where shared memory is large, 2 elsewhere.

    Parts for data centers (A100, H100, B200) have 160 KiB and more and a compute capability that ends in 0.
    """
    large = device.type != "cuda" or torch.cuda.get_device_capability(device)[1] == 0
    return wanted if large else min(wanted, 2)

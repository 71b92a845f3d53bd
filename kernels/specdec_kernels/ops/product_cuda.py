"""`product` in CUDA C++: up to 16 rows of 16-bit types; see `cuda/product.cu`.

A row's result is the same bits for any number of rows up to 16 and whatever stands in the others.
"""

from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from specdec_kernels.cuda import library
from specdec_kernels.dispatch import resolve
from specdec_kernels.ops.fused_triton import rms_norm_residual

MOST_ROWS = 16
# A structure, whose end is padded to the alignment of its pointers.
_PARAMETERS = "6P3qf4x"
_OUTPUTS = 16
# Multiprocessors of a large GPU.
_PROCESSORS = 132


def refuse(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> str | None:
    """Why the kernel cannot take `x` of this type and shape, or `None`."""
    if dtype not in (torch.float16, torch.bfloat16):
        return f"is built for float16 and bfloat16, not for {str(dtype).removeprefix('torch.')}"
    rows = torch.Size(shape[:-1]).numel()
    if shape and rows > MOST_ROWS:
        return f"is built for up to {MOST_ROWS} rows, not for {rows}"
    if shape and shape[-1] % 8:
        return f"reads 8 inputs at a time, and {shape[-1]} are no multiple of that"
    return library.available("product", device)


def product(
    x: Float[Tensor, "*rows into"],
    weight: Float[Tensor, "out into"],
    bias: Float[Tensor, " out"] | None = None,
    *,
    norm: Float[Tensor, " into"] | None = None,
    eps: float = 0.0,
    gated: bool = False,
    residual: Float[Tensor, "*rows made"] | None = None,
    dtype: torch.dtype | None = None,
    early: bool = True,
) -> Float[Tensor, "*rows made"]:
    """See `product.product`; `weight` must be contiguous. What the kernel does not take is left to the Triton version:
    more rows, inputs that are no multiple of 8, addresses that are none of 16 bytes, another `dtype` than float32 or
    that of `x`.

    `early`: begin to read the weights while the kernel before still runs.
    """
    outputs, inputs = weight.shape[0] // (2 if gated else 1), weight.shape[1]
    rows = x.numel() // inputs
    fits = rows <= MOST_ROWS and inputs % 8 == 0 and dtype in (None, x.dtype, torch.float32)
    if not fits or any(tensor.data_ptr() % 16 for tensor in (x, weight, norm) if tensor is not None):
        other = resolve("product", x.device, x.dtype, (rows, inputs), "triton")
        made: Tensor = other(x, weight, bias, norm=norm, eps=eps, gated=gated, residual=residual, dtype=dtype)
        return made
    if norm is not None and x.dtype == torch.float16:
        # x times the norm's weights, before the scale that makes it small, may be more than float16 holds.
        x, norm = rms_norm_residual(x, None, norm, eps)[1], None
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    out = x.new_empty((*x.shape[:-1], outputs), dtype=dtype or x.dtype)
    if not out.numel():
        return out
    name, warps = choose_kernel(rows, outputs, inputs, x.dtype, out.dtype, gated=gated, norm=norm is not None)
    library.load("product", name, _PARAMETERS, 32 * warps, x.device, early=early)(
        (-(-outputs // _OUTPUTS), 1),
        x.data_ptr(),
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        0 if norm is None else norm.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        out.data_ptr(),
        rows,
        outputs,
        inputs,
        eps,
    )
    return out


@cache
def choose_kernel(
    rows: int, outputs: int, inputs: int, dtype: torch.dtype, made: torch.dtype, *, gated: bool, norm: bool
) -> tuple[str, int]:
    """The kernel of `product.cu` for up to `MOST_ROWS` rows, and its warps.

    The warps depend on the weight and on what is done with it, not on the rows, and so do a row's bits.
    """
    types = "_".join(str(kind).removeprefix("torch.") for kind in (dtype, made))
    warps = _choose_warps(-(-outputs // _OUTPUTS), inputs, gated=gated, norm=norm)
    return f"product_{types}_{warps}_{-(-rows // 8)}{'_gated' * gated}{'_norm' * norm}", warps


def _choose_warps(blocks: int, inputs: int, *, gated: bool, norm: bool) -> int:
    """More warps read more neighbouring bytes together, which memory delivers faster; blocks of more warps are fewer on
    a multiprocessor, and each has fewer turns in which one read covers another.

    Measured on an H100 in rounds of decoding: 32 warps for the 8192 inputs and 2048 outputs of 1B took 1.6 % off the
    round, 16 for 3072 outputs of 3B and 4096 of 8B 2.6 and 1.9 %. 16 warps for more outputs, for gated layers, or for
    the 2048 inputs and 3072 outputs of 1B made it longer.
    """
    if blocks <= _PROCESSORS:
        return 32 if inputs >= 8192 and not (gated or norm) else 16
    return 16 if blocks <= 2 * _PROCESSORS and inputs >= 3072 and not gated else 8

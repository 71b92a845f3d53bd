"""`product` in CUDA C++: up to 16 rows of 16-bit types; see `cuda/product.cu`.

A row's result is the same bits for any number of rows up to 16 and whatever stands in the others.
"""

from ctypes import c_float, c_int, c_int64, c_void_p

import torch
from jaxtyping import Float
from torch import Tensor

from specdec_kernels.cuda import library
from specdec_kernels.dispatch import resolve
from specdec_kernels.ops.fused_triton import rms_norm_residual

MOST_ROWS = 16
_ARGUMENTS = (*(c_void_p,) * 6, *(c_int64,) * 3, c_float, *(c_int,) * 4)


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
    library.load("product", _ARGUMENTS, x.device)(
        x.data_ptr(),
        weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        None if norm is None else norm.data_ptr(),
        None if residual is None else residual.data_ptr(),
        out.data_ptr(),
        rows,
        outputs,
        inputs,
        eps,
        x.dtype == torch.float16,
        out.dtype == torch.float32,
        gated,
        early,
    )
    return out

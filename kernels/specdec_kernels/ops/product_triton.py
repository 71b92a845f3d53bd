"""`product` in Triton for a few rows, where a linear layer takes as long as its weights take to arrive.

The rows of x are padded to the 16 that a matrix instruction takes, and each program streams a few rows of the weight
through it, the whole of their length: no partial sums are left to be added by another launch. The norm costs no pass
of its own: its weights multiply x on the way in and its scale the sums on the way out.

A row's result is the same bits whatever the number of rows and whatever stands in them: each takes the same steps in
the same order. Decoding one token and verifying several then agree exactly, as far as linear layers go.
"""

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from specdec_kernels.ops.dot_triton import dot, stages
from specdec_kernels.ops.fused_triton import rms_norm_residual

# Rows come in chunks of 16; the chunks of a tile run side by side and find its weights in the L2 cache.
_CHUNK, MOST_ROWS = 16, 32


class Tile(NamedTuple):
    """How a product is cut: outputs and inputs of a tile, warps of a program, tiles it has in flight."""

    outputs: int
    inputs: int
    warps: int
    stages: int


def choose_tile(outputs: int, inputs: int, gated: bool) -> Tile:
    """The tile for a weight `[outputs inputs]`; `outputs` counts gate and up of a gated layer once.

    In flight are at least 29 KiB a multiprocessor, which is what 4.8 TB/s times 800 ns asks of each of the 132 of an
    H200; narrow outputs take narrow tiles, so that there are programs for all of them.
    """
    block = 256 if inputs >= 256 else max(16, triton.next_power_of_2(inputs))
    if gated or outputs <= 8192:
        return Tile(16, block, 4, 4)
    return Tile(32, block, 4, 4)


def refuse(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> str | None:
    """Why the kernel cannot take `x` of this type and shape, or `None`."""
    if dtype not in (torch.float16, torch.bfloat16):
        return f"is built for float16 and bfloat16, not for {str(dtype).removeprefix('torch.')}"
    rows = torch.Size(shape[:-1]).numel()
    if shape and rows > MOST_ROWS:
        return f"is built for up to {MOST_ROWS} rows, not for {rows}"
    return None


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
    tile: Tile | None = None,
) -> Float[Tensor, "*rows made"]:
    """See `product.product`; `weight` must be contiguous. `tile`: for measuring others than `choose_tile` picks."""
    if norm is not None and x.dtype == torch.float16:
        # x times the norm's weights, before the scale that makes it small, may be more than float16 holds.
        x, norm = rms_norm_residual(x, None, norm, eps)[1], None
    outputs, inputs = weight.shape[0] // (2 if gated else 1), weight.shape[1]
    x = x.contiguous()
    rows = x.numel() // inputs
    out = x.new_empty((*x.shape[:-1], outputs), dtype=dtype or x.dtype)
    if not out.numel():
        return out
    tile = tile or choose_tile(outputs, inputs, gated)
    chunks = triton.cdiv(rows, _CHUNK)
    _product[(triton.cdiv(outputs, tile.outputs) * chunks,)](
        x, weight, out if bias is None else bias, out if norm is None else norm,
        out if residual is None else residual.contiguous(), out, rows, outputs, inputs, eps, chunks,
        ROWS=_CHUNK, OUTPUTS=tile.outputs, INPUTS=tile.inputs,
        EVEN=inputs % tile.inputs == 0 and outputs % tile.outputs == 0,
        BIAS=bias is not None, NORM=norm is not None, GATED=gated, RESIDUAL=residual is not None,
        WIDE=x.device.type == "cpu", num_warps=tile.warps, num_stages=stages(x.device, tile.stages),
    )  # fmt: skip
    return out


# Not specialized by the number of rows: one binary for all of them.
@triton.jit(do_not_specialize=("rows", "chunks"))
@no_type_check
def _product(
    x, weight, bias, norm, residual, out, rows, outputs, inputs, eps, chunks,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, EVEN: tl.constexpr,
    BIAS: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) % chunks * ROWS + tl.arange(0, ROWS)
    output = tl.program_id(0) // chunks * OUTPUTS + tl.arange(0, OUTPUTS)
    there, made = row < rows, output < outputs
    # Rows of the vocabulary times channels pass 2^31 in large models.
    lines = weight + output.to(tl.int64)[None, :] * inputs
    ups = weight + (output.to(tl.int64) + outputs)[None, :] * inputs
    sums = tl.zeros((ROWS, OUTPUTS), tl.float32)
    up_sums = tl.zeros((ROWS, OUTPUTS), tl.float32)
    squares = tl.zeros((ROWS,), tl.float32)
    for start in range(0, inputs, INPUTS):
        place = start + tl.arange(0, INPUTS)
        if EVEN:
            w = tl.load(lines + place[:, None])
            taken = tl.load(x + row[:, None] * inputs + place[None, :], mask=there[:, None], other=0.0)
        else:
            inside = place < inputs
            w = tl.load(lines + place[:, None], mask=inside[:, None] & made[None, :], other=0.0)
            taken = tl.load(
                x + row[:, None] * inputs + place[None, :], mask=there[:, None] & inside[None, :], other=0.0
            )
        if NORM:
            wide = taken.to(tl.float32)
            squares += tl.sum(wide * wide, 1)
            taken = (wide * tl.load(norm + place, mask=place < inputs, other=0.0).to(tl.float32)[None, :]).to(w.dtype)
        sums = dot(taken, w, sums, WIDE)
        if GATED:
            if EVEN:
                u = tl.load(ups + place[:, None])
            else:
                u = tl.load(ups + place[:, None], mask=inside[:, None] & made[None, :], other=0.0)
            up_sums = dot(taken, u, up_sums, WIDE)
    if NORM:
        scale = tl.rsqrt(squares / inputs + eps)[:, None]
        sums *= scale
        up_sums *= scale
    if BIAS:
        sums += tl.load(bias + output, mask=made, other=0.0).to(tl.float32)[None, :]
    if GATED:
        if BIAS:
            up_sums += tl.load(bias + outputs + output, mask=made, other=0.0).to(tl.float32)[None, :]
        sums = sums / (1.0 + tl.exp(-sums)) * up_sums
    kept = there[:, None] & made[None, :]
    target = row.to(tl.int64)[:, None] * outputs + output[None, :]
    if RESIDUAL:
        sums += tl.load(residual + target, mask=kept, other=0.0).to(tl.float32)
    tl.store(out + target, sums.to(out.dtype.element_ty), mask=kept)

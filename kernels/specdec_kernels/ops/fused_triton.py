"""The operations of `fused` in Triton, one launch each. A row's bits do not depend on the other rows."""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

_BLOCK = 1024


def refuse(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> str | None:
    """Why the kernels cannot take rows of this type and shape, or `None`."""
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"computes in float32 and narrower, not in {str(dtype).removeprefix('torch.')}"
    return None


def rms_norm_residual(
    hidden: Float[Tensor, "*rows h"],
    delta: Float[Tensor, "*rows h"] | None,
    weight: Float[Tensor, " h"],
    eps: float,
) -> tuple[Float[Tensor, "*rows h"], Float[Tensor, "*rows h"]]:
    """See `fused.rms_norm_residual`."""
    hidden = hidden.contiguous()
    normed = torch.empty_like(hidden)
    total = hidden if delta is None else torch.empty_like(hidden)
    size = hidden.shape[-1]
    if hidden.numel():
        block = triton.next_power_of_2(size)
        _norm[(hidden.numel() // size,)](
            hidden, hidden if delta is None else delta.contiguous(), weight, total, normed, size, eps,
            ADD=delta is not None, BLOCK=block, num_warps=max(1, min(16, block // 512)),
        )  # fmt: skip
    return total, normed


def silu_mul(inner: Float[Tensor, "*rows two_h"]) -> Float[Tensor, "*rows h"]:
    """See `fused.silu_mul`."""
    inner = inner.contiguous()
    size = inner.shape[-1] // 2
    out = inner.new_empty((*inner.shape[:-1], size))
    if out.numel():
        block = min(_BLOCK, triton.next_power_of_2(size))
        _silu_mul[(out.numel() // size, triton.cdiv(size, block))](inner, out, size, BLOCK=block, num_warps=4)
    return out


def rope_write(
    heads: Float[Tensor, "b n all_heads d"],
    rotation: Float[Tensor, "b n half_d 2"],
    slots: Int[Tensor, "b n"],
    keys: Float[Tensor, "b c kv_heads d"],
    values: Float[Tensor, "b c kv_heads d"],
    head_norm: Float[Tensor, "turning d"] | None = None,
    eps: float = 0.0,
) -> Float[Tensor, "b n heads d"]:
    """See `fused.rope_write`. Raises `ValueError` for a layout of the cache it cannot write."""
    if keys.stride() != values.stride() or keys.stride(3) != 1:
        raise ValueError(
            "rope_write writes keys and values of one layout with contiguous heads; pass views of one cache"
        )
    rows, n, every, size = heads.shape
    kv_heads = keys.shape[2]
    heads, rotation, slots = heads.contiguous(), rotation.contiguous(), slots.contiguous()
    query = heads.new_empty((rows, n, every - 2 * kv_heads, size))
    if heads.numel():
        _rope_write[(rows * n, every)](
            heads, rotation, slots, keys, values, heads if head_norm is None else head_norm, query,
            n, every, kv_heads, eps, *keys.stride()[:3],
            HALF=size // 2, NORM=head_norm is not None, BLOCK=triton.next_power_of_2(size // 2), num_warps=1,
        )  # fmt: skip
    return query


@triton.jit
@no_type_check
def _norm(hidden, delta, weight, total, normed, size, eps, ADD: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * size
    channel = tl.arange(0, BLOCK)
    inside = channel < size
    stored = tl.load(hidden + start + channel, mask=inside, other=0.0)
    x = stored.to(tl.float32)
    if ADD:
        x += tl.load(delta + start + channel, mask=inside, other=0.0).to(tl.float32)
        # What goes on is the sum as it is stored, so that the norm is that of the residual stream.
        x = x.to(stored.dtype)
        tl.store(total + start + channel, x, mask=inside)
        x = x.to(tl.float32)
    x *= tl.rsqrt(tl.sum(x * x, 0) / size + eps)
    x *= tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + start + channel, x.to(stored.dtype), mask=inside)


@triton.jit
@no_type_check
def _silu_mul(inner, out, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < size
    stored = tl.load(inner + row * 2 * size + channel, mask=inside, other=0.0)
    gate = stored.to(tl.float32)
    up = tl.load(inner + row * 2 * size + size + channel, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * size + channel, (gate / (1.0 + tl.exp(-gate)) * up).to(stored.dtype), mask=inside)


@triton.jit(do_not_specialize=("n",))
@no_type_check
def _rope_write(
    heads, rotation, slots, keys, values, head_norm, query, n, every, kv_heads, eps,
    slot_row, slot_slot, slot_head,
    HALF: tl.constexpr, NORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    queries = every - 2 * kv_heads
    pair = tl.arange(0, BLOCK)
    inside = pair < HALF
    even = 2 * pair
    source = heads + (item * every + head) * 2 * HALF
    first = tl.load(source + even, mask=inside, other=0.0)
    second = tl.load(source + even + 1, mask=inside, other=0.0)
    slot = tl.load(slots + item).to(tl.int64)
    cell = (item // n) * slot_row + slot * slot_slot
    if head >= queries + kv_heads:
        cell += (head - queries - kv_heads) * slot_head
        tl.store(values + cell + even, first, mask=inside)
        tl.store(values + cell + even + 1, second, mask=inside)
    else:
        x, y = first.to(tl.float32), second.to(tl.float32)
        if NORM:
            scale = tl.rsqrt(tl.sum(x * x + y * y, 0) / (2 * HALF) + eps)
            x *= scale * tl.load(head_norm + head * 2 * HALF + even, mask=inside, other=0.0).to(tl.float32)
            y *= scale * tl.load(head_norm + head * 2 * HALF + even + 1, mask=inside, other=0.0).to(tl.float32)
        turn = rotation + item * 2 * HALF
        cosine = tl.load(turn + even, mask=inside, other=0.0)
        sine = tl.load(turn + even + 1, mask=inside, other=0.0)
        real = (x * cosine - y * sine).to(first.dtype)
        imaginary = (x * sine + y * cosine).to(first.dtype)
        if head < queries:
            target = query + (item * queries + head) * 2 * HALF
            tl.store(target + even, real, mask=inside)
            tl.store(target + even + 1, imaginary, mask=inside)
        else:
            cell += (head - queries) * slot_head
            tl.store(keys + cell + even, real, mask=inside)
            tl.store(keys + cell + even + 1, imaginary, mask=inside)

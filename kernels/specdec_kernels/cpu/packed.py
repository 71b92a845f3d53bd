"""Weights as the CPU kernels read them, and the product over them.

Outputs are grouped into panels of 16 whose weights lie side by side, so that one vector load serves 16 outputs and a
panel is read front to back. Formats, with what one product costs in memory:

======  ================  =====================================================================================
format  bytes per weight  arithmetic
======  ================  =====================================================================================
fp32    4                 float32
fp16    2                 float32, weights rounded to float16
bf16    2                 float32, weights rounded to bfloat16
int8    1                 integers: weights up to 127 times a scale per output channel (or per `block` of input
                          channels), inputs up to 32767 times a scale per row
int4    0.56              integers: weights -8 to 7 times a float16 scale per 32 input channels, inputs up to 127
                          times a scale per row and 32 channels
======  ================  =====================================================================================

Inputs of int8 are 16 bits wide because that costs nothing: without an instruction for sums of int8 products, the
processor multiplies int16 anyway. So int8 loses what rounding its weights loses, and no more.

Every result is the same bits whatever other rows are in the call and however many threads compute it: an output is
one chain of operations in the order of the input channels.
"""

import ctypes
import mmap
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional

from specdec_kernels.cpu import library

FORMATS = ("fp32", "fp16", "bf16", "int8", "int4")
PANEL = 16
GROUP = 32
# A sum of 512 products of 127 and 32767 is the longest that fits into an int32.
MAX_BLOCK = 512
# Below this the kernels take an input for zero.
_TINY = 1e-30

Allocate = Callable[[int], Tensor]


@dataclass(frozen=True, eq=False)
class Packed:
    """A linear layer's weights. `columns`: input channels padded to what the format needs. `block`: input channels
    that share a scale. `data`, `scales`: bytes in the layout of the kernels. `matrix`: the same as a C structure."""

    format: str
    out_features: int
    in_features: int
    columns: int
    block: int
    data: UInt8[Tensor, " bytes"]
    scales: UInt8[Tensor, " scale_bytes"] | None
    bias: Float[Tensor, " padded"] | None
    matrix: library.Matrix

    @property
    def bytes(self) -> int:
        return sum(part.nbytes for part in (self.data, self.scales, self.bias) if part is not None)


class Arena:
    """Memory for packed weights in large pieces that the system may back with huge pages.

    Reading half a gigabyte per token through 4 KiB pages spends more time on address translation than on some of the
    layers. Tensors keep their piece alive.
    """

    def __init__(self, piece_bytes: int = 64 << 20) -> None:
        self._piece_bytes = piece_bytes
        self._piece = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def __call__(self, count: int) -> UInt8[Tensor, " bytes"]:
        if self._used + count > self._piece.numel():
            self._piece, self._used = _map(max(count, self._piece_bytes)), 0
        taken = self._piece[self._used : self._used + count]
        self._used = (self._used + count + 63) // 64 * 64
        return taken


def _map(count: int) -> Tensor:
    page = 2 << 20
    memory = mmap.mmap(-1, (count + 2 * page - 1) // page * page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    # Huge pages begin at multiples of their size.
    return whole[-whole.data_ptr() % page :]


def pack(
    weight: Float[Tensor, "out in"],
    bias: Float[Tensor, " out"] | None,
    format: str = "fp32",
    *,
    block: int | None = None,
    allocate: Allocate | None = None,
) -> Packed:
    """`weight` in the layout of the kernels; `block` as in the table above, for int8 only (default: whole rows).

    `allocate(bytes)` makes the memory; one `Arena` for all layers of a model is best.
    """
    if format not in FORMATS:
        raise ValueError(f"format {format!r} is not one of {', '.join(FORMATS)}")
    if block is not None and (format != "int8" or block % 2 or not 2 <= block <= MAX_BLOCK):
        raise ValueError(f"block {block} with format {format}: blocks are for int8, even, and at most {MAX_BLOCK}")
    out_features, in_features = weight.shape
    allocate = allocate or Arena(4096)
    rows = -out_features % PANEL
    unit = {"int8": 2, "int4": GROUP}.get(format, 1)
    padded = functional.pad(weight.detach().float(), (0, -in_features % unit, 0, rows))
    columns, scales = padded.shape[1], None
    size = {"int8": block or MAX_BLOCK, "int4": GROUP}.get(format, 0)
    if format == "int8":
        values, scales = _int8(padded, block)
        data = values.view(-1, PANEL, columns // 2, 2).transpose(1, 2)
    elif format == "int4":
        values, scales = _int4(padded)
        # [panels, 16, columns] to [panels, columns / 4, half, 8 * 4]: low nibbles are the first 8 outputs.
        quads = values.view(-1, 2, PANEL // 2, columns // 4, 4).permute(0, 3, 1, 2, 4)
        data = quads[:, :, 0] | quads[:, :, 1] << 4
    else:
        stored = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[format]
        data = padded.to(stored).view(-1, PANEL, columns).transpose(1, 2)
    # [rows, blocks] to [panels, blocks, 16]
    spread = None if scales is None else scales.view(-1, PANEL, scales.shape[1]).transpose(1, 2)
    return _finish(format, (out_features, in_features, columns, size), data, spread, bias, allocate)


def _finish(
    format: str,
    sizes: tuple[int, int, int, int],
    data: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    allocate: Allocate,
) -> Packed:
    def stored(tensor: Tensor) -> Tensor:
        memory = allocate(tensor.numel() * tensor.element_size())
        memory.view(tensor.dtype).view(tensor.shape).copy_(tensor)
        return memory

    out_features, in_features, columns, block = sizes
    kept = stored(data), None if scales is None else stored(scales)
    offset = None if bias is None else functional.pad(bias.detach().float(), (0, -out_features % PANEL))
    matrix = library.Matrix(
        FORMATS.index(format),
        block,
        out_features,
        in_features,
        columns,
        library.pointer(kept[0]),
        library.pointer(kept[1]),
        library.pointer(offset),
    )
    return Packed(format, out_features, in_features, columns, block, *kept, offset, matrix)


def _blocks(rows: Tensor, block: int) -> Tensor:
    return functional.pad(rows, (0, -rows.shape[1] % block)).view(len(rows), -1, block)


def _int8(rows: Float[Tensor, "out in"], block: int | None) -> tuple[Tensor, Tensor]:
    """Integers up to 127 and their scales `[out, blocks]`; whole rows repeat theirs in every block."""
    size = block or MAX_BLOCK
    scale = _blocks(rows, size).abs().amax(2) / 127.0
    if block is None:
        scale = scale.amax(1, keepdim=True).expand_as(scale)
    safe = torch.where(scale > _TINY, scale, 1.0)
    values = (_blocks(rows, size) / safe[:, :, None]).round().clamp(-127, 127)
    return values.to(torch.int8).flatten(1)[:, : rows.shape[1]].contiguous(), torch.where(scale > _TINY, scale, 0.0)


def _int4(rows: Float[Tensor, "out in"]) -> tuple[Tensor, Tensor]:
    """Integers 0 to 15, standing for -8 to 7, and float16 scales `[out, groups]`.

    The value of largest magnitude becomes -8, so all 16 levels are used; then the scale is fitted to the levels by
    least squares.
    """
    groups = rows.view(len(rows), -1, GROUP)
    extreme = groups.gather(2, groups.abs().argmax(2, keepdim=True))
    levels = _levels(groups, extreme / -8.0)
    power = levels.square().sum(2, keepdim=True)
    fitted = (groups * levels).sum(2, keepdim=True) / power.clamp(min=1.0)
    scale = fitted.half()
    values = _levels(groups, scale.float()) + 8
    return values.to(torch.uint8).flatten(1), scale[:, :, 0]


def _levels(groups: Tensor, scale: Tensor) -> Tensor:
    return (groups / torch.where(scale.abs() > _TINY, scale, 1.0)).round().clamp(-8, 7)


def unpack(packed: Packed) -> Float[Tensor, "out in"]:
    """The weights that `packed` stands for, in float32."""
    columns, rows = packed.columns, -(-packed.out_features // PANEL) * PANEL
    if packed.format in ("int8", "int4"):
        assert packed.scales is not None
        if packed.format == "int8":
            values = packed.data.view(torch.int8).view(-1, columns // 2, PANEL, 2).transpose(1, 2)
            scales = packed.scales.view(torch.float32)
        else:
            pairs = packed.data.view(-1, columns // 4, PANEL // 2, 4)
            values = torch.stack([pairs & 15, pairs >> 4], 2).permute(0, 2, 3, 1, 4).to(torch.int8) - 8
            scales = packed.scales.view(torch.float16).float()
        scales = scales.view(len(values), -1, PANEL).transpose(1, 2).reshape(rows, -1)
        weight = values.reshape(rows, columns).float() * scales.repeat_interleave(packed.block, 1)[:, :columns]
    else:
        stored = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[packed.format]
        weight = packed.data.view(stored).view(-1, columns, PANEL).transpose(1, 2).reshape(rows, columns).float()
    return weight[: packed.out_features, : packed.in_features]


def linear(
    packed: Packed, x: Float[Tensor, "*rows in"], *, threads: int | None = None, instruction_set: str | None = None
) -> Float[Tensor, "*rows out"]:
    """`x W^T + b` by the kernels; `threads` defaults to torch's number, `instruction_set` to the fastest here."""
    kernels = library.load()
    if x.shape[-1] != packed.in_features:
        raise ValueError(f"x has {x.shape[-1]} channels, the weights take {packed.in_features}")
    rows = x.detach().contiguous()
    library.check_tensor("x", rows, torch.float32)
    y = torch.empty(*x.shape[:-1], packed.out_features)
    if y.numel():
        name = instruction_set or kernels.instruction_sets[0]
        _check_instruction_set(name, kernels)
        count = rows.numel() // max(1, packed.in_features)
        status = kernels.linear(
            name.encode(), ctypes.byref(packed.matrix), rows.data_ptr(), count, y.data_ptr(),
            threads or torch.get_num_threads(),
        )  # fmt: skip
        library.check_status(status)
    return y


def build_linear(
    weight: Float[Tensor, "out in"],
    bias: Float[Tensor, " out"] | None,
    format: str = "fp32",
    *,
    block: int | None = None,
) -> Callable[[Tensor], Tensor]:
    """The function `[.. in] -> [.. out]` of one linear layer, as `specdec_kernels.linear.pack` makes them."""
    return partial(linear, pack(weight, bias, format, block=block))


def _check_instruction_set(name: str, kernels: library.Library) -> None:
    if name not in kernels.instruction_sets:
        raise ValueError(
            f"instruction set {name!r} does not run here; use one of {', '.join(kernels.instruction_sets)}"
        )


def reference(packed: Packed, x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
    """The definition: the same roundings of weights and inputs, summed in float64."""
    return functional.linear(rounded(packed, x), unpack(packed).double(), _bias(packed)).float()


def rounded(packed: Packed, x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows in"]:
    """The inputs as a product over `packed` sees them, in float64."""
    if packed.format not in ("int8", "int4"):
        return x.double()
    top, size = (32767.0, x.shape[-1]) if packed.format == "int8" else (127.0, GROUP)
    padded = functional.pad(x, (0, -x.shape[-1] % size))
    groups = padded.view(*x.shape[:-1], -1, size)
    largest = groups.abs().amax(-1, keepdim=True)
    used = largest >= _TINY
    safe = torch.where(used, largest, 1.0)
    inverse = torch.where(used, torch.full_like(safe, top) / safe, 0.0)
    values = (groups * inverse).round().double() * torch.where(used, safe / top, 0.0).double()
    return values.flatten(-2)[..., : x.shape[-1]]


def _bias(packed: Packed) -> Tensor | None:
    return None if packed.bias is None else packed.bias[: packed.out_features].double()

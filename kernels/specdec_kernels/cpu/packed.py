"""Weights as the CPU kernels read them, and the product over them.

Outputs are grouped into panels of 16 whose weights lie side by side, so that one vector load serves 16 outputs and a
panel is read front to back. Formats, with what one product costs in memory:

======  ================  =====================================================================================
format  bytes per weight  arithmetic
======  ================  =====================================================================================
fp32    4                 float32
fp16    2                 float32, weights rounded to float16
bf16    2                 float32, weights rounded to bfloat16
int8    1.06              integers: weights up to 127 times a float16 scale per output and 32 input channels, GGUF's
                          Q8_0 bit for bit
int4    0.63              integers: weights 0 to 15 times a float16 scale plus a float16 minimum per output and 32
                          input channels, GGUF's Q4_1 and Q4_0 bit for bit
======  ================  =====================================================================================

Inputs of integer formats are rounded to 127 levels to each side of zero, with a float32 scale per row and 16 channels.
Sums over 16 channels are exact, on every processor.

Every result is the same bits whatever other rows are in the call and however many threads compute it: an output is
one chain of operations in the order of the input channels.
"""

import ctypes
import mmap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int8, UInt8
from torch import Tensor
from torch.nn import functional

from specdec_kernels.cpu import library

FORMATS = ("fp32", "fp16", "bf16", "int8", "int4")
PANEL = 16
GROUP = 32
# Channels whose inputs share a scale.
INPUT_GROUP = 16
# Bytes of 32 channels of a row in a GGUF file: Q8_0 and Q4_1.
BLOCK_BYTES = {"int8": 34, "int4": 20}
_STORED = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# How far the range of a group of int4 shrinks in the fit, in levels. Of normal weights, 0.077 of the norm is lost
# without a fit, 0.074 with the first of these, 0.072 with all four, and no less with eight.
_NARROWINGS = (0.0, 0.7, 1.5, 2.5)
# Rows that are packed at a time, whole panels: encoding takes several times their memory.
_ROWS = 256
# Below this the kernels take an input for zero.
_TINY = 1e-30

Allocate = Callable[[int], Tensor]


@dataclass(frozen=True, eq=False)
class Packed:
    """A linear layer's weights. `data`, `scales`: bytes in the layout of the kernels. `matrix`: the same as a C
    structure."""

    format: str
    out_features: int
    in_features: int
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
    importance: Float[Tensor, " in"] | None = None,
    allocate: Allocate | None = None,
) -> Packed:
    """`weight` in the layout of the kernels.

    `importance`: how much an error in the weights of each input channel counts where the format has a choice (int4),
    such as the mean square of the channel's inputs. `allocate(bytes)` makes the memory; one `Arena` for all layers of
    a model is best.
    """
    if format not in FORMATS:
        raise ValueError(f"format {format!r} is not one of {', '.join(FORMATS)}")
    out_features, in_features = weight.shape
    columns = columns_of(format, in_features)
    counted = None if importance is None else functional.pad(importance.float(), (0, columns - in_features))

    def encode(rows: Tensor) -> tuple[Tensor, Tensor | None]:
        padded = _pad(rows.float(), columns - in_features)
        if format in _STORED:
            return padded.to(_STORED[format]).view(-1, PANEL, columns).transpose(1, 2), None
        if format == "int4":
            return _interleave(format, *fit_int4(padded, counted))
        return _interleave(format, *_int8(padded))

    return _keep(format, out_features, in_features, map(encode, torch.split(weight.detach(), _ROWS)), bias, allocate)


def pack_blocks(
    blocks: UInt8[Tensor, "out row_bytes"],
    in_features: int,
    bias: Float[Tensor, " out"] | None,
    *,
    allocate: Allocate | None = None,
) -> Packed:
    """Rows of a GGUF file's Q8_0 or Q4_1 blocks, which their length tells apart, in the layout of the kernels: int8
    and int4 without loss.

    A block of 32 channels is a float16 scale, for Q4_1 a float16 minimum, and 32 int8, or 16 bytes whose low nibbles
    are the first 16 channels.
    """
    format = block_format(blocks.shape[1], in_features)
    if format is None:
        raise ValueError(f"rows of {blocks.shape[1]} bytes are not Q8_0 or Q4_1 blocks of {in_features} channels")

    def encode(rows: Tensor) -> tuple[Tensor, Tensor]:
        padded = _pad(rows, 0).view(-1, in_features // GROUP, BLOCK_BYTES[format])
        if format == "int8":
            scales, values = padded[..., :2], padded[..., 2:].contiguous().view(torch.int8)
        else:
            scales, values = padded[..., :4], torch.cat([padded[..., 4:] & 15, padded[..., 4:] >> 4], -1)
        return _interleave(format, values.flatten(1), scales.contiguous().view(torch.float16))

    return _keep(format, len(blocks), in_features, map(encode, torch.split(blocks, _ROWS)), bias, allocate)


def block_format(row_bytes: int, in_features: int) -> str | None:
    """The format that holds GGUF rows of so many bytes, or `None`."""
    found = (name for name, size in BLOCK_BYTES.items() if row_bytes * GROUP == in_features * size)
    return next(found, None) if in_features % GROUP == 0 else None


def columns_of(format: str, in_features: int) -> int:
    """Input channels padded to what the format needs."""
    unit = 1 if format in _STORED else GROUP
    return -(-in_features // unit) * unit


def sizes_of(format: str, out_features: int, in_features: int) -> tuple[int, int]:
    """Bytes of `Packed.data` and of `Packed.scales`."""
    weights = -(-out_features // PANEL) * PANEL * columns_of(format, in_features)
    if format in _STORED:
        return weights * _STORED[format].itemsize, 0
    return (weights, 2 * weights // GROUP) if format == "int8" else (weights // 2, 4 * weights // GROUP)


def adopt(
    format: str,
    out_features: int,
    in_features: int,
    data: UInt8[Tensor, " bytes"],
    scales: UInt8[Tensor, " scale_bytes"] | None,
    bias: Float[Tensor, " padded"] | None,
) -> Packed:
    """Weights that already lie as the kernels read them, in memory that begins at a multiple of 64 bytes; `bias` is
    padded to whole panels.

    Raises `ValueError` for an unknown format and for memory of another size than the format has.
    """
    if format not in FORMATS:
        raise ValueError(f"format {format!r} is not one of {', '.join(FORMATS)}")
    found = data.numel(), 0 if scales is None else scales.numel()
    expected, padded = sizes_of(format, out_features, in_features), -(-out_features // PANEL) * PANEL
    if found != expected or (bias is not None and bias.shape != (padded,)):
        raise ValueError(f"a {format} matrix of {out_features} by {in_features} takes {expected} bytes, not {found}")
    matrix = library.Matrix(
        FORMATS.index(format),
        out_features,
        in_features,
        columns_of(format, in_features),
        library.pointer(data),
        library.pointer(scales),
        library.pointer(bias),
    )
    return Packed(format, out_features, in_features, data, scales, bias, matrix)


def _pad(rows: Tensor, channels: int) -> Tensor:
    """Rows with so many zeros more, up to whole panels; `pad` would copy where there is nothing to add, too."""
    missing = (0, channels, 0, -len(rows) % PANEL)
    return functional.pad(rows, missing) if any(missing) else rows


def _keep(
    format: str,
    out_features: int,
    in_features: int,
    parts: Iterable[tuple[Tensor, Tensor | None]],
    bias: Tensor | None,
    allocate: Allocate | None,
) -> Packed:
    """The matrix whose panels, data and scales, are `parts` one after another."""
    allocate = allocate or Arena(4096)
    data, scales = (allocate(count) if count else None for count in sizes_of(format, out_features, in_features))
    used = [0, 0]
    for part in parts:
        for kind, (memory, tensor) in enumerate(zip((data, scales), part, strict=True)):
            if memory is not None and tensor is not None:
                end = used[kind] + tensor.numel() * tensor.element_size()
                memory[used[kind] : end].view(tensor.dtype).view(tensor.shape).copy_(tensor)
                used[kind] = end
    offset = None if bias is None else functional.pad(bias.detach().float(), (0, -out_features % PANEL))
    return adopt(format, out_features, in_features, allocate(0) if data is None else data, scales, offset)


def _interleave(format: str, values: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Integers `[out, columns]` and their scales `[out, groups]` or `[out, groups, 2]` in panels."""
    columns = values.shape[1]
    spread = scales.view(-1, PANEL, *scales.shape[1:]).movedim(1, -1)
    if format == "int8":
        return values.view(-1, PANEL, columns // 4, 4).transpose(1, 2), spread
    # [panels, 16, columns] to [panels, columns / 4, half, 8 * 4]: low nibbles are the first 8 outputs.
    quads = values.view(-1, 2, PANEL // 2, columns // 4, 4).permute(0, 3, 1, 2, 4)
    return quads[:, :, 0] | quads[:, :, 1] << 4, spread


def _int8(rows: Float[Tensor, "out in"]) -> tuple[Int8[Tensor, "out in"], Float[Tensor, "out groups"]]:
    """Integers up to 127 and the float16 scales of their groups."""
    groups = rows.view(len(rows), -1, GROUP)
    kept = (groups.abs().amax(2) / 127.0).half()
    wide = kept.float()
    safe = torch.where(wide > _TINY, wide, 1.0)
    values = (groups / safe[:, :, None]).round().clamp(-127, 127)
    return values.to(torch.int8).flatten(1), kept


def fit_int4(
    rows: Float[Tensor, "out in"], importance: Float[Tensor, " in"] | None = None
) -> tuple[UInt8[Tensor, "out in"], Float[Tensor, "out groups 2"]]:
    """Integers 0 to 15 with the float16 scale and minimum of each group that have the least square error.

    The first two candidates are the whole range of the group, and one with -8 at the value of largest magnitude:
    weights that come from GGUF's Q4_1 or Q4_0 are found again exactly. Where neither is exact, narrower ranges follow,
    each improved by least squares.
    """
    counted = torch.ones(rows.shape[1]) if importance is None else importance
    # A few rows at a time, because every candidate takes several times their memory.
    parts = [
        _fit_int4(part.reshape(len(part), -1, GROUP), counted.view(-1, GROUP)) for part in torch.split(rows, _ROWS)
    ]
    return torch.cat([values.flatten(1) for values, _ in parts]), torch.cat([affine for _, affine in parts])


class _Fit(NamedTuple):
    levels: Float[Tensor, "out groups 32"]
    scale: Float[Tensor, "out groups 1"]
    minimum: Float[Tensor, "out groups 1"]
    error: Float[Tensor, "out groups 1"]


def _fit_int4(groups: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    extreme = torch.where(-low >= high, low, high)
    step = (extreme / -8.0).half().float()
    best = _better(_try_int4(groups, (high - low) / 15.0, low, counted), _try_int4(groups, step, -8.0 * step, counted))
    # What float32 rounds when it dequantizes is some 1e-7 of a weight, what four bits round is a hundredth or more.
    if (best.error > 1e-9 * (groups.square() * counted).sum(2, keepdim=True)).any():
        for narrowing in _NARROWINGS:
            tried = _try_int4(groups, (high - low) / (15.0 + narrowing), low, counted)
            best = _better(best, _try_int4(groups, *_least_squares(groups, tried, counted), counted))
    return best.levels.to(torch.uint8), torch.cat([best.scale, best.minimum], 2).half()


def _try_int4(groups: Tensor, scale: Tensor, minimum: Tensor, counted: Tensor) -> _Fit:
    scale, minimum = scale.half().float(), minimum.half().float()
    levels = ((groups - minimum) / torch.where(scale == 0, 1.0, scale)).round().clamp(0, 15)
    error = ((levels * scale + minimum - groups).square() * counted).sum(2, keepdim=True)
    return _Fit(levels, scale, minimum, error)


def _better(one: _Fit, other: _Fit) -> _Fit:
    chosen = other.error < one.error
    return _Fit(*(torch.where(chosen, b, a) for a, b in zip(one, other, strict=True)))


def _least_squares(groups: Tensor, fit: _Fit, counted: Tensor) -> tuple[Tensor, Tensor]:
    """The scale and minimum of least error for these levels."""
    total = counted.sum(1, keepdim=True)
    q, w = (fit.levels * counted).sum(2, keepdim=True), (groups * counted).sum(2, keepdim=True)
    qq = (fit.levels.square() * counted).sum(2, keepdim=True)
    qw = (fit.levels * groups * counted).sum(2, keepdim=True)
    spread = total * qq - q * q
    usable = spread > 1e-6 * total * qq
    safe = torch.where(usable, spread, 1.0)
    scale = torch.where(usable, (total * qw - q * w) / safe, fit.scale)
    return scale, torch.where(usable, (qq * w - q * qw) / safe, fit.minimum)


def unpack(packed: Packed) -> Float[Tensor, "out in"]:
    """The weights that `packed` stands for, in float32."""
    format, columns = packed.format, columns_of(packed.format, packed.in_features)
    rows = -(-packed.out_features // PANEL) * PANEL
    if format in _STORED:
        weight = packed.data.view(_STORED[format]).view(-1, columns, PANEL).transpose(1, 2).reshape(rows, columns)
        return weight[: packed.out_features, : packed.in_features].float()
    assert packed.scales is not None
    if format == "int4":
        pairs = packed.data.view(-1, columns // 4, PANEL // 2, 4)
        values = torch.stack([pairs & 15, pairs >> 4], 2).permute(0, 2, 3, 1, 4)
        affine = packed.scales.view(torch.float16).float().view(len(values), -1, 2, PANEL)
        scales, minima = (part.transpose(1, 2).reshape(rows, -1) for part in affine.unbind(2))
    else:
        values = packed.data.view(torch.int8).view(-1, columns // 4, PANEL, 4).transpose(1, 2)
        stored = packed.scales.view(torch.float16).float()
        scales = stored.view(len(values), -1, PANEL).transpose(1, 2).reshape(rows, -1)
        minima = torch.zeros_like(scales)
    groups = values.reshape(rows, scales.shape[1], -1).float()
    weight = (groups * scales[:, :, None] + minima[:, :, None]).flatten(1)
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
) -> Callable[[Tensor], Tensor]:
    """The function `[.. in] -> [.. out]` of one linear layer, as `specdec_kernels.linear.pack` makes them."""
    return partial(linear, pack(weight, bias, format))


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
    if packed.format in _STORED:
        return x.double()
    padded = functional.pad(x, (0, -x.shape[-1] % INPUT_GROUP))
    groups = padded.view(*x.shape[:-1], -1, INPUT_GROUP)
    largest = groups.abs().amax(-1, keepdim=True)
    used = largest >= _TINY
    safe = torch.where(used, largest, 1.0)
    inverse = torch.where(used, torch.full_like(safe, 127.0) / safe, 0.0)
    values = (groups * inverse).round().double() * torch.where(used, safe / 127.0, 0.0).double()
    return values.flatten(-2)[..., : x.shape[-1]]


def _bias(packed: Packed) -> Tensor | None:
    return None if packed.bias is None else packed.bias[: packed.out_features].double()

"""Linear layers over weights packed once: `y = x W^T + b`.

`torch` is the definition. `cpu` is `cpu.packed`, in any of its formats. `onednn` hands oneDNN the weight in a blocked
layout of its own choice instead of the checkpoint's rows, which matters for the few rows of a verification. `fbgemm`
keeps weights in float16 and computes in float32. `triton` is `ops.product_triton`, for a few rows on a GPU. All 120
products of a 135M Llama-shaped model (30 layers, hidden 576, inner 1536) plus its 49152-token head, float32, random
weights, torch 2.13 with MKL, 2 threads on an AVX2 AMD EPYC that others used too, milliseconds, minimum of 25 runs:

=======  =====  ======  ======  ======  ======
rows     1      2       4       8       16
=======  =====  ======  ======  ======  ======
torch    40.2   79.6    86.6    82.8    87.7
onednn   27.2   25.3    31.8    40.8    49.5
=======  =====  ======  ======  ======  ======

Which is fastest depends on the shapes and the machine, so `compare` measures it, and whether a row of the result is the
same bits in any company. `cpu` promises that. `onednn` kept it in the shapes tried (torch 2.13, AVX-512) except those
with long sums, 1536 and 3072 channels; `fbgemm` in all of them, `torch` in none.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from statistics import median
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from specdec_kernels.clock import Clock

Linear = Callable[[Tensor], Tensor]

# The layout depends on how many rows oneDNN is told to expect. Told 4, 8 or 16 it runs 1 to 16 rows equally fast
# within the noise; told 1, it takes 1.3 to 1.8 times as long for 2 rows and more.
_EXPECTED_ROWS = 8


# What runs on a CPU, and in which formats it keeps float32 weights; `fp32` elsewhere means: as they are.
ON_CPU = ("cpu", "onednn", "fbgemm", "torch")
_FORMATS = {"cpu": ("fp32", "fp16", "bf16", "int8", "int4"), "fbgemm": ("fp16",)}

# Rows of a plain round, of a short draft and of a long one.
ROWS = (1, 4, 8)
_PROBED_ROWS = 17

# Float32 weights per shape and implementation while comparing. Implementations take turns, so that three or four
# times this passes through the caches between two uses of the same weights.
_COMPARED_BYTES = 24 << 20


class Timing(NamedTuple):
    """`turns`: seconds of all products of a forward, by the number of rows, measured again and again. `alone`: in the
    shapes compared, a row of the result was the same bits whatever rows came with it."""

    turns: Mapping[int, Sequence[float]]
    alone: bool

    @property
    def seconds(self) -> dict[int, float]:
        return {rows: median(times) for rows, times in self.turns.items()}


def pack(
    weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None, implementation: str, format: str = "fp32"
) -> Linear:
    """The function `[.. in] -> [.. out]` of a linear layer; it may keep a copy of `weight` in another layout.

    `implementation`: a key of `IMPLEMENTATIONS`; see `specdec_kernels.dispatch.choose` for which of them can run.
    `format`: one of `formats_of` it.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"linear has no implementation {implementation!r}; use one of {', '.join(IMPLEMENTATIONS)}")
    if format not in formats_of(implementation):
        raise ValueError(
            f"linear: {implementation} keeps weights in {', '.join(formats_of(implementation))}, not in {format}"
        )
    if implementation == "cpu":
        return _pack_cpu(weight, bias, format)
    return IMPLEMENTATIONS[implementation](weight, bias)


def formats_of(implementation: str) -> tuple[str, ...]:
    """The formats in which an implementation can keep float32 weights."""
    return _FORMATS.get(implementation, ("fp32",))


def compare(
    shapes: Mapping[tuple[int, int], int], names: Sequence[str], format: str, *, repeats: int = 5
) -> dict[str, Timing]:
    """What the products of one forward cost by each implementation, in random weights of the given shapes.

    `shapes`: how many matrices there are of each `(out, in)`. Of many or large ones a part stands for all. In each of
    `repeats` turns every implementation runs once, so that a machine that slows down meanwhile slows them all; one more
    turn warms up.
    """
    turns = {(name, rows): [0.0] * repeats for name in names for rows in ROWS}
    alone = dict.fromkeys(names, True)
    generator, clock = torch.Generator().manual_seed(0), Clock()
    for (out, into), count in shapes.items():
        height = min(out, max(1, _COMPARED_BYTES // (4 * into)))
        copies = min(count, max(1, _COMPARED_BYTES // (4 * into * height)))
        share = copies * height / (count * out)
        weight = torch.randn(height, into, generator=generator) / into**0.5
        inputs = torch.randn(_PROBED_ROWS, into, generator=generator)
        layers = {name: [pack(weight, None, name, format) for _ in range(copies)] for name in names}
        for name, (layer, *_) in layers.items():
            alone[name] = alone[name] and _rows_alone(layer, inputs)
        for turn in range(-1, repeats):
            for (name, rows), times in turns.items():
                begin = clock.now()
                for layer in layers[name]:
                    layer(inputs[:rows])
                if turn >= 0:
                    times[turn] += (clock.now() - begin) / share
    return {name: Timing({rows: turns[name, rows] for rows in ROWS}, alone[name]) for name in names}


def _rows_alone(layer: Linear, inputs: Tensor) -> bool:
    single = torch.cat([layer(row[None]) for row in inputs])
    return all(torch.equal(layer(inputs[:rows]), single[:rows]) for rows in range(2, len(inputs) + 1))


def refuse_library(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `onednn` or `fbgemm` cannot run linear layers of this type on this device, or `None`."""
    if device.type != "cpu":
        return f"runs on the CPU, not on {device.type}"
    if dtype != torch.float32:
        return f"is built for float32, not for {str(dtype).removeprefix('torch.')}"
    return _probe(name)


@cache
def _probe(name: str) -> str | None:
    # The operators are private to torch and their signatures have changed before, so one tiny layer tells.
    if name == "onednn" and not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return "is not part of this torch"
    x, weight = torch.arange(6.0).view(2, 3), torch.arange(12.0).view(4, 3)
    try:
        same = torch.equal(IMPLEMENTATIONS[name](weight, None)(x), functional.linear(x, weight))
    except (AttributeError, NotImplementedError, RuntimeError, TypeError) as error:
        return f"does not accept packed weights in torch {torch.__version__} ({str(error).splitlines()[0]})"
    return None if same else f"computes wrong products in torch {torch.__version__}"


def _pack_torch(weight: Tensor, bias: Tensor | None) -> Linear:
    return lambda x: functional.linear(x, weight, bias)


def _pack_onednn(weight: Tensor, bias: Tensor | None) -> Linear:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _EXPECTED_ROWS)
    product = torch.ops.mkldnn._linear_pointwise.default

    def linear(x: Tensor) -> Tensor:
        result: Tensor = product(x, packed, bias, "none", [], "")
        return result

    return linear


def _pack_fbgemm(weight: Tensor, bias: Tensor | None) -> Linear:
    packed = torch.ops.quantized.linear_prepack_fp16(weight.contiguous(), bias)
    product = torch.ops.quantized.linear_dynamic_fp16.default

    def linear(x: Tensor) -> Tensor:
        # The operator takes two axes at least.
        result: Tensor = product(x.reshape(-1, x.shape[-1]), packed)
        return result.view(*x.shape[:-1], -1)

    return linear


def _pack_cpu(weight: Tensor, bias: Tensor | None, format: str = "fp32") -> Linear:
    from specdec_kernels.cpu.packed import build_linear

    return build_linear(weight, bias, format)


def _pack_triton(weight: Tensor, bias: Tensor | None) -> Linear:
    from specdec_kernels.ops.product_triton import MOST_ROWS, product

    weight = weight.contiguous()

    def linear(x: Tensor) -> Tensor:
        few = x.numel() <= MOST_ROWS * weight.shape[1]
        return product(x, weight, bias) if few else functional.linear(x, weight, bias)

    return linear


IMPLEMENTATIONS: dict[str, Callable[[Tensor, Tensor | None], Linear]] = {
    "cpu": _pack_cpu,
    "onednn": _pack_onednn,
    "fbgemm": _pack_fbgemm,
    "triton": _pack_triton,
    "torch": _pack_torch,
}

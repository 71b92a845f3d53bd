"""Linear layers over weights packed once: `y = x W^T + b`.

`torch` is the definition. `triton` is `ops.product_triton`, for a few rows on a GPU. `onednn` hands oneDNN the weight
in a blocked layout of its own choice instead of the checkpoint's rows, which matters for the few rows of a
verification. `cpu` is `cpu.packed`, where a row has the same bits in any company. All 120 products of a 135M
Llama-shaped model (30 layers, hidden 576, inner 1536) plus its 49152-token head, float32, random weights, torch 2.13
with MKL, 2 threads on an AVX2 AMD EPYC that others used too, milliseconds, minimum of 25 runs:

=======  =====  ======  ======  ======  ======
rows     1      2       4       8       16
=======  =====  ======  ======  ======  ======
torch    40.2   79.6    86.6    82.8    87.7
onednn   27.2   25.3    31.8    40.8    49.5
=======  =====  ======  ======  ======  ======
"""

from collections.abc import Callable
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

Linear = Callable[[Tensor], Tensor]

# The layout depends on how many rows oneDNN is told to expect. Told 4, 8 or 16 it runs 1 to 16 rows equally fast
# within the noise; told 1, it takes 1.3 to 1.8 times as long for 2 rows and more.
_EXPECTED_ROWS = 8


def pack(weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None, implementation: str) -> Linear:
    """The function `[.. in] -> [.. out]` of a linear layer; it may keep a copy of `weight` in another layout.

    `implementation`: a key of `IMPLEMENTATIONS`; see `specdec_kernels.dispatch.choose` for which of them can run.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"linear has no implementation {implementation!r}; use one of {', '.join(IMPLEMENTATIONS)}")
    return IMPLEMENTATIONS[implementation](weight, bias)


def refuse_onednn(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why oneDNN cannot run linear layers of this type on this device, or `None`."""
    if device.type != "cpu":
        return f"runs on the CPU, not on {device.type}"
    if dtype != torch.float32:
        return f"is built for float32, not for {str(dtype).removeprefix('torch.')}"
    return _probe_onednn()


@cache
def _probe_onednn() -> str | None:
    # The operators are private to torch and their signatures have changed before, so one tiny layer tells.
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return "is not part of this torch"
    x, weight = torch.arange(6.0).view(2, 3), torch.arange(12.0).view(4, 3)
    try:
        same = torch.equal(_pack_onednn(weight, None)(x), functional.linear(x, weight))
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


def _pack_cpu(weight: Tensor, bias: Tensor | None) -> Linear:
    from specdec_kernels.cpu.packed import build_linear

    return build_linear(weight, bias)


def _pack_triton(weight: Tensor, bias: Tensor | None) -> Linear:
    from specdec_kernels.ops.product_triton import MOST_ROWS, product

    weight = weight.contiguous()

    def linear(x: Tensor) -> Tensor:
        few = x.numel() <= MOST_ROWS * weight.shape[1]
        return product(x, weight, bias) if few else functional.linear(x, weight, bias)

    return linear


IMPLEMENTATIONS: dict[str, Callable[[Tensor, Tensor | None], Linear]] = {
    "onednn": _pack_onednn,
    "cpu": _pack_cpu,
    "triton": _pack_triton,
    "torch": _pack_torch,
}

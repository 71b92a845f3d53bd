"""`layers` in CUDA C++: one launch, a block for every multiprocessor; see `cuda/layers.cu`.

A node's results are the same bits for any number of nodes up to 8 and whatever its neighbours and the capacity.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from specdec_kernels.cuda import library
from specdec_kernels.ops.attention import MAX_WIDTH
from specdec_kernels.ops.layers import MOST_NODES, Ends, Forward, Layer

# Inputs of a normed product, of which a thread takes two pieces.
MOST_HIDDEN = 4096
# Bulk copies into shared memory, and registers that move between warps, came with Hopper.
_CAPABILITY = (9, 0)
_HEAD_SIZES = (64, 128)
_PARAMETERS = "14P13q2f"
_THREADS = 384
# As in the source: bytes of a stage of the ring, the most stages, blocks that share a key head, queries of a tile,
# warps that attend to different slots, and pointers of a layer.
_STAGE, _MOST_STAGES, _PARTS, _QUERIES, _MIXING, _POINTERS = 16 * (512 * 2 + 64), 16, 8, 16, 4, 11
# Fewer stages do not cover what the blocks wait for each other.
_FEWEST_STAGES = 4


def refuse(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> str | None:
    """Why the kernel cannot take a model of this type and `shape`, `(nodes, layers, hidden, inner, head size)`, or
    `None`."""
    if dtype not in (torch.float16, torch.bfloat16):
        return f"is built for float16 and bfloat16, not for {str(dtype).removeprefix('torch.')}"
    if shape:
        nodes, _, hidden, inner, size = shape
        if nodes > MOST_NODES:
            return f"is built for up to {MOST_NODES} nodes, not for {nodes}"
        if size not in _HEAD_SIZES:
            return f"is built for heads of 64 and 128 channels, not of {size}"
        if hidden > MOST_HIDDEN:
            return f"norms up to {MOST_HIDDEN} channels, not {hidden}"
        if hidden % 8 or inner % 8:
            return f"reads 8 channels at a time, and {hidden if hidden % 8 else inner} are no multiple of that"
    reason = library.available("layers", device)
    if reason is not None:
        return reason
    if torch.cuda.get_device_capability(device) < _CAPABILITY:
        return "needs bulk copies into shared memory, which GPUs have from compute capability 9.0 on"
    if torch.cuda.get_device_properties(device).multi_processor_count < _PARTS:
        # Else a block would wait for one that it keeps from starting.
        return f"needs {_PARTS} multiprocessors"
    if shape:
        _, count, hidden, _, size = shape
        stages, _ = _divide_shared(_most_shared(device), size, count, MOST_NODES, hidden)
        if stages < _FEWEST_STAGES:
            return f"needs more shared memory for {count} layers of {hidden} channels than a block can have here"
    return None


def bind_layers(stack: Sequence[Layer], ends: Ends, eps: float) -> Forward:
    """See `layers.bind_layers`; all tensors are of one 16-bit type. Those that are not contiguous or begin at no
    multiple of 16 bytes are copied."""
    held = [[None if tensor is None else _in_order(tensor) for tensor in layer] for layer in stack]
    ends = Ends(*(None if tensor is None else _in_order(tensor) for tensor in ends))  # type: ignore[arg-type]
    device, kind = ends.embedding.device, str(ends.embedding.dtype).removeprefix("torch.")
    rows = [[_address(tensor) for tensor in layer] for layer in held]
    pointers = torch.tensor(rows, dtype=torch.int64).to(device)
    blocks, most = torch.cuda.get_device_properties(device).multi_processor_count, _most_shared(device)
    (every, hidden_size), inner_size, vocab = stack[0].qkv.shape, stack[0].down.shape[1], len(ends.head)

    def run(
        tokens: Int[Tensor, "1 n"],
        rotation: Float[Tensor, "1 n half_d 2"],
        slots: Float[Tensor, "g 1 c kv_heads d"],
        length: Int[Tensor, " 1"],
        ancestors: Int[Tensor, "1 n"] | None,
        *,
        width: int,
        count: int,
        logits: bool,
    ) -> tuple[Float[Tensor, "1 n h"], Float[Tensor, "1 n v"] | None]:
        n, (kv_heads, size) = tokens.shape[1], slots.shape[3:]
        if not 1 <= n <= MOST_NODES:
            raise ValueError(f"layers takes 1 to {MOST_NODES} new nodes, not {n}")
        if not 1 <= count <= len(held):
            raise ValueError(f"layers runs 1 to {len(held)} of its layers, not {count}")
        if ancestors is not None and not n <= width <= MAX_WIDTH:
            raise ValueError(f"a tree of {n} new nodes over a window of {width}: masks hold n to {MAX_WIDTH} slots")
        group = every // size // kv_heads - 2
        lines = min(_QUERIES, n * group)
        joined = kv_heads * -(-n * group // _QUERIES)
        layer_size = n * (every + kv_heads * group * size + 2 * hidden_size + inner_size)
        # In 32-bit words, each beginning at a multiple of 16 bytes.
        told = -(-count * layer_size // 8) * 4
        partial = joined * _PARTS * lines * (size // 2 + 1) * 4
        mail = ends.embedding.new_empty(told + partial + 1, dtype=torch.int32).fill_(-1)
        scores = ends.embedding.new_empty((1, n, vocab), dtype=torch.float32) if logits else None
        tokens, rotation = tokens.contiguous(), rotation.contiguous()
        stages, shared = _divide_shared(most, size, len(held), n, hidden_size)
        # The limit belongs to the kernel, so it is the same for all launches.
        kernel = library.load(
            "layers", f"layers_{kind}_{size}", _PARAMETERS, _THREADS, device, cooperative=True, most_shared=most
        )
        kernel(
            (blocks, 1),
            pointers.data_ptr(),
            ends.embedding.data_ptr(),
            tokens.data_ptr(),
            rotation.data_ptr(),
            slots.data_ptr(),
            length.data_ptr(),
            _address(ancestors),
            ends.norm.data_ptr(),
            ends.head.data_ptr() if logits else 0,
            _address(ends.head_bias),
            _address(scores),
            mail.data_ptr(),
            mail.data_ptr() + 4 * told,
            mail.data_ptr() + 4 * (told + partial),
            n,
            count,
            hidden_size,
            inner_size,
            kv_heads,
            group,
            vocab,
            width,
            stages,
            *(slots.stride(axis) for axis in (0, 2, 3)),
            0 if ancestors is None else ancestors.stride(1),
            eps,
            size**-0.5 * math.log2(math.e),
            shared=shared,
        )
        # The last that the last layer told.
        end = count * layer_size
        hidden = mail.view(ends.embedding.dtype)[end - n * hidden_size : end].view(1, n, hidden_size)
        return hidden, scores

    return run


def _divide_shared(most: int, size: int, count: int, n: int, hidden: int) -> tuple[int, int]:
    """Stages of the ring, and bytes of dynamic shared memory with all that lies beside it, of `most`."""
    # Of the source's `Block`: heads, rotations, softmaxes, squares and barriers.
    block = 96 * size + 1024
    normed, parts = n * (-(-hidden * 2 // 128) * 128 + 64), _MIXING * _QUERIES * size * 4
    beside = block + normed + parts + count * _POINTERS * 8
    stages = min(_MOST_STAGES, (most - beside) // _STAGE)
    return stages, stages * _STAGE + beside


def _most_shared(device: torch.device) -> int:
    """Bytes of shared memory that a block can have."""
    properties = torch.cuda.get_device_properties(device)
    most: int = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    return most


def _in_order(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_contiguous() and tensor.data_ptr() % 16 == 0 else tensor.clone().contiguous()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()

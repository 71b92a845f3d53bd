"""A whole Llama-family forward as one call: every layer, the cache writes, the final norm, the head.

A forward of one token over 135M weights takes 5 to 20 milliseconds, and its 30 layers are some 600 operations if each
is a call of its own. Here it is one parallel region; its definition is the torch decoder in `specdec.models.decoder`.

Row invariance: states, logits and cache entries of a node are the same bits whatever other nodes and rows are in the
call and however many threads run it. So one forward of n nodes equals n forwards of one, and a tree equals its paths.
"""

import ctypes
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from specdec_kernels.cpu import library
from specdec_kernels.cpu.weights import (
    Affine,
    Ends,
    Importance,
    LayerWeights,
    PackedLayer,
    PackedModel,
    Spec,
    misfit,
    pack_model,
)


@dataclass(frozen=True, eq=False)
class Stack:
    """A packed model. `formats`: of the layers and of the head. `structure` is what the kernels read; `kept` holds
    what it points to besides `weights`."""

    hidden: int
    vocab_size: int
    num_layers: int
    kv_heads: int
    head_size: int
    formats: tuple[str, str]
    bytes: int
    weights: PackedModel
    structure: library.Stack
    kept: tuple[Any, ...]


class StackResult(NamedTuple):
    """What was asked for. `states`: after the final norm. `best`, `best_value`: the largest logit, the lowest id among
    equals; a NaN counts as the largest, so it shows."""

    states: Float[Tensor, "b n h"] | None
    logits: Float[Tensor, "b n v"] | None
    best: Int[Tensor, "b n"] | None
    best_value: Float[Tensor, "b n"] | None


def refuse_spec(spec: Spec) -> str | None:
    """Why the stack cannot run this architecture, or `None`."""
    if not spec.rms or not spec.gated or spec.parallel:
        return "runs pre-norm RMSNorm layers with a gated feed-forward block (Llama, Mistral, Qwen2, Qwen3)"
    if spec.activation != "silu":
        return f"computes silu, not {spec.activation}"
    if spec.rotary is None or spec.head_size % 2:
        return "needs rotary positions and heads of even size"
    return None


def build_stack(
    spec: Spec,
    layers: Iterable[LayerWeights],
    final_norm: Float[Tensor, " h"],
    embedding: Tensor,
    head: Affine,
    format: str = "fp32",
    *,
    head_format: str | None = None,
    importance: Importance = lambda name: None,
) -> Stack:
    """Pack a model (`weights.pack_model`) and make it ready to run.

    Raises `ValueError` for an architecture that `refuse_spec` refuses.
    """
    ends = Ends(embedding, final_norm, head)
    packed = pack_model(spec, layers, lambda: ends, format, head_format=head_format, importance=importance)
    return assemble(spec, packed)


def assemble(spec: Spec, model: PackedModel) -> Stack:
    """A packed model, ready to run; it keeps the memory of `model`.

    Raises `ValueError` for an architecture that `refuse_spec` refuses and for weights that are not of this one.
    """
    reason = refuse_spec(spec)
    if reason is not None:
        raise ValueError(f"the CPU stack {reason}")
    problem = misfit(spec, model)
    if problem is not None:
        raise ValueError(problem)
    array = (library.Layer * spec.num_layers)(*(_structure(layer) for layer in model.layers))
    assert spec.rotary is not None
    angles = torch.zeros(spec.head_size // 2)
    angles[: len(spec.rotary)] = spec.rotary
    table = model.embedding
    structure = library.Stack(
        spec.hidden,
        spec.inner,
        spec.heads,
        spec.kv_heads,
        spec.head_size,
        spec.vocab_size,
        spec.norm_eps,
        spec.num_layers,
        array,
        library.pointer(model.final_norm),
        library.pointer(angles),
        library.pointer(table),
        {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}[torch.float32 if table is None else table.dtype],
        model.head.matrix,
    )
    return Stack(
        spec.hidden,
        spec.vocab_size,
        spec.num_layers,
        spec.kv_heads,
        spec.head_size,
        (model.layers[0].down.format if model.layers else model.head.format, model.head.format),
        model.bytes,
        model,
        structure,
        (array, angles),
    )


def _structure(layer: PackedLayer) -> library.Layer:
    vectors = (library.pointer(vector) for vector in (layer.attention_norm, layer.feed_norm, layer.head_norm))
    return library.Layer(*vectors, *(part.matrix for part in (layer.qkv, layer.out, layer.gate, layer.up, layer.down)))


def stack_forward(
    stack: Stack,
    slots: Float[Tensor, "g b c k d"],
    tokens: Int[Tensor, "b n"] | Float[Tensor, "b n h"],
    positions: Int[Tensor, "b n"],
    slot_index: Int[Tensor, "b n"],
    length: Int[Tensor, " b"],
    extent: int,
    mask: Bool[Tensor, "b n w"] | None = None,
    mask_start: Int[Tensor, " b"] | None = None,
    *,
    states: bool = False,
    logits: bool = True,
    best: bool = False,
    num_layers: int | None = None,
    threads: int | None = None,
    instruction_set: str | None = None,
    spent: Int[Tensor, "threads works"] | None = None,
) -> StackResult:
    """Run `tokens` (or embedded tokens) through the stack, writing keys and values to `slots` at `slot_index`.

    `slots [2 * layers, b, c, kv_heads, d]`: group 2 i holds the keys of layer i, group 2 i + 1 its values; no node
    sees a slot at or past `extent`. Without `mask`, node i of a row sees the slots up to `length + i`. With it, a node
    sees the slots before `mask_start` (default 0) and those of the w slots from there on that its row of the mask
    names; itself always. `num_layers`: run the first layers only. `best` without `logits` never writes the logits.
    `spent`: nanoseconds that each thread spent on each of `library.WORKS` are added to it (int64).

    Raises `IndexError` for a token that is not in the vocabulary and for slots outside the cache.
    """
    kernels = library.load()
    name = instruction_set or kernels.instruction_sets[0]
    if name not in kernels.instruction_sets:
        raise ValueError(
            f"instruction set {name!r} does not run here; use one of {', '.join(kernels.instruction_sets)}"
        )
    rows, n = tokens.shape[:2]
    count = stack.num_layers if num_layers is None else num_layers
    if not 0 <= count <= stack.num_layers or slots.shape[0] < 2 * count:
        raise ValueError(f"{count} layers of {stack.num_layers} over a cache with {slots.shape[0]} groups of slots")
    capacity = slots.shape[2]
    library.check_tensor(
        "slots", slots, torch.float32, (slots.shape[0], rows, capacity, stack.kv_heads, stack.head_size)
    )
    embedded = tokens.is_floating_point()
    # Views of rows or columns are common here and small to copy; `slots` is written to and must be the memory itself.
    tokens, positions, slot_index, length = (tensor.contiguous() for tensor in (tokens, positions, slot_index, length))
    if embedded:
        library.check_tensor("tokens", tokens, torch.float32, (rows, n, stack.hidden))
    else:
        library.check_tensor("tokens", tokens, torch.int64, (rows, n))
    library.check_tensor("positions", positions, torch.int64, (rows, n))
    library.check_tensor("slot_index", slot_index, torch.int64, (rows, n))
    library.check_tensor("length", length, torch.int64, (rows,))
    width = 0
    if mask is not None:
        mask, width = mask.contiguous(), mask.shape[2]
        library.check_tensor("mask", mask, torch.bool, (rows, n, width))
        mask_start = torch.zeros_like(length) if mask_start is None else mask_start.contiguous()
        library.check_tensor("mask_start", mask_start, torch.int64, (rows,))
    threads = threads or torch.get_num_threads()
    if spent is not None:
        library.check_tensor("spent", spent, torch.int64, (threads, len(library.WORKS)))
    result = StackResult(
        torch.empty(rows, n, stack.hidden) if states else None,
        torch.empty(rows, n, stack.vocab_size) if logits else None,
        torch.empty(rows, n, dtype=torch.int64) if best else None,
        torch.empty(rows, n) if best else None,
    )
    if not rows * n:
        return result
    call = library.Call(
        slots.data_ptr(),
        rows,
        n,
        capacity,
        extent,
        None if embedded else tokens.data_ptr(),
        tokens.data_ptr() if embedded else None,
        positions.data_ptr(),
        slot_index.data_ptr(),
        length.data_ptr(),
        library.pointer(mask),
        None if mask is None else library.pointer(mask_start),
        width,
        *(library.pointer(tensor) for tensor in result),
        count,
        threads,
        library.pointer(spent),
    )
    library.check_status(kernels.stack(name.encode(), ctypes.byref(stack.structure), ctypes.byref(call)))
    return result

"""The weights of a whole model in the layout of the kernels: packed from tensors, taken apart by name, put together.

A packed model is read from a file as it lies in memory, so a model that was packed once starts as fast as its bytes
can be read.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from specdec_kernels.cpu.packed import Arena, Packed, adopt, pack, pack_blocks, unpack

# Importance of the input channels of a matrix, by the name it has in `tensors_of`; `None` where nothing is known.
Importance = Callable[[str], Tensor | None]


@runtime_checkable
class Affine(Protocol):
    """`weight` and `bias` of a linear layer or norm."""

    @property
    def weight(self) -> Tensor: ...
    @property
    def bias(self) -> Tensor | None: ...


@runtime_checkable
class LayerWeights(Protocol):
    """One layer: queries, keys and values stacked in `qkv`, gate and up in `up`; channels of query and key heads
    ordered so that neighbours rotate together."""

    @property
    def attention_norm(self) -> Affine: ...
    @property
    def qkv(self) -> Affine: ...
    @property
    def head_norm(self) -> Tensor | None: ...
    @property
    def out(self) -> Affine: ...
    @property
    def feed_norm(self) -> Affine: ...
    @property
    def up(self) -> Affine: ...
    @property
    def down(self) -> Affine: ...


@runtime_checkable
class Spec(Protocol):
    """What the stack must know of an architecture; `specdec.models.checkpoint.Spec` is one."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def hidden(self) -> int: ...
    @property
    def inner(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_size(self) -> int: ...
    @property
    def norm_eps(self) -> float: ...
    @property
    def activation(self) -> str: ...
    @property
    def rms(self) -> bool: ...
    @property
    def gated(self) -> bool: ...
    @property
    def parallel(self) -> bool: ...
    @property
    def rotary(self) -> Tensor | None: ...


class Ends(NamedTuple):
    """What stands before and after the layers."""

    embedding: Tensor
    final_norm: Float[Tensor, " h"]
    head: Affine


class PackedLayer(NamedTuple):
    """One layer; norms are float32 vectors."""

    attention_norm: Float[Tensor, " h"]
    feed_norm: Float[Tensor, " h"]
    head_norm: Float[Tensor, "heads d"] | None
    qkv: Packed
    out: Packed
    gate: Packed
    up: Packed
    down: Packed


class PackedModel(NamedTuple):
    """`embedding`: a table in float32, float16 or bfloat16, or `None` where tokens are looked up in the head."""

    layers: tuple[PackedLayer, ...]
    final_norm: Float[Tensor, " h"]
    embedding: Tensor | None
    head: Packed

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in tensors_of(self).values())


def head_format_of(format: str) -> str:
    """The format of the output matrix where those of the layers is `format`.

    It decides between tokens and is the part that suffers most from four bits, so it keeps eight.
    """
    return "int8" if format == "int4" else format


def pack_model(
    spec: Spec,
    layers: Iterable[LayerWeights],
    ends: Callable[[], Ends],
    format: str = "fp32",
    *,
    head_format: str | None = None,
    importance: Importance = lambda name: None,
) -> PackedModel:
    """Pack a model. `ends` is called first and what it returns dropped before the first of `layers` is asked for, so
    with a generator only the ends or one layer are in memory twice.

    A weight of type uint8 is rows of GGUF blocks, which keep their own format (`packed.pack_blocks`). `head_format`:
    by default that of `head_format_of`. Where `head.weight` is `embedding` (tied), tokens are looked up in the packed
    head, as rounded as it is; else in a copy of `embedding` in float32, or in 16 bits when the formats are that narrow.
    """
    arena, head_format = Arena(), head_format or head_format_of(format)

    def matrix(name: str, weight: Tensor, bias: Tensor | None, channels: int, into: str = format) -> Packed:
        if weight.dtype == torch.uint8:
            return pack_blocks(weight, channels, bias, allocate=arena)
        return pack(weight, bias, into, importance=importance(name), allocate=arena)

    def packed_layer(index: int, layer: LayerWeights) -> PackedLayer:
        name = f"layers.{index}"
        gate, up = layer.up.weight.chunk(2)
        biases = (None, None) if layer.up.bias is None else layer.up.bias.chunk(2)
        return PackedLayer(
            _vector(layer.attention_norm.weight),
            _vector(layer.feed_norm.weight),
            None if layer.head_norm is None else _vector(layer.head_norm),
            matrix(f"{name}.qkv", *_both(layer.qkv), spec.hidden),
            matrix(f"{name}.out", *_both(layer.out), spec.heads * spec.head_size),
            matrix(f"{name}.gate", gate, biases[0], spec.hidden),
            matrix(f"{name}.up", up, biases[1], spec.hidden),
            matrix(f"{name}.down", *_both(layer.down), spec.inner),
        )

    def packed_ends(embedding: Tensor, final_norm: Tensor, head: Affine) -> tuple[Tensor, Tensor | None, Packed]:
        table = None
        if head.weight is not embedding:
            stored = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(head_format, torch.float16)
            wide = unpack(pack_blocks(embedding, spec.hidden, None)) if embedding.dtype == torch.uint8 else embedding
            table = wide.detach().to(stored).contiguous()
        return _vector(final_norm), table, matrix("head", *_both(head), spec.hidden, head_format)

    norm, table, head = packed_ends(*ends())
    return PackedModel(tuple(packed_layer(index, layer) for index, layer in enumerate(layers)), norm, table, head)


def _both(part: Affine) -> tuple[Tensor, Tensor | None]:
    return part.weight, part.bias


def _vector(tensor: Tensor) -> Tensor:
    return tensor.detach().float().contiguous().clone()


def parts_of(model: PackedModel) -> Iterator[tuple[str, Packed | Tensor]]:
    """Every matrix and tensor of a model with its name, such as `layers.3.qkv`."""
    for index, layer in enumerate(model.layers):
        yield from ((f"layers.{index}.{field}", part) for field, part in layer._asdict().items() if part is not None)
    yield "final_norm", model.final_norm
    yield "head", model.head
    if model.embedding is not None:
        yield "embedding", model.embedding


def tensors_of(model: PackedModel) -> dict[str, Tensor]:
    """Everything a model consists of, by name: a matrix `m` as `m.data`, `m.scales` and `m.bias`."""
    found: dict[str, Tensor] = {}
    for name, part in parts_of(model):
        if isinstance(part, Packed):
            pieces = {"data": part.data, "scales": part.scales, "bias": part.bias}
            found |= {f"{name}.{piece}": tensor for piece, tensor in pieces.items() if tensor is not None}
        else:
            found[name] = part
    return found


def matrices_of(model: PackedModel) -> dict[str, tuple[str, int, int]]:
    """Format, outputs and inputs of every matrix, by name."""
    return {
        name: (part.format, part.out_features, part.in_features)
        for name, part in parts_of(model)
        if isinstance(part, Packed)
    }


def model_of(tensors: Mapping[str, Tensor], matrices: Mapping[str, Sequence[Any]]) -> PackedModel:
    """The model that `tensors_of` and `matrices_of` took apart; it keeps the memory of `tensors`.

    Raises `ValueError` where a part is missing or does not fit the others.
    """

    def part(name: str) -> Any:
        if name not in matrices:
            return tensors.get(name)
        pieces = [tensors.get(f"{name}.{piece}") for piece in ("data", "scales", "bias")]
        if pieces[0] is None:
            raise ValueError(f"{name} has no data")
        return adopt(*matrices[name], *pieces)

    count = len({name.split(".")[1] for name in matrices if name.startswith("layers.")})
    layers = tuple(
        PackedLayer(*(part(f"layers.{index}.{field}") for field in PackedLayer._fields)) for index in range(count)
    )
    return PackedModel(layers, part("final_norm"), part("embedding"), part("head"))


def misfit(spec: Spec, model: PackedModel) -> str | None:
    """Why a packed model is not one of this architecture, or `None`. The kernels see bare addresses, so whatever
    comes from a file is checked."""
    queries, width = spec.heads * spec.head_size, (spec.heads + 2 * spec.kv_heads) * spec.head_size
    shapes = {
        "qkv": (width, spec.hidden),
        "out": (spec.hidden, queries),
        "gate": (spec.inner, spec.hidden),
        "up": (spec.inner, spec.hidden),
        "down": (spec.hidden, spec.inner),
        "head": (spec.vocab_size, spec.hidden),
        "embedding": (spec.vocab_size, spec.hidden),
        "head_norm": (spec.heads + spec.kv_heads, spec.head_size),
    }
    if len(model.layers) != spec.num_layers:
        return f"{len(model.layers)} layers were given, the configuration has {spec.num_layers}"
    found = dict(parts_of(model))
    needed = [f"layers.{index}.{field}" for index in range(spec.num_layers) for field in PackedLayer._fields]
    for name in (*needed, "final_norm", "head", *(["embedding"] if "embedding" in found else [])):
        field, part = name.rpartition(".")[2], found.get(name)
        if part is None and field == "head_norm":
            continue
        expected, is_matrix = shapes.get(field, (spec.hidden,)), field in ("qkv", "out", "gate", "up", "down", "head")
        shape = (part.out_features, part.in_features) if isinstance(part, Packed) else getattr(part, "shape", None)
        if isinstance(part, Packed) != is_matrix or shape != expected:
            return f"{name} is {shape} where the configuration says {expected}"
        if isinstance(part, Tensor) and (part.dtype != torch.float32) != (field == "embedding" and part.itemsize == 2):
            return f"{name} is {part.dtype}"
    return None

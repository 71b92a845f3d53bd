"""The one form that checkpoints of every architecture are brought to: a `Spec`, weights, and the way to them.

Which names an architecture uses, and what it does differently, is told by `specdec.models.families`.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from specdec.models.report import ModelError
from specdec_kernels.cpu.packed import block_format

ROPE_TYPES = ("default", "linear", "llama3")


@dataclass(frozen=True)
class Spec:
    """An architecture: pre-norm decoder layers of self-attention and a feed-forward block.

    `kv_heads` divides `heads` (grouped-query attention). `rms`: RMSNorm instead of LayerNorm. `gated`: feed-forward
    act(gate) * up. `parallel`: attention and feed-forward read the same residual stream. `rotary`: radians per
    position of each rotating pair of a head's channels, which come first in the head; `None` where positions are
    embedded.
    """

    vocab_size: int
    max_length: int
    num_layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_size: int
    norm_eps: float
    activation: str
    rms: bool
    gated: bool
    parallel: bool = False
    rotary: Float[Tensor, " pairs"] | None = None


class Affine(NamedTuple):
    """`weight [out in]` and `bias [out]` of a linear layer, or both `[h]` of a norm."""

    weight: Tensor
    bias: Tensor | None = None


class LayerWeights(NamedTuple):
    """One layer. `qkv`: queries, keys and values stacked, heads in that order; where the model rotates, the channels
    of a query or key head are ordered so that neighbours form the rotating pairs. `head_norm [heads + kv_heads, d]`:
    RMSNorm weights of query and key heads. `up`: gate and up stacked when the feed-forward block is gated."""

    attention_norm: Affine
    qkv: Affine
    head_norm: Tensor | None
    out: Affine
    feed_norm: Affine
    up: Affine
    down: Affine


class Ends(NamedTuple):
    """What stands before and after the layers. `positions [max_length h]`, or `None` where channels rotate."""

    embedding: Tensor
    positions: Tensor | None
    final_norm: Affine
    head: Affine


class Reader:
    """Takes tensors out of a checkpoint: by name, of the expected shape, cast and moved. Rows of GGUF blocks (uint8)
    stay what they are.

    A checkpoint of a bare backbone lacks the first part of every name (`model.`, `transformer.`), so a missing name
    is tried without it. Raises `ModelError` for a tensor that is missing or of another shape.
    """

    def __init__(self, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device) -> None:
        self._tensors, self._dtype, self._device = tensors, dtype, device
        self._read: set[str] = set()

    def has(self, name: str) -> bool:
        return name in self._tensors

    def take(self, name: str, *shape: int) -> Tensor:
        stored = name if name in self._tensors else name.partition(".")[2]
        if stored not in self._tensors:
            raise ModelError(f"the checkpoint has no tensor {name}, which its configuration implies; fetch it again")
        tensor = self._tensors[stored]
        blocks = tensor.dtype == torch.uint8
        fits = blocks and len(shape) == 2 and len(tensor) == shape[0] and block_format(tensor.shape[1], shape[1])
        if tuple(tensor.shape) != shape and not fits:
            raise ModelError(
                f"{stored} has shape {list(tensor.shape)} where the configuration says {list(shape)}; "
                "configuration and weights are not of the same model"
            )
        self._read.add(stored)
        return tensor if blocks else tensor.detach().to(device=self._device, dtype=self._dtype)

    def affine(self, name: str, *shape: int, bias: bool = True) -> Affine:
        """`name.weight` of this shape and, unless `bias` is false, `name.bias` of its first axis."""
        return Affine(self.take(f"{name}.weight", *shape), self.take(f"{name}.bias", shape[0]) if bias else None)

    def refuse_unread(self, ignored: str) -> None:
        """Raise `ModelError` for tensors nobody asked for, unless their name matches the pattern `ignored`: whatever
        computes with them is another model."""
        unread = [name for name in self._tensors if name not in self._read and not re.search(ignored, name)]
        if unread:
            raise ModelError(
                f"the checkpoint has {len(unread)} tensors that its architecture does not use "
                f"({', '.join(unread[:3])}); use the Hugging Face adapter"
            )


def head_size(config: Any) -> int:
    """Channels of an attention head; newer configurations state it, in older ones the heads share the hidden size."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def refuse_rope(config: Any) -> str | None:
    """Why the configuration's rotary positions are not supported, or `None`."""
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, Mapping) or "rope_theta" not in rope:
        return "the configuration has no single set of rope_parameters"
    kind = rope.get("rope_type", "default")
    if kind not in ROPE_TYPES:
        return f"rope type {kind!r} is not one of {', '.join(ROPE_TYPES)}"
    turning = _turning(config)
    if head_size(config) % 2 or turning % 2:
        return f"rotary positions need pairs, but {turning} of {head_size(config)} channels rotate"
    return None


def rotary_angles(config: Any) -> Float[Tensor, " pairs"]:
    """Radians per position of each rotating pair of channels: theta^(-2 i / d) (RoPE: Su et al., 2021,
    arXiv:2104.09864, section 3.2.2), all divided by `factor` (`linear`: Chen et al., 2023, arXiv:2306.15595), or only
    those that turn less often than `high_freq_factor` times in the original context, fading in down to
    `low_freq_factor` times (`llama3`: Llama 3.1). float32, as the models were trained.
    """
    rope, turning = config.rope_parameters, _turning(config)
    angles: Tensor = 1.0 / rope["rope_theta"] ** (torch.arange(0, turning, 2, dtype=torch.float32) / turning)
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        angles = angles / rope["factor"]
    if kind == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = rope["original_max_position_embeddings"] * angles / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        angles = angles * (kept + (1 - kept) / rope["factor"])
    return angles


def _turning(config: Any) -> int:
    return int(head_size(config) * config.rope_parameters.get("partial_rotary_factor", 1.0))


def paired(spec: Spec, rows: Tensor, heads: int) -> Tensor:
    """`rows [heads * d, ...]` of query or key heads, reordered from halves to pairs.

    In checkpoints channel i rotates with channel i + pairs; here it is its neighbour's partner, so that a pair is one
    complex number. Queries and keys move alike, so their products stay what they were.
    """
    if spec.rotary is None:
        return rows
    pairs = len(spec.rotary)
    partners = torch.arange(2 * pairs).view(2, pairs).T.flatten()
    order = torch.cat([partners, torch.arange(2 * pairs, spec.head_size)]).to(rows.device)
    return rows.view(heads, spec.head_size, *rows.shape[1:])[:, order].flatten(0, 1)


def stacked(*parts: Affine) -> Affine:
    """Linear layers of the same input as one; either all of them have a bias or none."""
    biases = [part.bias for part in parts if part.bias is not None]
    return Affine(torch.cat([part.weight for part in parts]), torch.cat(biases) if biases else None)


def stacked_heads(spec: Spec, query: Affine, key: Affine, value: Affine) -> Affine:
    """Queries, keys and values as one linear layer, in the order of channels that `LayerWeights.qkv` has."""

    def moved(part: Affine, heads: int) -> Affine:
        bias = None if part.bias is None else paired(spec, part.bias, heads)
        return Affine(paired(spec, part.weight, heads), bias)

    return stacked(moved(query, spec.heads), moved(key, spec.kv_heads), value)


def output_head(reader: Reader, config: Any, embedding: Tensor, *names: str) -> Affine:
    """The output matrix: the embedding itself when they are tied, whatever the checkpoint stores besides."""
    if config.tie_word_embeddings:
        return Affine(embedding)
    name = next((name for name in names if reader.has(name)), names[0])
    return Affine(reader.take(name, *embedding.shape))

"""All layers of a Llama-like decoder over a few new nodes of one row, from token ids to logits."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from specdec_kernels.ops.attend import attend
from specdec_kernels.ops.product import product

# More nodes take other ways; see `pays`.
MOST_NODES = 8

# (tokens [1 n], rotation [1 n half_d 2], slots [g 1 c kv_heads d], length [1], ancestors [1 n] or None, width, count,
# logits) -> (the residual stream [1 n h], logits [1 n v] in float32 or None)
Forward = Callable[..., tuple[Tensor, Tensor | None]]


class Layer(NamedTuple):
    """Weights of a layer as `specdec.models.checkpoint.LayerWeights` describes them; biases and `head_norm` may be
    missing."""

    qkv: Float[Tensor, "all_heads_d h"]
    qkv_bias: Float[Tensor, " all_heads_d"] | None
    out: Float[Tensor, "h heads_d"]
    out_bias: Float[Tensor, " h"] | None
    up: Float[Tensor, "two_inner h"]
    up_bias: Float[Tensor, " two_inner"] | None
    down: Float[Tensor, "h inner"]
    down_bias: Float[Tensor, " h"] | None
    attention_norm: Float[Tensor, " h"]
    feed_norm: Float[Tensor, " h"]
    head_norm: Float[Tensor, "turning d"] | None


class Ends(NamedTuple):
    """What stands before and after the layers."""

    embedding: Float[Tensor, "v h"]
    norm: Float[Tensor, " h"]
    head: Float[Tensor, "v h"]
    head_bias: Float[Tensor, " v"] | None


def bind_layers(stack: Sequence[Layer], ends: Ends, eps: float) -> Forward:
    """The forward of these weights, which stay where they are; see `Forward`.

    `slots`: keys of the first layer, then its values, and so on; the new nodes go to `length .. length + n`. `width`
    and `ancestors` as in `attention.tree_attention`. `count`: how many layers run. `logits`: whether they are made.
    """

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
        shape = (*tokens.shape, -1, slots.shape[-1])
        hidden = functional.embedding(tokens, ends.embedding)
        normed = partial(product, eps=eps)
        for index, layer in enumerate(stack[:count]):
            heads = normed(hidden, layer.qkv, layer.qkv_bias, norm=layer.attention_norm).view(shape)
            keys, values = slots[2 * index], slots[2 * index + 1]
            mixed = attend(
                heads, rotation, keys, values, length, ancestors, head_norm=layer.head_norm, eps=eps, width=width
            )
            hidden = product(mixed.flatten(2), layer.out, layer.out_bias, residual=hidden)
            inner = normed(hidden, layer.up, layer.up_bias, norm=layer.feed_norm, gated=True)
            hidden = product(inner, layer.down, layer.down_bias, residual=hidden)
        if not logits:
            return hidden, None
        return hidden, normed(hidden, ends.head, ends.head_bias, norm=ends.norm, dtype=torch.float32)

    return run


def pays(rows: int, n: int, capacity: int) -> bool:
    """Whether the one launch beats a few for every layer, for so many rows, new nodes and slots of the cache.

    Forwards of 1B, 3B and 8B on an H100 took 12, 6 and 5 % less for one node behind 500 and 2000 slots, 11, 3 and 4 %
    less behind 4000, and 8, 7 and 2 % more behind 16000; for 8 nodes 9, 2 and 1 % less behind 500, and up to 5 % more
    behind 4000. The answer is the same for 1 to 8 nodes and for all that a cache holds, so that drafts are verified
    with the bits of decoding.
    """
    return rows == 1 and n <= MOST_NODES and capacity <= 4096

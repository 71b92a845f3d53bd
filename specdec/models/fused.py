"""The forward of a Llama-like model on an accelerator: a few launches a layer, and no question to the device.

Up to 8 nodes of one row are one launch for all layers and the head where `layers` runs and pays. Otherwise, up to
`product`'s few rows, a layer is five launches where `attend` runs and pays: projection with its norm; rotation, cache
write and attention; projection and residual; gated projection with its norm; projection and residual. Elsewhere
rotation, attention and its combination past the first split are launches of their own. In all of them a node's logits
are the same bits for any number of nodes up to 8, so verifying several drafts agrees with decoding one token at a time
exactly. Longer windows, such as prompts, go through the library's matrix products with the norms, `silu * up` and
rotations fused around them.

Everything that varies from call to call is on the device, lengths and masks included: a forward over a cache whose
`extent` stands still can be captured as a graph. Its definition is the torch decoder in `specdec.models.decoder`.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from specdec.cache import KVCache
from specdec.models.checkpoint import Affine, Ends, LayerWeights, Spec
from specdec.models.window import Window, additive_mask, open_window
from specdec_kernels.dispatch import choose, resolve
from specdec_kernels.ops import attend as attends
from specdec_kernels.ops import layers as whole
from specdec_kernels.ops.attention import MAX_WIDTH, pack_ancestors

OPERATIONS = ("layers", "product", "attend", "tree_attention", "rope_write", "rms_norm_residual", "silu_mul")

# Operations that do what others do one by one; asking for one of those rules them out.
_PARTS = {"layers": {"product", "attend", "rope_write", "tree_attention"}, "attend": {"rope_write", "tree_attention"}}

Attend = Callable[[int, Tensor], Tensor]


class _Kernels(NamedTuple):
    """The implementations that were chosen; `few` is the most rows that go through `product`, 0 for none, and
    `bind_layers` and `attend` are `None` where others do their work."""

    bind_layers: Callable[..., Any] | None
    product: Callable[..., Any]
    attend: Callable[..., Any] | None
    tree_attention: Callable[..., Any]
    rope_write: Callable[..., Any]
    rms_norm_residual: Callable[..., Any]
    silu_mul: Callable[..., Any]
    few: int


class _Network(NamedTuple):
    spec: Spec
    embedding: Float[Tensor, "v h"]
    angles: Float[Tensor, " half_d"]
    radii: Float[Tensor, " half_d"]
    layers: tuple[LayerWeights, ...]
    final_norm: Float[Tensor, " h"]
    head: Affine


def choose_kernels(
    spec: Spec, dtype: torch.dtype, device: torch.device, requested: Mapping[str, str]
) -> tuple[_Kernels, dict[str, str]]:
    """What computes each operation, as functions and by name; `requested` names implementations by operation.

    Raises `ValueError` for an unknown operation and for an implementation that cannot run.
    """
    unknown = sorted(set(requested) - set(OPERATIONS))
    if unknown:
        raise ValueError(f"the fused forward has no operation {unknown[0]!r}; it has {', '.join(OPERATIONS)}")
    shapes = {
        "layers": (1, spec.num_layers, spec.hidden, spec.inner, spec.head_size),
        "product": (1, spec.hidden),
        "attend": (1, 1, spec.heads + 2 * spec.kv_heads, spec.head_size),
        "tree_attention": (1, 1, spec.heads, spec.head_size),
        "rope_write": (1, 1, spec.heads + 2 * spec.kv_heads, spec.head_size),
        "rms_norm_residual": (1, 1, spec.hidden),
        "silu_mul": (1, 1, 2 * spec.inner),
    }
    functions: dict[str, Any] = {}
    names: dict[str, str] = {}
    for op in OPERATIONS:
        wanted = requested.get(op, "auto")
        if wanted == "auto" and _PARTS.get(op, set()) & set(requested):
            wanted = "torch"
        names[op] = choose(op, device, dtype, shapes[op], wanted).implementation
        functions[op] = resolve(op, device, dtype, shapes[op], wanted)
    bind_layers = functions.pop("layers")
    if names["layers"] == "torch":
        bind_layers = None
    if names["attend"] == "torch":
        functions["attend"] = None
    elif names["product"] == "cuda":
        functions["attend"] = partial(functions["attend"], early=True)
    few = 0
    if names["product"] != "torch":
        few = import_module(f"specdec_kernels.ops.product_{names['product']}").MOST_ROWS
    return _Kernels(bind_layers, **functions, few=few), names


def pack_fused(
    spec: Spec,
    layers: Iterable[LayerWeights],
    ends: Callable[[], Ends],
    angles: Float[Tensor, " half_d"],
    kernels: _Kernels,
) -> Callable[..., tuple[Tensor | None, Tensor | None, int]]:
    """The forward over weights that stay as they are; see `decoder._Run` for its arguments."""
    made = tuple(layers)
    last = ends()
    network = _Network(spec, last.embedding, angles, torch.ones_like(angles), made, last.final_norm.weight, last.head)
    at_once = None if kernels.bind_layers is None else _bind_layers(network, kernels.bind_layers)

    def run(
        cache: KVCache,
        tokens: Tensor,
        depth: Tensor | None,
        visible: Tensor | None,
        count: int,
        logits: bool,
        features: bool,
    ) -> tuple[Tensor | None, Tensor | None, int]:
        few = tokens.numel() <= kernels.few
        with torch.inference_mode():
            window = open_window(cache, tokens.shape[1], depth, spec.max_length)
        wide = visible is not None and visible.shape[2] > MAX_WIDTH
        if at_once is not None and not wide and whole.pays(len(tokens), tokens.shape[1], cache.capacity):
            with torch.no_grad():
                hidden, made = at_once(cache, tokens, window, visible, count, logits)
                return made, _normed(network, kernels, hidden) if features else None, window.extent
        with torch.inference_mode():
            hidden = functional.embedding(tokens, network.embedding)
            attend = _attention(network, kernels, cache, window, visible, hidden.dtype, few)
            hidden, delta = (_few_rows if few else _many_rows)(network, kernels, count, hidden, attend)
        if not logits and not features:
            return None, None, window.extent
        # Out of inference mode again: what callers get is a tensor they may write to and train on.
        with torch.no_grad():
            states, made = None, None
            if features or not few:
                states = _normed(network, kernels, hidden, delta)
            if logits:
                made = _logits(network, kernels, hidden, None if few else states)
            return made, states if features else None, window.extent

    return run


def _bind_layers(network: _Network, bind: Callable[..., Any]) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """All layers as one launch: the residual stream after the last of them, and logits where they are asked for."""
    stack = [
        whole.Layer(
            *layer.qkv,
            *layer.out,
            *layer.up,
            *layer.down,
            layer.attention_norm.weight,
            layer.feed_norm.weight,
            layer.head_norm,
        )
        for layer in network.layers
    ]
    bound = bind(stack, whole.Ends(network.embedding, network.final_norm, *network.head), network.spec.norm_eps)

    def run(
        cache: KVCache, tokens: Tensor, window: Window, visible: Tensor | None, count: int, logits: bool
    ) -> tuple[Tensor, Tensor | None]:
        made: tuple[Tensor, Tensor | None] = bound(
            tokens,
            _rotation(network, window.positions),
            cache.store.slots[0],
            cache.length,
            None if visible is None else pack_ancestors(visible),
            width=tokens.shape[1] if visible is None else visible.shape[2],
            count=count,
            logits=logits,
        )
        return made

    return run


def _normed(
    network: _Network, kernels: _Kernels, hidden: Float[Tensor, "b n h"], delta: Float[Tensor, "b n h"] | None = None
) -> Float[Tensor, "b n h"]:
    """What the head sees of a residual stream, which may come as a sum."""
    normed: Tensor = kernels.rms_norm_residual(hidden, delta, network.final_norm, network.spec.norm_eps)[1]
    return normed


def _few_rows(
    network: _Network, kernels: _Kernels, count: int, hidden: Float[Tensor, "b n h"], attend: Attend
) -> tuple[Float[Tensor, "b n h"], None]:
    """The residual stream after `count` layers whose products take norms, gates and residuals with them."""
    product = partial(kernels.product, eps=network.spec.norm_eps)
    for index, layer in enumerate(network.layers[:count]):
        mixed = attend(index, product(hidden, *layer.qkv, norm=layer.attention_norm.weight))
        hidden = product(mixed, *layer.out, residual=hidden)
        inner = product(hidden, *layer.up, norm=layer.feed_norm.weight, gated=True)
        hidden = product(inner, *layer.down, residual=hidden)
    return hidden, None


def _many_rows(
    network: _Network, kernels: _Kernels, count: int, hidden: Float[Tensor, "b n h"], attend: Attend
) -> tuple[Float[Tensor, "b n h"], Float[Tensor, "b n h"] | None]:
    """The residual stream after `count` layers, as a sum that the next norm takes."""
    norm, delta = partial(kernels.rms_norm_residual, eps=network.spec.norm_eps), None
    for index, layer in enumerate(network.layers[:count]):
        hidden, normed = norm(hidden, delta, layer.attention_norm.weight)
        delta = functional.linear(attend(index, functional.linear(normed, *layer.qkv)), *layer.out)
        hidden, normed = norm(hidden, delta, layer.feed_norm.weight)
        delta = functional.linear(kernels.silu_mul(functional.linear(normed, *layer.up)), *layer.down)
    return hidden, delta


def _attention(
    network: _Network,
    kernels: _Kernels,
    cache: KVCache,
    window: Window,
    visible: Tensor | None,
    dtype: torch.dtype,
    few: bool,
) -> Attend:
    """The function from a layer's index and its projected heads `[b n all_heads * d]` to the mixed values `[b n h]`."""
    spec, slots = network.spec, cache.store.slots[0]
    (rows, n), size = window.slots.shape, spec.head_size
    rotation = _rotation(network, window.positions)
    mix: Callable[[Tensor, Tensor, Tensor], Tensor]
    if visible is not None and visible.shape[2] > MAX_WIDTH:
        mix = partial(_mix_dense, additive_mask(cache, window, visible, dtype))
    else:
        ancestors = None if visible is None else pack_ancestors(visible)
        width = n if visible is None else visible.shape[2]
        seen = {"length": cache.length, "ancestors": ancestors, "width": width, "extent": window.extent}
        if kernels.attend is not None and few and attends.pays(rows, n, cache.capacity):
            at_once = partial(kernels.attend, eps=spec.norm_eps, **seen)

            def attend_at_once(index: int, heads: Tensor) -> Tensor:
                mixed: Tensor = at_once(
                    heads.view(rows, n, -1, size),
                    rotation,
                    slots[2 * index],
                    slots[2 * index + 1],
                    head_norm=network.layers[index].head_norm,
                )
                return mixed.view(rows, n, -1)

            return attend_at_once
        mix = partial(kernels.tree_attention, **seen)

    def attend(index: int, heads: Tensor) -> Tensor:
        keys, values = slots[2 * index], slots[2 * index + 1]
        query = kernels.rope_write(
            heads.view(rows, n, -1, size),
            rotation,
            window.slots,
            keys,
            values,
            network.layers[index].head_norm,
            spec.norm_eps,
        )
        return mix(query, keys, values).view(rows, n, -1)

    return attend


def _mix_dense(
    mask: Float[Tensor, "b 1 n extent"],
    query: Float[Tensor, "b n heads d"],
    keys: Float[Tensor, "b c kv_heads d"],
    values: Float[Tensor, "b c kv_heads d"],
) -> Float[Tensor, "b n heads d"]:
    """Attention for trees wider than bit masks."""
    extent = mask.shape[3]
    mixed = functional.scaled_dot_product_attention(
        query.transpose(1, 2),
        keys[:, :extent].transpose(1, 2),
        values[:, :extent].transpose(1, 2),
        attn_mask=mask,
        enable_gqa=keys.shape[2] < query.shape[2],
    )
    return mixed.transpose(1, 2).contiguous()


def _rotation(network: _Network, positions: Int[Tensor, "b n"]) -> Float[Tensor, "b n half_d 2"]:
    """Cosine and sine of each position and pair of channels, from float32 angles as in training."""
    return torch.view_as_real(torch.polar(network.radii, positions[:, :, None] * network.angles))


def _logits(
    network: _Network, kernels: _Kernels, hidden: Float[Tensor, "b n h"], states: Float[Tensor, "b n h"] | None
) -> Float[Tensor, "b n v"]:
    """Logits in float32, or float64 in a float64 model, of normed `states`, or of a residual stream whose norm goes
    into the product."""
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    if states is not None:
        return functional.linear(states, *network.head).to(wide)
    norm, eps = network.final_norm, network.spec.norm_eps
    logits: Tensor = kernels.product(hidden, *network.head, norm=norm, eps=eps, dtype=wide)
    return logits

"""A lean functional decoder: weights in, logits out, over one slot cache.

It runs the checkpoints of Llama, SmolLM2, Mistral, Qwen2, Qwen3, GPT-2, OPT and GPT-NeoX without the module tree they
were saved from. The saving is in launches, which is what a forward of one to eight tokens of a small model spends its
time on besides reading its weights: queries, keys and values are one matrix, and so are gate and up; a rotation is
one complex product; the attention mask is made once per forward, and not at all for a single row and token.

Cache layout: one tensor `slots [2 * layers, b, c, kv_heads, d]`; group 2 i holds the keys of layer i, rotated, and
group 2 i + 1 its values. A model of the first layers (`early_exit`) finds its groups at the front of the full model's.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from specdec import cache as kv
from specdec.cache import KVCache
from specdec.models.checkpoint import Affine, Ends, LayerWeights, Reader, Spec
from specdec.models.families import FAMILIES, supports
from specdec.models.fused import choose_kernels, pack_fused
from specdec.models.packing import pack_checkpoint
from specdec.models.products import Compare, choose_linear
from specdec.models.report import ModelError
from specdec.models.window import additive_mask, open_window
from specdec.types import Model
from specdec_kernels import linear as linears
from specdec_kernels.cpu.weights import PackedModel, head_format_of
from specdec_kernels.dispatch import Choice, choose

__all__ = ["build_decoder", "supports"]

Function = Callable[[Tensor], Tensor]

_ACTIVATIONS: Mapping[str, Function] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_new": partial(functional.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
}


class _Layer(NamedTuple):
    attention_norm: Function
    qkv: Function
    head_norm: Tensor | None
    out: Function
    feed_norm: Function
    up: Function
    down: Function


class _Network(NamedTuple):
    """A decoder ready to run, operation by operation. `angles [d / 2]`: radians per position of each pair of channels,
    0 for resting ones."""

    spec: Spec
    embedding: Tensor
    positions: Tensor | None
    angles: Tensor | None
    layers: tuple[_Layer, ...]
    final_norm: Function
    head: Function


# (cache, tokens, depth, visible, layers, logits, features) -> (logits, features, extent of the cache)
_Run = Callable[..., tuple[Tensor | None, Tensor | None, int]]


def build_decoder(
    config: Any,
    tensors: Mapping[str, Tensor],
    *,
    name: str,
    dtype: torch.dtype,
    device: torch.device,
    linear: str = "auto",
    stack: str = "auto",
    quantize: str | None = None,
    kernels: Mapping[str, str] | None = None,
    compare: Compare | None = None,
) -> Model:
    """The model of a checkpoint: `config` as transformers reads it, `tensors` as safetensors name them.

    `stack`, `linear`: the implementations of the whole forward and, where that is `torch`, of its linear layers
    (`specdec_kernels.dispatch`); asking for a `linear` implies the latter. `kernels`: implementations by operation of
    the `triton` stack (`specdec.models.fused.OPERATIONS`). `quantize`: the format in which the CPU
    kernels keep the weights (`fp16`, `bf16`, `int8`, `int4`; arithmetic and cache stay float32, outside the CPU stack
    also the embedding). `compare`: measures linear layers, where there is a choice (`specdec.models.products`).
    `Model.about` tells what runs and why. Logits are float32, or float64 in a float64 model. Token ids must be in the
    vocabulary even at nodes that are padding.

    Raises `ModelError` (a `ValueError`) for a configuration that `supports` refuses, for weights that do not match the
    configuration and for a `quantize` that cannot run, and `ValueError` for a `stack` or `linear` that cannot.
    """
    reason = supports(config)
    if reason is not None:
        raise ModelError(f"the decoder cannot run {name}: {reason}; use the Hugging Face adapter")
    family = FAMILIES[config.model_type]
    spec = family.describe(config)
    whole = _choose_stack(spec, device, dtype, "torch" if linear != "auto" and stack == "auto" else stack)
    about: dict[str, Any] = {
        "architecture": config.model_type,
        "stack": whole.implementation,
        "stack_reason": whole.reason,
    }

    if whole.implementation == "cpu":
        about["weights"] = quantize or "fp32"
        packed = pack_checkpoint(config, tensors, about["weights"])
        about["weight_bytes"] = packed.bytes
        return _build_model(_run_stack(spec, packed), spec, spec.num_layers, dtype, device, name, about)
    reader = Reader(tensors, dtype, device)
    with torch.no_grad():
        # Layer by layer, so that only one of them is in memory both as stored and as packed.
        layers = (family.layer(config, spec, reader, index) for index in range(spec.num_layers))
        ends = partial(family.ends, config, spec, reader)
        if whole.implementation == "triton" and quantize is None:
            chosen, names = choose_kernels(spec, dtype, device, kernels or {})
            about |= names
            angles = _padded_angles(spec, device)
            assert angles is not None
            run: _Run = pack_fused(spec, layers, ends, angles, chosen)
        else:
            format = quantize or "fp32"
            choice, timings = choose_linear(spec, device, dtype, linear, format, compare)
            about |= {"linear": choice.implementation, "linear_reason": choice.reason}
            about |= {"weights": format} if quantize else {}
            about |= {"linear_rejected": dict(choice.rejected), "linear_timings": timings} if timings else {}
            run = _pack_layers(spec, layers, ends, choice.implementation, format, device)
        reader.refuse_unread(family.ignored)
    return _build_model(run, spec, spec.num_layers, dtype, device, name, about)


def build_packed(config: Any, weights: PackedModel, *, name: str, format: str) -> Model:
    """The model of packed weights, on the CPU stack; `format` is what `Model.about` calls them.

    Raises `ModelError` where the CPU stack cannot run.
    """
    spec = FAMILIES[config.model_type].describe(config)
    device, dtype = torch.device("cpu"), torch.float32
    whole = _choose_stack(spec, device, dtype, "auto")
    if whole.implementation != "cpu":
        raise ModelError(f"{name} is packed for the CPU stack, which does not run here: {whole.reason}")
    about = {"architecture": config.model_type, "stack": "cpu", "stack_reason": whole.reason, "weights": format}
    about["weight_bytes"] = weights.bytes
    return _build_model(_run_stack(spec, weights), spec, spec.num_layers, dtype, device, name, about)


def _choose_stack(spec: Spec, device: torch.device, dtype: torch.dtype, requested: str) -> Choice:
    """The implementation of the whole forward: the dispatch rule, and what the faster ones need of an architecture."""
    from specdec_kernels.cpu.stack import refuse_spec

    problem = refuse_spec(spec)
    if problem is None or requested == "torch":
        return choose("decoder_stack", device, dtype, requested=requested)
    if requested in ("cpu", "triton"):
        raise ValueError(f"decoder_stack: {requested} {problem}; use auto")
    fastest = "cpu" if device.type == "cpu" else "triton"
    return Choice("torch", f"{fastest} {problem}", ((fastest, problem),))


def _pack_layers(
    spec: Spec,
    layers: Iterable[LayerWeights],
    ends: Callable[[], Ends],
    linear: str,
    format: str,
    device: torch.device,
) -> _Run:
    """The forward as torch operations, its linear layers by the implementation `linear` over weights in `format`."""

    def pack(weights: Affine, into: str = format) -> Function:
        return linears.pack(weights.weight, weights.bias, linear, into)

    made = tuple(_build_layer(spec, layer, pack) for layer in layers)
    last = ends()
    network = _Network(
        spec=spec,
        embedding=last.embedding,
        positions=last.positions,
        angles=_padded_angles(spec, device),
        layers=made,
        final_norm=_build_norm(spec, last.final_norm),
        head=pack(last.head, head_format_of(format)),
    )

    def run(
        cache: KVCache,
        tokens: Tensor,
        depth: Tensor | None,
        visible: Tensor | None,
        count: int,
        logits: bool,
        features: bool,
    ) -> tuple[Tensor | None, Tensor | None, int]:
        with torch.inference_mode():
            hidden, extent = _run_layers(network, count, cache, tokens, depth, visible)
        if not logits and not features:
            return None, None, extent
        # Out of inference mode again: what callers get is a tensor they may write to and train on.
        with torch.no_grad():
            states = network.final_norm(hidden)
            return _widened(network.head(states)) if logits else None, states if features else None, extent

    return run


def _run_stack(spec: Spec, weights: PackedModel) -> _Run:
    """The forward as one call of the CPU kernels; see `specdec_kernels.cpu.stack`."""
    from specdec_kernels.cpu.stack import assemble, stack_forward

    stack = assemble(spec, weights)

    def run(
        cache: KVCache,
        tokens: Tensor,
        depth: Tensor | None,
        visible: Tensor | None,
        count: int,
        logits: bool,
        features: bool,
    ) -> tuple[Tensor | None, Tensor | None, int]:
        window = open_window(cache, tokens.shape[1], depth, spec.max_length)
        result = stack_forward(
            stack,
            cache.store.slots[0],
            tokens,
            window.positions,
            window.slots,
            cache.length,
            window.extent,
            visible,
            None if visible is None else cache.length + (tokens.shape[1] - visible.shape[2]),
            states=features,
            logits=logits,
            num_layers=count,
        )
        return result.logits, result.states, window.extent

    return run


def _build_model(
    run: _Run,
    spec: Spec,
    layers: int,
    dtype: torch.dtype,
    device: torch.device,
    name: str,
    about: Mapping[str, Any],
) -> Model:

    def init_cache(rows: int, capacity: int) -> KVCache:
        # Zeros, not `empty`: a slot that a row does not see has attention weight 0, and 0 times NaN is NaN.
        return kv.init_cache(
            torch.zeros(2 * layers, rows, capacity, spec.kv_heads, spec.head_size, dtype=dtype, device=device)
        )

    def forward(
        cache: KVCache,
        tokens: Int[Tensor, "b n"],
        depth: Int[Tensor, "b n"] | None = None,
        visible: Bool[Tensor, "b n w"] | None = None,
        *,
        logits: bool = True,
        features: bool = False,
    ) -> tuple[Tensor | None, Tensor | None, KVCache]:
        if cache.store.slots[0].shape[0] < 2 * layers:
            raise ValueError(
                f"the cache has {cache.store.slots[0].shape[0]} groups of slots; a model of {layers} layers needs "
                f"{2 * layers}"
            )
        scores, states, extent = run(cache, tokens, depth, visible, layers, logits, features)
        return scores, states, kv.advance(cache, tokens.shape[1], extent)

    def early_exit(exit_layers: int) -> Model:
        if not 1 <= exit_layers < layers:
            raise ValueError(f"early_exit takes 1 to {layers - 1} of the {layers} layers of {name}, got {exit_layers}")
        return _build_model(run, spec, exit_layers, dtype, device, f"{name}[:{exit_layers}]", about)

    return Model(
        name=name,
        adapter="decoder",
        vocab_size=spec.vocab_size,
        max_length=spec.max_length,
        device=device,
        dtype=dtype,
        init_cache=init_cache,
        forward=forward,
        num_layers=layers,
        early_exit=early_exit,
        about=about,
    )


def _run_layers(
    network: _Network, count: int, cache: KVCache, tokens: Tensor, depth: Tensor | None, visible: Tensor | None
) -> tuple[Float[Tensor, "b n h"], int]:
    """The residual stream after the last layer, and the extent of the cache, whose slots it writes."""
    spec, (rows, n), slots = network.spec, tokens.shape, cache.store.slots[0]
    window = open_window(cache, n, depth, spec.max_length)
    extent = window.extent
    hidden = functional.embedding(tokens, network.embedding)
    if network.positions is not None:
        hidden += functional.embedding(window.positions, network.positions)
    rotation = None if network.angles is None else _rotation(network.angles, window.positions, hidden.dtype)
    attend = partial(functional.scaled_dot_product_attention, enable_gqa=spec.kv_heads < spec.heads)
    if extent == n and visible is None:
        attend = partial(attend, is_causal=True)
    # A single node that continues no tree sees every slot of its row, and on the CPU the extent is exact.
    elif not (rows == n == 1 and slots.device.type == "cpu" and (visible is None or visible.shape[2] == 1)):
        attend = partial(attend, attn_mask=additive_mask(cache, window, visible, hidden.dtype))
    # One view per layer, made for all layers at once: [b c 2 kv_heads d] to write, [b kv_heads extent d] to read.
    written = slots[: 2 * count].view(count, 2, *slots.shape[1:]).permute(0, 2, 3, 1, 4, 5).unbind(0)
    read = slots[: 2 * count, :, :extent].transpose(2, 3).unbind(0)
    activate, queried = _ACTIVATIONS[spec.activation], spec.heads + spec.kv_heads
    stacked, stored = (rows, n, queried + spec.kv_heads, spec.head_size), (rows, n, 2, spec.kv_heads, spec.head_size)
    for index, layer in enumerate(network.layers[:count]):
        heads = layer.qkv(layer.attention_norm(hidden)).view(stacked)
        turning = heads[:, :, :queried]
        if layer.head_norm is not None:
            turning.copy_(functional.rms_norm(turning, (spec.head_size,), None, spec.norm_eps) * layer.head_norm)
        if rotation is not None:
            _rotate(turning, rotation)
        kv.write(written[index], window.slots, heads[:, :, spec.heads :].view(stored))
        mixed = attend(heads[:, :, : spec.heads].transpose(1, 2), read[2 * index], read[2 * index + 1])
        attended = layer.out(mixed.transpose(1, 2).reshape(rows, n, -1))
        if not spec.parallel:
            hidden += attended
        inner = layer.up(layer.feed_norm(hidden))
        if spec.gated:
            gate, up = inner.chunk(2, -1)
            inner = activate(gate).mul_(up)
        else:
            inner = activate(inner)
        if spec.parallel:
            hidden += attended
        hidden += layer.down(inner)
    return hidden, extent


def _rotation(angles: Float[Tensor, " pairs"], positions: Int[Tensor, "b n"], dtype: torch.dtype) -> Tensor:
    """The unit complex number of each position and pair, `[b n 1 pairs]`, from float32 angles as in training."""
    turned = positions[:, :, None, None] * angles
    turned = turned.double() if dtype == torch.float64 else turned
    return torch.polar(torch.ones_like(turned), turned)


def _rotate(heads: Float[Tensor, "b n heads d"], rotation: Tensor) -> None:
    """Rotate the pairs of neighbouring channels in place; types narrower than float32 are rotated in float32."""
    wide = _widened(heads)
    pairs = torch.view_as_complex(wide.view(*wide.shape[:3], -1, 2))
    pairs *= rotation
    if wide is not heads:
        heads.copy_(wide)


def _build_layer(spec: Spec, weights: LayerWeights, pack: Callable[[Affine], Function]) -> _Layer:
    return _Layer(
        attention_norm=_build_norm(spec, weights.attention_norm),
        qkv=pack(weights.qkv),
        head_norm=weights.head_norm,
        out=pack(weights.out),
        feed_norm=_build_norm(spec, weights.feed_norm),
        up=pack(weights.up),
        down=pack(weights.down),
    )


def _build_norm(spec: Spec, weights: Affine) -> Function:
    weight, bias = weights
    shape, eps = weight.shape, spec.norm_eps
    if not spec.rms:
        return partial(functional.layer_norm, normalized_shape=shape, weight=weight, bias=bias, eps=eps)
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.float64):
        return partial(functional.rms_norm, normalized_shape=shape, weight=weight, eps=eps)
    # On the CPU torch composes rms_norm of six operations. sqrt(h) rms = hypot(|x|, sqrt(h eps)) needs four: 7 instead
    # of 15 microseconds for one row of 576 channels, and a 30-layer forward has 61 of them.
    scaled, floor = weight * math.sqrt(spec.hidden), weight.new_tensor(math.sqrt(spec.hidden * eps))

    def rms_norm(x: Tensor) -> Tensor:
        return (x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), floor)).mul_(scaled)

    return rms_norm


def _padded_angles(spec: Spec, device: torch.device) -> Tensor | None:
    if spec.rotary is None:
        return None
    return functional.pad(spec.rotary, (0, spec.head_size // 2 - len(spec.rotary))).to(device)


def _widened(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()

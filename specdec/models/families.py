"""How each architecture writes its configuration and its checkpoint.

A family is a reader: `describe` turns a configuration into a `Spec`, `layer` and `ends` turn named tensors into
weights of that spec. Everything that differs between architectures ends here: names, transposed or interleaved
matrices, offsets in the position table, biases. The decoder knows only `Spec` and weights.

Configurations are those of transformers 5 (or anything with the same attributes, every default spelled out); names
of tensors are those of the checkpoints on the hub.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from specdec.models.checkpoint import (
    Affine,
    Ends,
    LayerWeights,
    Reader,
    Spec,
    head_size,
    output_head,
    paired,
    refuse_rope,
    rotary_angles,
    stacked,
    stacked_heads,
)

ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")


class Family(NamedTuple):
    """One way of writing an architecture. `refuse(config)` says why a variant is not supported, or `None`.
    `ignored`: names of tensors, as a pattern, that are constants or copies."""

    describe: Callable[[Any], Spec]
    refuse: Callable[[Any], str | None]
    layer: Callable[[Any, Spec, Reader, int], LayerWeights]
    ends: Callable[[Any, Spec, Reader], Ends]
    ignored: str


def supports(config: Any) -> str | None:
    """`None` when the lean decoder can run a checkpoint of this configuration, else the reason why not."""
    kind = getattr(config, "model_type", None)
    if kind not in FAMILIES:
        return f"architecture {kind!r} is not one of {', '.join(sorted(FAMILIES))}"
    if getattr(config, "quantization_config", None) is not None:
        return "its weights are quantized"
    reason = FAMILIES[kind].refuse(config)
    if reason is not None:
        return reason
    spec = FAMILIES[kind].describe(config)
    if spec.activation not in ACTIVATIONS:
        return f"activation {spec.activation!r} is not one of {', '.join(ACTIVATIONS)}"
    if spec.heads % spec.kv_heads:
        return f"{spec.heads} query heads do not share {spec.kv_heads} key-value heads evenly"
    return None


def _refuse_llama(config: Any) -> str | None:
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    if window is not None and window < config.max_position_embeddings and "sliding_attention" in kinds:
        return f"its attention is a sliding window of {window} tokens"
    return refuse_rope(config)


def _describe_llama(config: Any) -> Spec:
    return Spec(
        vocab_size=config.vocab_size,
        max_length=config.max_position_embeddings,
        num_layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        inner=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_size=head_size(config),
        norm_eps=config.rms_norm_eps,
        activation=config.hidden_act,
        rms=True,
        gated=True,
        rotary=rotary_angles(config),
    )


def _layer_llama(config: Any, spec: Spec, reader: Reader, index: int) -> LayerWeights:
    layer, hidden, inner = f"model.layers.{index}", spec.hidden, spec.inner
    queries, keys = spec.heads * spec.head_size, spec.kv_heads * spec.head_size
    out_biased = getattr(config, "attention_bias", False)
    # Qwen2 has biases in its queries, keys and values only, and no option for it.
    biased = out_biased or config.model_type == "qwen2"
    feed_biased = getattr(config, "mlp_bias", False)
    query = reader.affine(f"{layer}.self_attn.q_proj", queries, hidden, bias=biased)
    key = reader.affine(f"{layer}.self_attn.k_proj", keys, hidden, bias=biased)
    value = reader.affine(f"{layer}.self_attn.v_proj", keys, hidden, bias=biased)
    gate = reader.affine(f"{layer}.mlp.gate_proj", inner, hidden, bias=feed_biased)
    up = reader.affine(f"{layer}.mlp.up_proj", inner, hidden, bias=feed_biased)
    return LayerWeights(
        attention_norm=reader.affine(f"{layer}.input_layernorm", hidden, bias=False),
        qkv=stacked_heads(spec, query, key, value),
        head_norm=_head_norm_qwen3(spec, reader, layer) if config.model_type == "qwen3" else None,
        out=reader.affine(f"{layer}.self_attn.o_proj", hidden, queries, bias=out_biased),
        feed_norm=reader.affine(f"{layer}.post_attention_layernorm", hidden, bias=False),
        up=stacked(gate, up),
        down=reader.affine(f"{layer}.mlp.down_proj", hidden, inner, bias=feed_biased),
    )


def _head_norm_qwen3(spec: Spec, reader: Reader, layer: str) -> Tensor:
    """Weights of the norm of each query and key head, `[heads + kv_heads, head_size]`."""
    query, key = (
        paired(spec, reader.take(f"{layer}.self_attn.{name}_norm.weight", spec.head_size), 1) for name in "qk"
    )
    return torch.cat([query.expand(spec.heads, -1), key.expand(spec.kv_heads, -1)])


def _ends_llama(config: Any, spec: Spec, reader: Reader) -> Ends:
    embedding = reader.take("model.embed_tokens.weight", spec.vocab_size, spec.hidden)
    final_norm = reader.affine("model.norm", spec.hidden, bias=False)
    return Ends(embedding, None, final_norm, output_head(reader, config, embedding, "lm_head.weight"))


def _refuse_gpt2(config: Any) -> str | None:
    if config.add_cross_attention:
        return "it attends to an encoder (add_cross_attention)"
    if config.scale_attn_by_inverse_layer_idx or not config.scale_attn_weights:
        return "its attention scores are scaled by other than 1 / sqrt(head size)"
    return None


def _describe_gpt2(config: Any) -> Spec:
    return Spec(
        vocab_size=config.vocab_size,
        max_length=config.n_positions,
        num_layers=config.n_layer,
        hidden=config.n_embd,
        inner=config.n_inner or 4 * config.n_embd,
        heads=config.n_head,
        kv_heads=config.n_head,
        head_size=config.n_embd // config.n_head,
        norm_eps=config.layer_norm_epsilon,
        activation=config.activation_function,
        rms=False,
        gated=False,
    )


def _layer_gpt2(config: Any, spec: Spec, reader: Reader, index: int) -> LayerWeights:
    layer, hidden, inner = f"transformer.h.{index}", spec.hidden, spec.inner

    def transposed(name: str, out_size: int, in_size: int) -> Affine:
        # GPT-2 stores its matrices as [in out].
        weight = reader.take(f"{layer}.{name}.weight", in_size, out_size).T.contiguous()
        return Affine(weight, reader.take(f"{layer}.{name}.bias", out_size))

    return LayerWeights(
        attention_norm=reader.affine(f"{layer}.ln_1", hidden),
        qkv=transposed("attn.c_attn", 3 * hidden, hidden),
        head_norm=None,
        out=transposed("attn.c_proj", hidden, hidden),
        feed_norm=reader.affine(f"{layer}.ln_2", hidden),
        up=transposed("mlp.c_fc", inner, hidden),
        down=transposed("mlp.c_proj", hidden, inner),
    )


def _ends_gpt2(config: Any, spec: Spec, reader: Reader) -> Ends:
    embedding = reader.take("transformer.wte.weight", spec.vocab_size, spec.hidden)
    positions = reader.take("transformer.wpe.weight", spec.max_length, spec.hidden)
    head = output_head(reader, config, embedding, "lm_head.weight")
    return Ends(embedding, positions, reader.affine("transformer.ln_f", spec.hidden), head)


def _refuse_opt(config: Any) -> str | None:
    if not config.do_layer_norm_before:
        return "its norms follow the blocks (do_layer_norm_before is false, as in OPT-350M)"
    if config.word_embed_proj_dim != config.hidden_size:
        return f"its embeddings are projected from {config.word_embed_proj_dim} to {config.hidden_size} channels"
    if getattr(config, "_remove_final_layer_norm", False):
        return "it has no final norm"
    if not config.layer_norm_elementwise_affine:
        return "its norms have no weights (layer_norm_elementwise_affine is false)"
    return None


def _describe_opt(config: Any) -> Spec:
    return Spec(
        vocab_size=config.vocab_size,
        max_length=config.max_position_embeddings,
        num_layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        inner=config.ffn_dim,
        heads=config.num_attention_heads,
        kv_heads=config.num_attention_heads,
        head_size=config.hidden_size // config.num_attention_heads,
        # OPT has no option for it; this is the default of torch's LayerNorm, which it was trained with.
        norm_eps=1e-5,
        activation=config.activation_function,
        rms=False,
        gated=False,
    )


def _layer_opt(config: Any, spec: Spec, reader: Reader, index: int) -> LayerWeights:
    layer, hidden, inner, bias = f"model.decoder.layers.{index}", spec.hidden, spec.inner, config.enable_bias
    query, key, value = (reader.affine(f"{layer}.self_attn.{name}_proj", hidden, hidden, bias=bias) for name in "qkv")
    return LayerWeights(
        attention_norm=reader.affine(f"{layer}.self_attn_layer_norm", hidden),
        qkv=stacked_heads(spec, query, key, value),
        head_norm=None,
        out=reader.affine(f"{layer}.self_attn.out_proj", hidden, hidden, bias=bias),
        feed_norm=reader.affine(f"{layer}.final_layer_norm", hidden),
        up=reader.affine(f"{layer}.fc1", inner, hidden, bias=bias),
        down=reader.affine(f"{layer}.fc2", hidden, inner, bias=bias),
    )


def _ends_opt(config: Any, spec: Spec, reader: Reader) -> Ends:
    embedding = reader.take("model.decoder.embed_tokens.weight", spec.vocab_size, spec.hidden)
    # The first two rows of the table belong to padding.
    positions = reader.take("model.decoder.embed_positions.weight", spec.max_length + 2, spec.hidden)[2:]
    head = output_head(reader, config, embedding, "lm_head.weight")
    return Ends(embedding, positions, reader.affine("model.decoder.final_layer_norm", spec.hidden), head)


def _describe_neox(config: Any) -> Spec:
    return Spec(
        vocab_size=config.vocab_size,
        max_length=config.max_position_embeddings,
        num_layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        inner=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_attention_heads,
        head_size=head_size(config),
        norm_eps=config.layer_norm_eps,
        activation=config.hidden_act,
        rms=False,
        gated=False,
        parallel=config.use_parallel_residual,
        rotary=rotary_angles(config),
    )


def _layer_neox(config: Any, spec: Spec, reader: Reader, index: int) -> LayerWeights:
    layer, hidden, inner, bias = f"gpt_neox.layers.{index}", spec.hidden, spec.inner, config.attention_bias
    mixed = reader.affine(f"{layer}.attention.query_key_value", 3 * hidden, hidden, bias=bias)

    def rows(tensor: Tensor, which: int) -> Tensor:
        # Rows go head by head, and within a head queries, keys, values.
        return tensor.view(spec.heads, 3, spec.head_size, *tensor.shape[1:])[:, which].flatten(0, 1)

    def part(which: int) -> Affine:
        return Affine(rows(mixed.weight, which), None if mixed.bias is None else rows(mixed.bias, which))

    return LayerWeights(
        attention_norm=reader.affine(f"{layer}.input_layernorm", hidden),
        qkv=stacked_heads(spec, part(0), part(1), part(2)),
        head_norm=None,
        out=reader.affine(f"{layer}.attention.dense", hidden, hidden, bias=bias),
        feed_norm=reader.affine(f"{layer}.post_attention_layernorm", hidden),
        up=reader.affine(f"{layer}.mlp.dense_h_to_4h", inner, hidden),
        down=reader.affine(f"{layer}.mlp.dense_4h_to_h", hidden, inner),
    )


def _ends_neox(config: Any, spec: Spec, reader: Reader) -> Ends:
    embedding = reader.take("gpt_neox.embed_in.weight", spec.vocab_size, spec.hidden)
    head = output_head(reader, config, embedding, "embed_out.weight", "lm_head.weight")
    return Ends(embedding, None, reader.affine("gpt_neox.final_layer_norm", spec.hidden), head)


_COPIES = r"^(lm_head|embed_out)\.weight$"
_LLAMA = Family(_describe_llama, _refuse_llama, _layer_llama, _ends_llama, rf"rotary_emb\.inv_freq$|{_COPIES}")

FAMILIES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gpt2": Family(_describe_gpt2, _refuse_gpt2, _layer_gpt2, _ends_gpt2, rf"\.attn\.(masked_)?bias$|{_COPIES}"),
    "opt": Family(_describe_opt, _refuse_opt, _layer_opt, _ends_opt, _COPIES),
    "gpt_neox": Family(
        _describe_neox,
        refuse_rope,
        _layer_neox,
        _ends_neox,
        rf"rotary_emb\.inv_freq$|\.attention\.(masked_)?bias$|{_COPIES}",
    ),
}

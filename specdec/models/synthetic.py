"""Llama models of the published shapes with random weights, made where they run: for measurements without checkpoints.

The speed of a dense decoder does not depend on its weights. Every tensor is a pure function of the seed, its name and
its shape on a given device type, so the lean decoder and a transformers model hold the same weights without sharing
memory.
"""

import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from specdec.models.decoder import build_decoder
from specdec.types import Model

# meta-llama/Llama-3.2-1B, Llama-3.2-3B and Llama-3.1-8B, config.json. `nano` is for tests and dry runs.
_SHAPES: Mapping[str, dict[str, Any]] = {
    "nano": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "tie_word_embeddings": True,
        "vocab_size": 509,
    },
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "3b": {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": True,
    },
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
}
SIZES = tuple(_SHAPES)


def llama_config(size: str, **changes: Any) -> Any:
    """The transformers configuration of a size of `SIZES`; `changes` replace entries of it.

    Raises `ValueError` for an unknown size.
    """
    from transformers import LlamaConfig

    if size not in _SHAPES:
        raise ValueError(f"no Llama shape is called {size!r}; use one of {', '.join(SIZES)}")
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0 if size == "8b" else 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    common = {"vocab_size": 128256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_parameters": rope}
    return LlamaConfig(**{**common, **_SHAPES[size], **changes})


class RandomWeights(Mapping[str, Tensor]):
    """The named tensors of a Llama checkpoint, each drawn anew on every access, so that none is in memory twice.

    Matrices are normal with variance 1 / columns, so that logits have about unit variance; norm weights are 1.
    """

    def __init__(self, config: Any, device: torch.device | str, dtype: torch.dtype, seed: int = 0) -> None:
        self._shapes = _tensor_shapes(config)
        self._device, self._dtype, self._seed = torch.device(device), dtype, seed

    def __getitem__(self, name: str) -> Tensor:
        shape = self._shapes[name]
        if len(shape) == 1:
            return torch.ones(shape, dtype=self._dtype, device=self._device)
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(f"{self._seed} {name}".encode()))
        weight = torch.empty(shape, dtype=self._dtype, device=self._device)
        return weight.normal_(0, shape[1] ** -0.5, generator=generator)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def llama(
    size: str,
    device: torch.device | str,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    *,
    changes: Mapping[str, Any] | None = None,
    **options: Any,
) -> Model:
    """A random Llama of a size of `SIZES` in the lean decoder; `changes` to its configuration, `options` of
    `build_decoder`."""
    config = llama_config(size, **(changes or {}))
    weights = RandomWeights(config, device, dtype, seed)
    return build_decoder(
        config, weights, name=f"llama-{size}-random", dtype=dtype, device=torch.device(device), **options
    )


def llama_huggingface(
    size: str,
    device: torch.device | str,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    *,
    changes: Mapping[str, Any] | None = None,
) -> Any:
    """A `LlamaForCausalLM` with the weights that `llama` has for the same arguments, made on the device."""
    from transformers import AutoModelForCausalLM

    config = llama_config(size, **(changes or {}))
    weights = RandomWeights(config, device, dtype, seed)
    build: Any = AutoModelForCausalLM
    with torch.device(device):
        module = build.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(weights[name])
    return module


def _tensor_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = (count * config.head_dim for count in (config.num_attention_heads, config.num_key_value_heads))
    layer = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    shapes = {"model.embed_tokens.weight": (config.vocab_size, hidden), "model.norm.weight": (hidden,)}
    for index in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{index}.{name}.weight": shape for name, shape in layer.items()}
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes

"""Random models of every architecture the decoder knows, small enough for plain forwards in milliseconds."""

import os
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

# Triton decides when a kernel is defined whether to interpret it; without a GPU that is the only way to run one.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

VOCAB = 61
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 48,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
_GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 48}
_OPT = {name: value for name, value in _SIZES.items() if name != "intermediate_size"}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 12,
}

# Each variant switches on what its architecture can differ in: biases, tied heads, odd head sizes, partial rotation.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**_GROUPED, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
    "llama-llama3-rope": ("llama", {**_GROUPED, "rope_parameters": _LLAMA3}),
    "llama-linear-rope": (
        "llama",
        {**_GROUPED, "rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0}},
    ),
    "smollm2": (
        "llama",
        {**_SIZES, "hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 1, "tie_word_embeddings": True},
    ),
    "mistral": ("mistral", {**_GROUPED, "head_dim": 12, "sliding_window": None}),
    "qwen2": ("qwen2", {**_GROUPED, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {**_GROUPED, "head_dim": 12, "attention_bias": True}),
    "gpt2": ("gpt2", _GPT2),
    "opt": ("opt", {**_OPT, "ffn_dim": 40}),
    "neox": ("gpt_neox", {**_SIZES, "rotary_pct": 0.25, "use_parallel_residual": True}),
    "neox-sequential": ("gpt_neox", {**_SIZES, "rotary_pct": 1.0, "use_parallel_residual": False}),
}


def make_config(kind: str, **options: Any) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(kind, **options)


def make_module(config: Any, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A model whose every parameter matters: random norm weights and biases, and attention that is far from even."""
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 2:
                # Unit variance through every matrix; embeddings are rows of it too.
                parameter.copy_(noise if "emb" in name or "wte" in name else noise / parameter.shape[-1] ** 0.5 * 1.5)
            else:
                parameter.copy_(noise * 0.3 + (0.0 if name.endswith("bias") else 1.0))
    return module


@cache
def tiny_module(architecture: str) -> Any:
    kind, options = ARCHITECTURES[architecture]
    return make_module(make_config(kind, **options))


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    """Tiny matrices gain nothing from threads and lose much to a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=sorted(ARCHITECTURES), scope="session")
def architecture(request: Any) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def module(architecture: str) -> Any:
    """A plain transformers model of each architecture."""
    return tiny_module(architecture)


@pytest.fixture(scope="session")
def make_tiny() -> Callable[..., Any]:
    """`make_tiny("llama")` is the module that the `module` fixture has for that architecture."""
    return tiny_module


@pytest.fixture(scope="session")
def new_module() -> Callable[..., Any]:
    """`new_module("mistral", sliding_window=4, dtype=...)`: a random model of a transformers configuration."""

    def make(kind: str, *, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
        return make_module(make_config(kind, **options), dtype=dtype)

    return make


@pytest.fixture(scope="session")
def grouped_sizes() -> dict[str, Any]:
    """Options of a Llama-like configuration with grouped-query attention."""
    return dict(_GROUPED)

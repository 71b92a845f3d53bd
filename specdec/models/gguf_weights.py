"""Dequantize a GGUF file into a Hugging Face model folder: float32 safetensors, configuration and tokenizer.

GGUF stores the same networks under other names, with three differences that matter: Llama's query and key rows are
interleaved for another layout of the rotation, GPT-2's matrices are transposed, and Llama 3's stretched rotation
frequencies come as a tensor. Each is undone here; a file with anything that is not understood is refused rather
than read approximately. Tensors are converted one at a time, so memory stays at the size of the largest one.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from specdec.models.report import ModelError, Progress, one_line, silent

_ROPE_FACTORS = "rope_freqs.weight"

_LLAMA_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GPT2_NAMES = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}


class _Architecture(NamedTuple):
    """How one GGUF architecture maps: class, names, layer prefix, and the tensors stored in another order."""

    class_name: str
    names: Mapping[str, str]
    layers: str
    interleaved: tuple[str, ...] = ()
    transposed: tuple[str, ...] = ()


_ARCHITECTURES = {
    "llama": _Architecture("LlamaForCausalLM", _LLAMA_NAMES, "model.layers", interleaved=("attn_q", "attn_k")),
    "qwen2": _Architecture("Qwen2ForCausalLM", _LLAMA_NAMES, "model.layers"),
    "qwen3": _Architecture("Qwen3ForCausalLM", _LLAMA_NAMES, "model.layers"),
    "gpt2": _Architecture(
        "GPT2LMHeadModel",
        _GPT2_NAMES,
        "transformer.h",
        transposed=("attn_qkv", "attn_output", "ffn_up", "ffn_down"),
    ),
}


def convert_gguf(path: Path, folder: Path, progress: Progress = silent) -> dict[str, Any]:
    """Write the model of the GGUF file at `path` into `folder` and return where it came from.

    Raises `ModelError` for a file that cannot be read, an architecture or tokenizer that is not known, or a tensor
    that has no place in the model.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ModelError(
            f"reading {path} needs the 'gguf' package; pip install gguf, or use a Hugging Face folder"
        ) from error
    progress("reading", 0, 0)
    # The reader raises whatever the first wrong byte leads to.
    try:
        reader = GGUFReader(path)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
        tensors = {tensor.name: tensor for tensor in reader.tensors}
    except (ValueError, IndexError, KeyError, OSError, OverflowError, MemoryError) as error:
        raise ModelError(
            f"{path} is not a readable GGUF file ({one_line(error)}); it may be truncated, so fetch it again"
        ) from error

    name = str(metadata.get("general.architecture"))
    if name not in _ARCHITECTURES:
        raise ModelError(
            f"{path} holds the architecture {name!r}; GGUF files of {', '.join(_ARCHITECTURES)} can be read, "
            "use the model's Hugging Face folder for others"
        )
    architecture = _ARCHITECTURES[name]
    config = _config(name, architecture, metadata, tensors)
    _write_tokenizer(path, metadata, folder)
    # Every default spelled out, so that a reader needs no configuration class to understand the file.
    (folder / "config.json").write_text(json.dumps(config.to_dict(), indent=2, default=str) + "\n")
    generation = {key: getattr(config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    _write_weights(architecture, config, tensors, folder / "model.safetensors", progress)
    return {"architecture": name, "tensor_types": sorted({tensor.tensor_type.name for tensor in tensors.values()})}


def _config(name: str, architecture: _Architecture, metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> Any:
    from transformers import AutoConfig

    from specdec.models.gguf_tokenizer import end_tokens

    def read(key: str, default: Any = None) -> Any:
        value = metadata.get(f"{name}.{key}", default)
        if value is None:
            raise ModelError(f"the GGUF file does not state {name}.{key}; it is incomplete, so fetch it again")
        return value

    if "token_embd.weight" not in tensors:
        raise ModelError("the GGUF file has no token embedding; it is not a language model")
    if metadata.get(f"{name}.expert_count", 0):
        raise ModelError("the GGUF file is a mixture of experts, which cannot be read; use its Hugging Face folder")
    scaling = metadata.get(f"{name}.rope.scaling.type", "none")
    if scaling != "none":
        raise ModelError(f"the GGUF file scales its positions ({scaling}), which cannot be read; use its HF folder")

    ends = end_tokens(metadata)
    common = {
        "architectures": [architecture.class_name],
        "dtype": "float32",
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }
    width, heads = read("embedding_length"), read("attention.head_count")
    if name == "gpt2":
        return AutoConfig.for_model(
            "gpt2",
            n_positions=read("context_length"),
            n_embd=width,
            n_layer=read("block_count"),
            n_head=heads,
            n_inner=read("feed_forward_length"),
            layer_norm_epsilon=read("attention.layer_norm_epsilon", 1e-5),
            **common,
        )
    head_dim = read("attention.key_length", width // heads)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": read("rope.freq_base", 10000.0)}
    if _ROPE_FACTORS in tensors:
        rope = _stretched_rope(rope["rope_theta"], head_dim, tensors[_ROPE_FACTORS])
    biases = {"attention_bias": "blk.0.attn_q.bias" in tensors, "mlp_bias": "blk.0.ffn_up.bias" in tensors}
    return AutoConfig.for_model(
        name,
        max_position_embeddings=read("context_length"),
        hidden_size=width,
        intermediate_size=read("feed_forward_length"),
        num_hidden_layers=read("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=read("attention.head_count_kv", heads),
        head_dim=head_dim,
        # The file holds a float32; the value meant is the short decimal it came from.
        rms_norm_eps=float(np.format_float_positional(np.float32(read("attention.layer_norm_rms_epsilon")))),
        rope_parameters=rope,
        **(biases if name == "llama" else {}),
        **common,
    )


def _stretched_rope(theta: float, head_dim: int, tensor: Any) -> dict[str, Any]:
    """Llama 3.1's parameters, recovered from the divisors of the rotation frequencies that they produce."""
    found = _dequantize(tensor).reshape(-1)
    factor = float(found.max())
    rope = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    wavelength = 2 * math.pi * np.power(theta, np.arange(0, head_dim, 2) / head_dim)
    blend = np.clip((8192 / wavelength - 1.0) / (4.0 - 1.0), 0.0, 1.0)
    expected = 1.0 / ((1.0 - blend) / factor + blend)
    if found.shape != expected.shape or not np.allclose(found, expected, rtol=1e-3):
        raise ModelError("the GGUF file stretches its positions in an unknown way; use the model's HF folder")
    return rope


def _write_tokenizer(path: Path, metadata: Mapping[str, Any], folder: Path) -> None:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    from specdec.models.gguf_tokenizer import byte_level_tokenizer, special_tokens

    if metadata.get("tokenizer.ggml.model") == "gpt2":
        build: Any = PreTrainedTokenizerFast
        tokenizer: Any = build(
            tokenizer_object=byte_level_tokenizer(metadata),
            chat_template=metadata.get("tokenizer.chat_template"),
            clean_up_tokenization_spaces=False,
            **special_tokens(metadata),
        )
    else:
        try:
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
        except (ValueError, KeyError, OSError, ImportError) as error:
            raise ModelError(
                f"the tokenizer in {path} cannot be read ({one_line(error)}); use the model's Hugging Face folder"
            ) from error
    tokenizer.save_pretrained(folder)


def _write_weights(
    architecture: _Architecture, config: Any, tensors: Mapping[str, Any], path: Path, progress: Progress
) -> None:
    kept = {name: tensor for name, tensor in tensors.items() if name != _ROPE_FACTORS}
    shapes = {}
    for name, tensor in kept.items():
        # GGUF lists the fastest dimension first.
        shape = [int(size) for size in reversed(tensor.shape)]
        flip = len(shape) == 2 and _part(name) in architecture.transposed
        shapes[_hf_name(architecture, name)] = shape[::-1] if flip else shape

    def arrays() -> Iterator[np.ndarray]:
        for done, (name, tensor) in enumerate(kept.items()):
            progress("dequantizing", done, len(kept))
            array = _dequantize(tensor)
            if _part(name) in architecture.interleaved:
                heads = config.num_attention_heads if _part(name) == "attn_q" else config.num_key_value_heads
                rest = array.shape[1:]
                array = array.reshape(heads, -1, 2, *rest).swapaxes(1, 2).reshape(-1, *rest)
            if array.ndim == 2 and _part(name) in architecture.transposed:
                array = array.T
            yield array
        progress("dequantizing", len(kept), len(kept))

    write_safetensors(path, shapes, arrays())


def _part(name: str) -> str:
    """`attn_q` of `blk.3.attn_q.weight`, `output` of `output.weight`."""
    return name.split(".")[-2]


def _hf_name(architecture: _Architecture, name: str) -> str:
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in architecture.names:
        raise ModelError(f"the GGUF tensor {name!r} has no place in the model; use the model's Hugging Face folder")
    layer = f"{architecture.layers}.{match[1]}." if match[1] is not None else ""
    return f"{layer}{architecture.names[match[2]]}.{match[3]}"


def _dequantize(tensor: Any) -> np.ndarray:
    from gguf import dequantize

    try:
        return np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
    except NotImplementedError as error:
        raise ModelError(f"the GGUF tensor {tensor.name!r} cannot be dequantized ({one_line(error)})") from error


def write_safetensors(path: Path, shapes: Mapping[str, list[int]], arrays: Iterator[np.ndarray]) -> None:
    """Write float32 `arrays`, in the order of `shapes`, holding one at a time in memory.

    The safetensors package writes from memory only. The format is the length of a JSON header as eight
    little-endian bytes, the header, then the tensors in the order of their offsets.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, shape), array in zip(shapes.items(), arrays, strict=True):
            if list(array.shape) != shape:
                raise ModelError(f"the GGUF tensor for {name!r} has shape {list(array.shape)} where {shape} is stated")
            file.write(np.ascontiguousarray(array, dtype="<f4").data)

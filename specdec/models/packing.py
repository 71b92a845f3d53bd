"""Models packed for the CPU kernels, in memory and as folders.

A packed folder holds `packed.safetensors`, the weights byte for byte as the kernels read them; a `config.json` that
spells out every default; and a tokenizer. It is read straight into memory with huge pages, not mapped: a forward
reads every weight once, and looking up the address of each 4 KiB of a mapped file would cost more than the read.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdec.models.checkpoint import LayerWeights, Reader
from specdec.models.families import FAMILIES
from specdec.models.report import ModelError, Progress, one_line, silent
from specdec.models.source import PACKED
from specdec.models.store import LAYOUT
from specdec.models.weights import read_tensors, write_tensors
from specdec_kernels.cpu.packed import Arena
from specdec_kernels.cpu.weights import Ends, PackedModel, matrices_of, misfit, model_of, pack_model, tensors_of


def pack_checkpoint(
    config: Any,
    tensors: Mapping[str, Tensor],
    format: str,
    *,
    importance: Callable[[str], Tensor | None] = lambda name: None,
    progress: Progress = silent,
) -> PackedModel:
    """The weights of a checkpoint in `format`, for an architecture that the CPU stack runs. `tensors` may hold GGUF
    blocks (`gguf_weights.Blocks`). Only the head, or one layer at a time, is in memory both as stored and as packed.

    Raises `ModelError` for weights that do not match the configuration.
    """
    family = FAMILIES[config.model_type]
    spec = family.describe(config)
    reader = Reader(tensors, torch.float32, torch.device("cpu"))

    def layers() -> Iterator[LayerWeights]:
        for index in range(spec.num_layers):
            progress("packing", index + 1, spec.num_layers + 1)
            yield family.layer(config, spec, reader, index)
        progress("packing", spec.num_layers + 1, spec.num_layers + 1)

    def ends() -> Ends:
        found = family.ends(config, spec, reader)
        return Ends(found.embedding, found.final_norm.weight, found.head)

    with torch.no_grad():
        model = pack_model(spec, layers(), ends, format, importance=importance)
    reader.refuse_unread(family.ignored)
    return model


def is_packed(folder: Path) -> bool:
    return (folder / PACKED).is_file()


def write_packed(folder: Path, config: Any, model: PackedModel, format: str) -> None:
    """Write configuration and weights into `folder`; `format` is what the user calls them."""
    stated = config.to_dict() if hasattr(config, "to_dict") else vars(config)
    (folder / "config.json").write_text(json.dumps(stated, indent=2, default=str) + "\n", encoding="utf-8")
    about = {"layout": LAYOUT, "format": format, "matrices": matrices_of(model)}
    write_tensors(folder / PACKED, tensors_of(model), {"specdec": json.dumps(about)})


def read_packed(folder: Path, config: Any) -> tuple[PackedModel, str]:
    """The weights of a packed folder and their format; raises `ModelError` for a file that is damaged, of another
    version, or not of the model that the configuration describes."""
    path = folder / PACKED
    tensors, metadata = read_tensors(path, Arena())
    try:
        about = json.loads(metadata["specdec"])
        layout, format, matrices = about["layout"], str(about["format"]), about["matrices"]
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{path} was not written by specdec; quantize the model again") from error
    if layout != LAYOUT:
        raise ModelError(f"{path} was written by another version of specdec; quantize the model again")
    try:
        model = model_of(tensors, matrices)
        problem = misfit(FAMILIES[config.model_type].describe(config), model)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        problem = one_line(error)
    if problem is not None:
        raise ModelError(f"{path} does not match its configuration ({problem}); quantize the model again")
    return model, format

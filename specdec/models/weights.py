"""Safetensors of a model folder as a read-only mapping; nothing is read before it is asked for.

Only safetensors are opened. Pickled weights (`.bin`, `.pt`) run code while they load, so they are refused.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdec.models.report import ModelError, one_line
from specdec.models.source import PICKLE_REMEDY, PICKLES

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Weights(Mapping[str, Tensor]):
    """The tensors of a folder by name, memory-mapped: each access reads from the file.

    Raises `ModelError` at once when a file is missing, damaged or pickled.
    """

    def __init__(self, folder: Path) -> None:
        self.files = _weight_files(folder)
        self._handles: dict[str, Any] = {}
        for path in self.files:
            handle = _open(path)
            self._handles.update(dict.fromkeys(handle.keys(), handle))

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._handles[name].get_tensor(name)
        return tensor

    def __contains__(self, name: object) -> bool:
        # The inherited test would read the tensor.
        return name in self._handles

    def __iter__(self) -> Iterator[str]:
        return iter(self._handles)

    def __len__(self) -> int:
        return len(self._handles)

    @property
    def dtype(self) -> torch.dtype:
        """The widest floating-point type in the files, without reading a tensor; float32 when there is none."""
        found = {handle.get_slice(name).get_dtype() for name, handle in self._handles.items()}
        return next((dtype for code, dtype in _FLOATS.items() if code in found), torch.float32)


def _weight_files(folder: Path) -> tuple[Path, ...]:
    index = folder / _INDEX
    if (folder / _SINGLE).is_file():
        return (folder / _SINGLE,)
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise ModelError(f"{index} is damaged ({one_line(error)}); fetch the model again") from error
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ModelError(
                f"{folder} lacks {len(missing)} of its {len(names)} weight files ({missing[0]}); fetch the model again"
            )
        return tuple(folder / name for name in names)
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickled:
        raise ModelError(f"{folder} has its weights in {pickled[0]}: {PICKLE_REMEDY}")
    quantized = sorted(folder.glob("*.gguf"))
    if quantized:
        raise ModelError(f"{folder} holds GGUF files; name the one to load, such as {quantized[0]}")
    raise ModelError(f"{folder} has no weights; a model folder holds {_SINGLE} or {_INDEX} with its parts")


def _open(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        # Used without `with`: the file stays mapped as long as the handle lives.
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(
            f"{path} is not a readable safetensors file ({one_line(error)}); it may be truncated, so fetch it again"
        ) from error

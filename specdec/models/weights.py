"""Safetensors files: those of a model folder as a read-only mapping, written one tensor at a time, read into memory.

Only safetensors are opened. Pickled weights (`.bin`, `.pt`) run code while they load, so they are refused.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
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
    """The tensors of a folder by name. Each access maps the file anew: the parts of a mapping that were read count as
    memory of the process as long as it exists, and so go with the tensor.

    Raises `ModelError` at once when a file is missing, damaged or pickled.
    """

    def __init__(self, folder: Path) -> None:
        self.files = _weight_files(folder)
        # The file and the type of each tensor.
        self._found: dict[str, tuple[Path, str]] = {}
        for path in self.files:
            handle = _open(path)
            names = handle.keys()
            self._found |= {name: (path, handle.get_slice(name).get_dtype()) for name in names}

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = _open(self._found[name][0]).get_tensor(name)
        return tensor

    def __contains__(self, name: object) -> bool:
        # The inherited test would read the tensor.
        return name in self._found

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    @property
    def dtype(self) -> torch.dtype:
        """The widest floating-point type in the files, without reading a tensor; float32 when there is none."""
        found = {code for _, code in self._found.values()}
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


_CODES = {torch.uint8: "U8", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}


def write_safetensors(
    path: Path,
    shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    tensors: Iterable[Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Write `tensors`, in the order of `shapes`, holding one at a time in memory; the safetensors package writes from
    memory only.

    The format is the length of a JSON header as eight little-endian bytes, the header, then the tensors in the order
    of their offsets. Raises `ValueError` for a tensor that is not of its stated type and shape.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name, (dtype, shape) in shapes.items():
        start, end = end, end + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, stated), tensor in zip(shapes.items(), tensors, strict=True):
            if (tensor.dtype, tuple(tensor.shape)) != stated:
                raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)} where {stated} is stated")
            file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """`write_safetensors` of what is in memory already."""
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_safetensors(path, shapes, tensors.values(), metadata)


def read_tensors(path: Path, allocate: Callable[[int], Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor of a safetensors file and its metadata, read into the memory that `allocate(bytes)` makes; no byte
    is in memory twice.

    Raises `ModelError` for a file that is not whole.
    """
    try:
        with path.open("rb", buffering=0) as file:
            size = path.stat().st_size
            length = int.from_bytes(file.read(8), "little")
            if length > size - 8:
                raise ValueError(f"its header would have {length} bytes")
            header = json.loads(file.read(length))
            metadata = {str(key): str(value) for key, value in header.pop("__metadata__", {}).items()}
            tensors = {}
            for name, entry in header.items():
                dtype, shape = _DTYPES[entry["dtype"]], [int(axis) for axis in entry["shape"]]
                start, end = (8 + length + int(offset) for offset in entry["data_offsets"])
                if not 8 + length <= start <= end <= size or end - start != dtype.itemsize * math.prod(shape):
                    raise ValueError(f"{name} does not lie in the file")
                memory = allocate(end - start)
                file.seek(start)
                _fill(file, memory)
                tensors[name] = memory.view(dtype).view(shape)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{path} is not a readable safetensors file ({one_line(error)}); it may be truncated, so make it again"
        ) from error
    return tensors, metadata


def _fill(file: Any, memory: Tensor) -> None:
    # One read of the system stops at 2 GiB.
    rest = memoryview(memory.numpy().data)
    while rest:
        count = file.readinto(rest)
        if not count:
            raise ValueError("it ends too early")
        rest = rest[count:]

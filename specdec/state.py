"""Making, committing, cutting, forking and storing decode states."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

from specdec import cache as kv
from specdec import metrics as counters
from specdec.cache import KVCache, SlotStore
from specdec.records import Memo, fields_of, is_record, map_rows, record_name, record_type
from specdec.rng import Key, seeded
from specdec.types import (
    Controller,
    DecodeState,
    Drafter,
    Model,
)

D = TypeVar("D")
C = TypeVar("C")

# Long prompts are prefilled in windows of this many tokens, which bounds the attention mask to window x context.
PREFILL_WINDOW = 512

# Of saved states; raised when what a record holds changes.
_FORMAT = 2


def init_state(
    prompts: Sequence[Sequence[int]],
    *,
    model: Model,
    drafter: Drafter,
    controller: Controller,
    max_new_tokens: int,
    seed: int | Sequence[int] = 0,
) -> DecodeState[Any, Any]:
    """The state after the prefill of `prompts` (token ids, ragged): everything but the last token is in the cache.

    `seed`: one number (row r then uses `seed + r`) or one per row. Raises `ValueError` for an empty prompt, an id
    outside the vocabulary, or a prompt that does not fit the model's context together with `max_new_tokens`.
    """
    longest = _check_prompts(prompts, model, max_new_tokens)
    rows, device = len(prompts), model.device
    nodes = drafter.max_nodes(controller.max_depth)
    # A row that is done still takes part in the forward and the scatter, so both need room past its last token.
    capacity = longest + max_new_tokens + nodes
    tokens = torch.zeros(rows, capacity, dtype=torch.int64, device=device)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(list(prompt), dtype=torch.int64, device=device)
    length = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int64, device=device)
    cache, last_features = prefill(model, tokens, length - 1, capacity, features=drafter.features)
    key = seeded(seed, rows, device) if isinstance(seed, int) else Key(torch.tensor(list(seed), device=device))
    zero = torch.zeros(rows, dtype=torch.int64, device=device)
    metrics = counters.zero(rows, controller.max_depth, device)
    prefills = len(range(0, longest - 1, PREFILL_WINDOW))
    return DecodeState(
        tokens=tokens,
        length=length,
        prompt_length=length,
        limit=length + max_new_tokens,
        finish=zero,
        round=zero,
        key=key,
        cache=cache,
        drafter=drafter.init(tokens, length, capacity),
        controller=controller.init(rows, device),
        metrics=counters.add(metrics, target_forwards=prefills),
        features=last_features,
    )


def prefill(
    model: Model, tokens: Int[Tensor, "b t"], length: Int[Tensor, " b"], capacity: int, *, features: bool = False
) -> tuple[KVCache, Tensor | None]:
    """A cache that holds the first `length` tokens of each row, and the features after the last of them.

    The windows run to the longest row; a shorter row's surplus slots are forgotten by a truncation.
    """
    cache = model.init_cache(tokens.shape[0], capacity)
    longest = int(length.max())
    last: Tensor | None = None
    for begin in range(0, longest, PREFILL_WINDOW):
        window = tokens[:, begin : min(begin + PREFILL_WINDOW, longest)]
        _, hidden, cache = model.forward(cache, window, logits=False, features=features)
        if hidden is not None:
            index = (length - 1 - begin).clamp(0, window.shape[1] - 1)
            here = hidden[torch.arange(len(length), device=hidden.device), index]
            inside = ((length - 1 >= begin) & (length - 1 < begin + window.shape[1]))[:, None]
            last = torch.where(inside, here, torch.zeros_like(here) if last is None else last)
    return kv.truncate(cache, length), last


def truncate_state(state: DecodeState[D, C], length: Int[Tensor, " b"], finish: int) -> DecodeState[D, C]:
    """Forget tokens past `length` in every row and finish the rows that were cut; consumes the state's cache.

    Used for stop strings, which are known only once text exists.
    """
    length = torch.minimum(length, state.length)
    cut = length < state.length
    return dataclasses.replace(
        state,
        length=length,
        finish=torch.where(cut, finish, state.finish),
        cache=kv.truncate(state.cache, length - 1),
        metrics=counters.add(state.metrics, emitted=length - state.length),
    )


def fork_state(state: DecodeState[D, C]) -> DecodeState[D, C]:
    """An independent copy: stepping one of the two leaves the other usable."""
    copy: DecodeState[D, C] = map_rows(torch.clone, state)
    return copy


def output_tokens(state: DecodeState[D, C]) -> list[list[int]]:
    """The committed tokens of each row, prompt excluded."""
    return [
        row[begin:end]
        for row, begin, end in zip(
            state.tokens.tolist(), state.prompt_length.tolist(), state.length.tolist(), strict=True
        )
    ]


def _check_prompts(prompts: Sequence[Sequence[int]], model: Model, max_new_tokens: int) -> int:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if not prompts:
        raise ValueError("no prompts were given; pass at least one list of token ids")
    for row, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {row} is empty; give at least one token")
        worst = max(prompt) if min(prompt) >= 0 else min(prompt)
        if not 0 <= worst < model.vocab_size:
            raise ValueError(
                f"prompt {row} contains token id {worst}, outside the model's vocabulary of {model.vocab_size}; "
                "use the model's own tokenizer"
            )
    longest = max(len(prompt) for prompt in prompts)
    if longest + max_new_tokens > model.max_length:
        raise ValueError(
            f"{longest} prompt tokens and {max_new_tokens} new ones exceed the model's context of "
            f"{model.max_length}; shorten the prompt or lower max_new_tokens"
        )
    return longest


def save_state(state: DecodeState[Any, Any], folder: str | Path) -> None:
    """Write a state to `folder` (state.safetensors and state.json); decoding it on later gives the same tokens.

    Memos are left out, since they can be made again. Raises `ValueError` for a value that is neither a tensor, a
    record, a tuple nor a plain JSON value.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    layout = _pack(state, "state", tensors)
    save_file(tensors, folder / "state.safetensors")
    (folder / "state.json").write_text(json.dumps({"format": _FORMAT, "state": layout}))


def load_state(folder: str | Path, *, device: torch.device | str = "cpu") -> DecodeState[Any, Any]:
    """The state that `save_state` wrote. Raises `ValueError` when the folder holds none or another format."""
    from safetensors.torch import load_file

    folder = Path(folder)
    if not (folder / "state.json").is_file() or not (folder / "state.safetensors").is_file():
        raise ValueError(f"{folder} holds no saved state (state.json and state.safetensors)")
    description = json.loads((folder / "state.json").read_text())
    if description.get("format") != _FORMAT:
        raise ValueError(
            f"{folder} was saved in format {description.get('format')}, this version reads format {_FORMAT}"
        )
    state = _unpack(description["state"], load_file(folder / "state.safetensors", device=str(device)))
    if not isinstance(state, DecodeState):
        raise ValueError(f"{folder} holds a {type(state).__name__}, not a decode state")
    return state


def _pack(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[path] = value.contiguous().clone()
        return {"tensor": path}
    if isinstance(value, KVCache):
        kv.check_fresh(value)
        used = tuple(buffer[:, :, : value.extent] for buffer in value.store.slots)
        slots = [_pack(buffer, f"{path}.slots.{index}", tensors) for index, buffer in enumerate(used)]
        return {"cache": slots, "length": _pack(value.length, f"{path}.length", tensors), "capacity": value.capacity}
    if isinstance(value, Memo):
        return {"record": record_name(value), "fields": {}}
    if is_record(value):
        fields = {name: _pack(item, f"{path}.{name}", tensors) for name, item in fields_of(value).items()}
        return {"record": record_name(value), "fields": fields}
    if isinstance(value, tuple):
        return {"tuple": [_pack(item, f"{path}.{index}", tensors) for index, item in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    raise ValueError(f"{path} is a {type(value).__name__}, which cannot be saved; use tensors, records or numbers")


def _unpack(layout: Any, tensors: dict[str, Tensor]) -> Any:
    if "tensor" in layout:
        return tensors[layout["tensor"]]
    if "cache" in layout:
        length, capacity = _unpack(layout["length"], tensors), layout["capacity"]
        slots = []
        for item in layout["cache"]:
            used = _unpack(item, tensors)
            missing = capacity - used.shape[2]
            slots.append(torch.cat([used, used.new_zeros(*used.shape[:2], missing, *used.shape[3:])], 2))
        return KVCache(SlotStore(tuple(slots)), length, 0, int(length.max()))
    if "record" in layout:
        fields = {name: _unpack(item, tensors) for name, item in layout["fields"].items()}
        return record_type(layout["record"])(**fields)
    if "tuple" in layout:
        return tuple(_unpack(item, tensors) for item in layout["tuple"])
    return layout["value"]

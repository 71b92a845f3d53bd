"""Frozen records of tensors: declare them, walk them, take rows of them.

A record is a frozen dataclass whose tensor fields carry the batch on axis 0. `record` declares one and
remembers it by name, so that a saved state can be rebuilt without pickle (`specdec.state.save_state`).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar, dataclass_transform

import torch
from torch import Tensor

T = TypeVar("T")
M = TypeVar("M", bound="Memo")

_REGISTRY: dict[str, type] = {}


@dataclass_transform(frozen_default=True, eq_default=False)
def record(cls: type[T]) -> type[T]:
    """Make `cls` a frozen dataclass (identity equality: tensors have no single truth value) and register it."""
    return register(dataclasses.dataclass(frozen=True, eq=False)(cls))


def register(cls: type[T]) -> type[T]:
    """Remember a class by name, so that a saved value of it can be read back."""
    _REGISTRY[f"{cls.__module__}.{cls.__qualname__}"] = cls
    return cls


class Memo:
    """Host memory that only saves time: whoever holds one must give the same results with an empty one.

    A copy of a state starts with an empty memo, so two branches never write to the same one. Subclasses take no
    constructor arguments and are registered with `register`.
    """

    def map_rows(self: M, function: Callable[[Tensor], Tensor]) -> M:
        return type(self)()


def record_name(value: object) -> str:
    """The registered name of a record's class."""
    return f"{type(value).__module__}.{type(value).__qualname__}"


def record_type(name: str) -> type:
    """The class behind a registered name; raises `ValueError` when no imported module declares it."""
    if name not in _REGISTRY:
        raise ValueError(f"unknown record type {name!r}; import the module that defines it before loading")
    return _REGISTRY[name]


def is_record(value: object) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def fields_of(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def map_rows(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Apply `function` to every tensor of a nested record; objects with a `map_rows` method map themselves."""
    if isinstance(value, Tensor):
        return function(value)
    if hasattr(value, "map_rows"):
        return value.map_rows(function)
    if is_record(value):
        return type(value)(**{name: map_rows(function, item) for name, item in fields_of(value).items()})
    if isinstance(value, tuple):
        items = [map_rows(function, item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value


def select_rows(value: Any, rows: Tensor) -> Any:
    """The record of the given rows, in that order, repeats allowed: `rows` holds indices into the batch axis."""
    return map_rows(lambda tensor: torch.index_select(tensor, 0, rows.to(tensor.device)), value)

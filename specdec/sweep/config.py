"""What a sweep runs: a typed configuration, put together from the command line, the environment, a file and defaults.

Every axis takes one value or a list; a sweep is their product. `cells` lists named configurations instead: each entry
overrides axes for itself. Precedence: command line, `SPECDEC_*`, YAML, default.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from specdec.models.report import did_you_mean
from specdec.registry import DEFAULT_CHAIN, DEFAULT_MODEL
from specdec.sweep.flags import from_environment

DTypeName = Literal["auto", "float64", "float32", "float16", "bfloat16"]


def _listed(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _depths(value: Any) -> Any:
    """Draft depths: 4, [1, 2, 4], "1,2,4" or "0-8"."""
    parts: list[Any] = []
    for item in _listed(value):
        for part in item.split(",") if isinstance(item, str) else [item]:
            first, dash, last = part.partition("-") if isinstance(part, str) else ("", "", "")
            if dash and first.strip().isdigit() and last.strip().isdigit():
                if int(first) > int(last):
                    raise ValueError(f"the range {part.strip()} is empty; write the smaller depth first")
                parts.extend(range(int(first), int(last) + 1))
            else:
                parts.append(part)
    return tuple(parts)


Depth = Annotated[int, Field(ge=0)] | None
Depths = Annotated[tuple[Depth, ...], BeforeValidator(_depths), Field(min_length=1)]
Texts = Annotated[tuple[str, ...], BeforeValidator(_listed), Field(min_length=1)]
Temperatures = Annotated[tuple[Annotated[float, Field(ge=0)], ...], BeforeValidator(_listed), Field(min_length=1)]
Counts = Annotated[tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(_listed), Field(min_length=1)]
Seeds = Annotated[tuple[Annotated[int, Field(ge=0, lt=2**63)], ...], BeforeValidator(_listed), Field(min_length=1)]
DTypes = Annotated[tuple[DTypeName, ...], BeforeValidator(_listed), Field(min_length=1)]


class Strict(BaseModel):
    """Unknown keys are mistakes, and values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class CellSpec(Strict):
    """A named configuration: axes it sets for itself; the others are the sweep's."""

    name: str | None = None
    model: Texts | None = None
    drafter: Texts | None = None
    policy: Texts | None = None
    controller: Texts | None = None
    k: Depths | None = None
    temperature: Temperatures | None = None
    max_new_tokens: Counts | None = None
    dtype: DTypes | None = None
    batch_size: Counts | None = None
    seed: Seeds | None = None


class Config(Strict):
    """A whole sweep; see docs/sweep.md for every key."""

    name: str = "sweep"

    model: Texts = (DEFAULT_MODEL,)
    drafter: Texts = (DEFAULT_CHAIN,)
    policy: Texts = ("auto",)
    controller: Texts = ("auto",)
    k: Depths = (None,)
    temperature: Temperatures = (0.0,)
    max_new_tokens: Counts = (64,)
    dtype: DTypes = ("auto",)
    batch_size: Counts = (1,)
    seed: Seeds = (0,)
    cells: tuple[CellSpec, ...] = ()

    draft_model: str | None = None
    top_k: int = Field(default=0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    min_p: float = Field(default=0.0, ge=0, lt=1)
    repetition_penalty: float = Field(default=1.0, gt=0)
    chat: bool | None = None
    system: str | None = None
    ignore_eos: bool = False

    prompts: str = "builtin"
    limit: int | None = Field(default=None, ge=1)
    iterations: int = Field(default=3, ge=1)
    warmup: int = Field(default=1, ge=0)
    alpha: bool = True

    device: str = "auto"
    adapter: Literal["auto", "decoder", "huggingface"] = "auto"
    trust_remote_code: bool = False

    amp: Literal["auto", "on", "off"] = "auto"
    detailed_metrics: bool = False
    enable_kv_append: bool = True
    force_py: bool = False
    deterministic: bool = False
    profile: bool = False
    trace: bool = False
    trace_limit: int = Field(default=10_000, ge=1)
    cuda_graph: bool = False
    parallel_streams: bool = True
    sync_mode: Literal["event", "barrier"] = "event"
    dry_run: bool = False

    def effective(self) -> dict[str, Any]:
        """Every key with its value, as plain JSON data."""
        return self.model_dump(mode="json")


def load_config(
    file: Path | None = None, *, environ: Mapping[str, str] | None = None, overrides: Mapping[str, Any] | None = None
) -> Config:
    """The configuration of `overrides` (command line) over `environ` over the YAML `file` over the defaults.

    An axis that the command line or the environment sets holds for every entry of `cells`, too. Raises `ValueError`, in
    one line that names the key.
    """
    stated = _read(file) if file is not None else {}
    above = {**from_environment(environ or {}), **(overrides or {})}
    if isinstance(stated.get("cells"), list):
        stated["cells"] = [
            {key: value for key, value in cell.items() if key not in above} if isinstance(cell, dict) else cell
            for cell in stated["cells"]
        ]
    origin = str(file) if file is not None else "the sweep"
    if file is not None and "prompts" in stated and "prompts" not in above:
        stated["prompts"] = _beside(file, stated["prompts"])
    return parse_config({**stated, **above}, origin)


def parse_config(values: Mapping[str, Any], origin: str = "the sweep") -> Config:
    """The configuration of plain values; raises `ValueError` with the key, what it holds and what it may hold."""
    try:
        return Config.model_validate(dict(values))
    except ValidationError as error:
        raise ValueError("; ".join(dict.fromkeys(_problem(detail, origin) for detail in error.errors()))) from None


def differences(stored: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The keys that differ between two effective configurations, each with both values."""
    keys = [*now, *(key for key in stored if key not in now)]
    return [
        f"{key}: {stored.get(key)!r} there, {now.get(key)!r} here" for key in keys if stored.get(key) != now.get(key)
    ]


def _read(file: Path) -> dict[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {file} ({error.strerror}); name a YAML file with the sweep") from error
    except (yaml.YAMLError, UnicodeError) as error:
        raise ValueError(f"{file} is not YAML ({' '.join(str(error).split())})") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds a {type(values).__name__}; a sweep is a mapping of keys to values")
    return {str(key): value for key, value in values.items()}


def _beside(file: Path, prompts: Any) -> Any:
    """A relative prompt file is looked for beside the configuration that names it."""
    beside = file.parent / str(prompts)
    return str(beside) if isinstance(prompts, str) and prompts != "builtin" and beside.is_file() else prompts


def _problem(detail: Any, origin: str) -> str:
    place: Sequence[Any] = detail["loc"]
    known = CellSpec.model_fields if place and place[0] == "cells" else Config.model_fields
    where = ".".join(str(part) for part in place if not isinstance(part, str) or "[" not in part)
    if detail["type"] == "extra_forbidden":
        near = did_you_mean(str(place[-1]), known)
        return f"{origin} has an unknown key {where!r}{near or ' (known: ' + ', '.join(known) + ')'}"
    if place and place[0] == "cells":
        where = ".".join(str(part) for part in place[:3])
    else:
        where = str(place[0]) if place else origin
    return f"{where} cannot be {detail['input']!r}: {detail['msg'].removeprefix('Value error, ')}"

"""From a configuration to its cells: the product of the axes, and the plain baseline each cell is compared with."""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

from specdec import registry
from specdec.grammar import Choice
from specdec.sweep.config import CellSpec, Config

AXES = (
    "model",
    "drafter",
    "policy",
    "controller",
    "k",
    "temperature",
    "max_new_tokens",
    "dtype",
    "batch_size",
    "seed",
)
# What the baseline shares with the cells it is compared with.
_SHARED = ("model", "temperature", "max_new_tokens", "dtype", "batch_size", "seed")
_SHORT = {"temperature": "T", "max_new_tokens": "max", "batch_size": "b", "dtype": "", "model": "", "policy": ""}
# The lab's depth.
_DEFAULT_K = 4


class Cell(NamedTuple):
    """One way of decoding. `drafter`, `policy`, `controller`: as `specdec.grammar` spells them. `k`: the depth asked
    for, 0 for plain decoding, `None` where the controller alone decides. `baseline`: the id of its plain cell."""

    id: str
    model: str
    drafter: str
    policy: str
    controller: str
    k: int | None
    temperature: float
    max_new_tokens: int
    dtype: str
    batch_size: int
    seed: int
    baseline: str = ""

    @property
    def plain(self) -> bool:
        return self.drafter == "none"


def expand(config: Config) -> list[Cell]:
    """The cells, every group of them behind its plain baseline; raises `ValueError` for a choice that is spelled wrong.

    A cell with k = 0 or without a drafter is the baseline itself.
    """
    found: dict[Cell, str] = {}
    for spec in config.cells or (CellSpec(),):
        chosen = [getattr(spec, axis) or getattr(config, axis) for axis in AXES]
        for values in product(*chosen):
            cell = _resolve(dict(zip(AXES, values, strict=True)))
            found.setdefault(_plain(cell), "")
            if not cell.plain:
                found.setdefault(cell, spec.name or "")
    # Baselines first within what they share, in the order of the configuration.
    groups: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in found:
        groups.setdefault(_shared(cell), []).append(cell)
    ordered = [cell for group in groups.values() for cell in sorted(group, key=lambda cell: not cell.plain)]
    return list(_named(ordered, [found[cell] for cell in ordered]))


def _resolve(values: dict[str, Any]) -> Cell:
    """A cell with every `auto` replaced by what it means."""
    drafter = registry.parse_drafter(values["drafter"])
    k, temperature = values["k"], values["temperature"]
    given = None if values["policy"] == "auto" else registry.parse_policy(values["policy"])
    policy = registry.choose_policy(given, temperature)
    if k == 0 or drafter.names() == ("none",):
        return _plain(Cell("", **{**values, "policy": str(policy)}))
    wanted = None if values["controller"] == "auto" else registry.parse_controller(values["controller"])
    default = Choice("fixed", {"k": _DEFAULT_K})
    controller = registry.choose_controller(wanted, k, default)
    depth = controller.options.get("k") if controller.name == "fixed" else k
    return Cell(
        "", **{**values, "drafter": str(drafter), "policy": str(policy), "controller": str(controller), "k": depth}
    )


def _plain(cell: Cell) -> Cell:
    """Plain decoding beside `cell`: same model, type, sampling and batch, no drafts. Coupled decoding promises the
    output of plain decoding with the same noise, so its baseline is coupled, too."""
    policy = cell.policy if cell.policy == "coupled" else str(registry.choose_policy(None, cell.temperature))
    return cell._replace(drafter="none", policy=policy, controller="fixed:k=0", k=0)


def _shared(cell: Cell) -> tuple[Any, ...]:
    return (*(getattr(cell, axis) for axis in _SHARED), cell.policy == "coupled")


def _named(cells: Sequence[Cell], names: Sequence[str]) -> Iterator[Cell]:
    """The cells with ids that tell them apart: what they are, and the axes on which the sweep varies."""
    drafting = [cell for cell in cells if not cell.plain]
    varying = [axis for axis in _SHARED if len({getattr(cell, axis) for cell in cells}) > 1]
    policies = {(cell.policy, cell.temperature) for cell in drafting}
    if len(policies) > len({temperature for _, temperature in policies}):
        varying.insert(0, "policy")
    plain_policies = {(cell.policy, cell.temperature) for cell in cells if cell.plain}
    told_apart = len(plain_policies) > len({temperature for _, temperature in plain_policies})
    baselines: dict[tuple[Any, ...], str] = {}
    used: dict[str, int] = {}
    for cell, name in zip(cells, names, strict=True):
        suffix = [f"{_SHORT.get(axis, axis)}{_spell(getattr(cell, axis))}" for axis in varying]
        fixed = cell.controller.startswith("fixed")
        base = "plain" if cell.plain else f"{name or cell.drafter} {f'k={cell.k}' if fixed else cell.controller}"
        if name and not cell.plain and names.count(name) == 1:
            base, suffix = name, []
        keep = told_apart or not cell.plain
        label = " ".join([base, *(part for part in suffix if keep or part != cell.policy)])
        used[label] = used.get(label, 0) + 1
        label = label if used[label] == 1 else f"{label} #{used[label]}"
        if cell.plain:
            baselines[_shared(cell)] = label
        yield cell._replace(id=label, baseline=baselines[_shared(cell)])


def _spell(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).rstrip("/").rsplit("/", 1)[-1]

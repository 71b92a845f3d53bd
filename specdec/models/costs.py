"""What a forward of n tokens costs on this machine, measured: the curve that decides how long a draft may be. And
which implementation of its linear layers is fastest, where that is a choice.

A forward over a few tokens reads every weight once, so it costs little more than one over a single token until
arithmetic takes over from memory. Where that happens depends on the machine, so it is measured and kept.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch

import specdec_kernels.linear as linears
from specdec import cache as kv
from specdec import controllers, drafters, policies
from specdec.models.store import store_root
from specdec.state import init_state, prefill
from specdec.step import build_step, iterate
from specdec.transforms import Parts, timed_parts, with_timing
from specdec.types import Model, implementations
from specdec_kernels.clock import Clock

SIZES = (1, 2, 3, 5, 9, 17)

# A median this far above the fastest run says that something else was running. Medians of a 135M model (float32, 42 to
# 102 ms, three runs) stayed within 1.32 on 2 cores with little else to do.
_STEADY = 1.5

# Raised whenever what is measured changes, so that older files are measured again.
_FORMAT = 4

T = TypeVar("T")


def measure_costs(
    model: Model, sizes: Sequence[int] = SIZES, *, context: int = 128, repeats: int = 5, budget: float = 3.0
) -> dict[int, float]:
    """Seconds of a forward of n tokens behind `context` others, for every n of `sizes`: the median of `repeats`. Those
    that a plain greedy round takes besides its forward stand under 0.

    All sizes are measured in turn and then again, so that a machine that slows down meanwhile slows them all; the
    first turn warms up and does not count. Once `budget` seconds are spent, no further turn begins, but one counts in
    any case. A short context of the model shortens `context` and drops larger sizes.
    """
    return _medians(_measure(model, sizes, context, repeats, budget))


def cached_costs(
    model: Model,
    sizes: Sequence[int] = SIZES,
    *,
    context: int = 128,
    repeats: int = 5,
    budget: float = 3.0,
    refresh: bool = False,
) -> dict[int, float]:
    """`measure_costs`, kept in the model store for the next process on the same machine with the same settings.

    `refresh` measures again. What was measured on a machine busy with other things is not kept, and a store that
    cannot be written is no obstacle: the costs are then measured every time.
    """
    key = cost_key(model) | {"sizes": list(sizes), "context": context}
    path = _path(key)
    known = None if refresh else _read(path, key, _seconds)
    if known is not None:
        return known
    times = _measure(model, sizes, context, repeats, budget)
    if _steady({n: seconds for n, seconds in times.items() if n}):
        with suppress(OSError):
            _write(path, {"key": key, "seconds": _medians(times)})
    return _medians(times)


def cached_comparison(
    shapes: Mapping[tuple[int, int], int], names: Sequence[str], format: str
) -> Mapping[str, linears.Timing]:
    """`specdec_kernels.linear.compare`, kept in the model store as `cached_costs` are."""
    key = {
        "format": _FORMAT,
        "linear": format,
        "implementations": list(names),
        "shapes": [[*shape, count] for shape, count in shapes.items()],
        **_machine(),
    }
    path = _path(key)
    known = _read(path, key, _timings)
    if known is not None:
        return known
    found = linears.compare(shapes, names, format)
    if all(map(_steady, (timing.turns for timing in found.values()))):
        with suppress(OSError):
            _write(path, {"key": key, "linears": {name: timing._asdict() for name, timing in found.items()}})
    return found


def _timings(content: Mapping[str, Any]) -> dict[str, linears.Timing]:
    return {
        name: linears.Timing(
            {int(rows): list(map(float, times)) for rows, times in stored["turns"].items()}, stored["alone"]
        )
        for name, stored in content["linears"].items()
    }


def _steady(times: Mapping[int, Sequence[float]]) -> bool:
    return all(median(seconds) <= _STEADY * min(seconds) for seconds in times.values())


def _measure(model: Model, sizes: Sequence[int], context: int, repeats: int, budget: float) -> dict[int, list[float]]:
    sizes = sorted({n for n in sizes if 1 <= n < model.max_length})
    if not sizes or repeats < 1:
        raise ValueError(f"sizes must hold numbers from 1 to {model.max_length - 1} and repeats be at least 1")
    context = max(1, min(context, model.max_length - sizes[-1]))
    tokens = (torch.arange(context + sizes[-1], device=model.device) % model.vocab_size)[None]
    length = torch.tensor([context], device=model.device)
    cache, _ = prefill(model, tokens, length, context + sizes[-1])
    clock = Clock(model.device)
    times: dict[int, list[float]] = {n: [] for n in sizes}
    spent = 0.0
    for turn in range(repeats + 1):
        if turn > 1 and spent > budget:
            break
        for n in sizes:
            begin = clock.now()
            _, _, cache = model.forward(cache, tokens[:, context : context + n])
            elapsed = clock.now() - begin
            cache = kv.truncate(cache, length)
            spent += elapsed
            if turn:
                times[n].append(elapsed)
    return times | {0: _measure_rounds(model, repeats)}


def _measure_rounds(model: Model, repeats: int) -> list[float]:
    """Seconds that plain greedy rounds take besides their forward; the first warms up and does not count."""
    clock = Clock(model.device)
    parts = timed_parts(Parts(model, drafters.none(), policies.greedy(), controllers.fixed(0)), clock)
    step = with_timing(build_step(*parts), clock)
    rounds = min(repeats + 1, model.max_length - 1)
    state = init_state([[0]], model=model, drafter=parts.drafter, controller=parts.controller, max_new_tokens=rounds)
    timing = [info.timing or {} for _, info in iterate(step, state)]
    return [seconds["total"] - seconds["verify"] for seconds in timing[1:] or timing]


def _medians(times: Mapping[int, Sequence[float]]) -> dict[int, float]:
    return {n: median(seconds) for n, seconds in times.items()}


def cost_key(model: Model) -> dict[str, Any]:
    """Everything the costs depend on, as plain values: the model, how it is computed, and on what."""
    gpu = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else None
    return {
        "format": _FORMAT,
        "model": model.name,
        "adapter": model.adapter,
        "layers": model.num_layers,
        "vocab_size": model.vocab_size,
        "dtype": str(model.dtype).removeprefix("torch."),
        "implementations": implementations(model),
        "device": gpu or model.device.type,
        **_machine(),
    }


def _machine() -> dict[str, Any]:
    return {
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _path(key: Mapping[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return store_root() / "costs" / f"{digest}.json"


def _read(path: Path, key: Mapping[str, Any], parse: Callable[[Mapping[str, Any]], T]) -> T | None:
    """What a file holds that was written for exactly this key; `None` where there is none that can be used."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return parse(found) if found["key"] == key else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _seconds(content: Mapping[str, Any]) -> dict[int, float]:
    costs = {int(n): float(seconds) for n, seconds in content["seconds"].items()}
    if not costs or min(costs.values()) <= 0:
        raise ValueError("nothing takes no time")
    return costs


def _write(path: Path, content: Mapping[str, Any]) -> None:
    """Put a file in place whole, whatever else reads or writes it meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        draft.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)

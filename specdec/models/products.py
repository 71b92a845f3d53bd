"""Which implementation multiplies the matrices of a model that no fused stack runs."""

from collections.abc import Callable, Mapping, Sequence

import torch

from specdec.models.checkpoint import Spec
from specdec.models.report import ModelError
from specdec_kernels import linear as linears
from specdec_kernels.dispatch import Choice, choose, implementations
from specdec_kernels.linear import Timing

Compare = Callable[[Mapping[tuple[int, int], int], Sequence[str], str], Mapping[str, Timing]]
"""What implementations cost in given shapes and a format: `specdec_kernels.linear.compare`, or what remembers it."""


def choose_linear(
    spec: Spec, device: torch.device, dtype: torch.dtype, requested: str, format: str, compare: Compare | None
) -> tuple[Choice, Mapping[str, Timing]]:
    """The implementation of the linear layers, and what was measured to choose it.

    A name is taken at its word. On a CPU, `auto` measures with `compare` what can keep float32 weights in `format`,
    and takes the fastest whose rows do not depend on each other; without `compare`, and elsewhere, the dispatch rule
    decides.

    Raises `ValueError` for a named implementation that cannot run, `ModelError` where none keeps weights in `format`.
    """
    if requested != "auto":
        return choose("linear", device, dtype, requested=requested), {}
    problems = implementations("linear", device, dtype)
    able = [name for name in linears.ON_CPU if problems[name] is None and format in linears.formats_of(name)]
    if not able and format != "fp32":
        raise ModelError(f"quantize {format!r} needs the CPU kernels, which do not run here: cpu {problems['cpu']}")
    if compare is not None and len(able) > 1:
        timings = compare(shapes_of(spec), able, format)
        return fastest(timings), timings
    if format == "fp32":
        return choose("linear", device, dtype), {}
    return Choice(able[0], f"keeps weights in {format}"), {}


def shapes_of(spec: Spec) -> dict[tuple[int, int], int]:
    """How many matrices of each `(out, in)` a forward multiplies with."""
    inner = 2 * spec.inner if spec.gated else spec.inner
    shapes = {(spec.vocab_size, spec.hidden): 1}
    for shape in (
        ((spec.heads + 2 * spec.kv_heads) * spec.head_size, spec.hidden),
        (spec.hidden, spec.heads * spec.head_size),
        (inner, spec.hidden),
        (spec.hidden, spec.inner),
    ):
        shapes[shape] = shapes.get(shape, 0) + spec.num_layers
    return shapes


def fastest(timings: Mapping[str, Timing]) -> Choice:
    """The least total time among those whose rows stand alone, or among all where none does."""
    total = {name: sum(timing.seconds.values()) for name, timing in timings.items()}
    eligible = [name for name in timings if timings[name].alone] or list(timings)
    best = min(eligible, key=total.__getitem__)
    rejected = {
        name: f"takes {total[name] / total[best]:.2f} times as long as {best}"
        if name in eligible
        else "gives a row other bits in other company"
        for name in timings
        if name != best
    }
    reason = "measured fastest" if len(eligible) == len(timings) else "measured fastest of those whose rows stand alone"
    return Choice(best, reason, tuple(rejected.items()))

"""Which implementation of an operation runs, and why: a rule over a table, without state.

`choose` is the rule and only reads; `resolve` applies it, imports what it chose and remembers the answer. Priority is
CUDA C++, Triton, torch on GPUs, and on the CPU its own kernels, plain Python over its memory (`host`), torch; what may
run where is stated once, in `_problem`, and what an operation needs beyond that in its row of `OPERATIONS`. MPS and
every other device run the torch definitions.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import import_module
from importlib.util import find_spec
from shutil import which
from typing import Any, NamedTuple

import torch

Shape = tuple[int, ...]
Refuse = Callable[[torch.device, torch.dtype, Shape], str | None]
Load = Callable[[], Callable[..., Any]]

FORCE_TORCH = "SPECDEC_FORCE_PY"
INTERPRET = "TRITON_INTERPRET"

# With 32 rows of 8 nodes in warm caches, Python took as long as torch for a verdict, 1.4 times as long for a commit.
FEW_ROWS = 32


class Implementation(NamedTuple):
    """One way to compute an operation. `refuse` says why it cannot run on a device with a type and shapes (as the end
    of a sentence about it), or `None` when it can; `load` imports it and returns the function. `slower`: what was
    measured or seen against it, the end of the same sentence; it then runs only by name."""

    name: str
    refuse: Refuse
    load: Load
    slower: str | None = None


@dataclass(frozen=True)
class Choice:
    """`implementation` to run, the `reason` it was chosen, and the better ones that cannot run, each with why."""

    implementation: str
    reason: str
    rejected: tuple[tuple[str, str], ...] = ()


def anywhere(device: torch.device, dtype: torch.dtype, shape: Shape) -> None:
    """The `refuse` of what needs nothing beyond the rule of its name."""


def compiled(source: str) -> Refuse:
    """The `refuse` of what `cuda/{source}.cu` compiles to; compiles it on first use."""

    def refuse(device: torch.device, dtype: torch.dtype, shape: Shape) -> str | None:
        from specdec_kernels.cuda import library

        return library.available(source, device)

    return refuse


def floats(*dtypes: torch.dtype) -> Refuse:
    """The `refuse` of what computes in `dtypes` only."""

    def refuse(device: torch.device, dtype: torch.dtype, shape: Shape) -> str | None:
        names = ", ".join(_name(known) for known in dtypes)
        return None if dtype in dtypes else f"is built for {names}, not for {_name(dtype)}"

    return refuse


def few_rows(device: torch.device, dtype: torch.dtype, shape: Shape) -> str | None:
    """The `refuse` of what goes through the rows of a batch one by one; `shape` begins with their number."""
    return f"is for up to {FEW_ROWS} rows, not for {shape[0]}" if shape and shape[0] > FEW_ROWS else None


def every(*rules: Refuse) -> Refuse:
    """The first objection of several rules, in order: put what compiles last."""

    def refuse(device: torch.device, dtype: torch.dtype, shape: Shape) -> str | None:
        return next((reason for rule in rules if (reason := rule(device, dtype, shape)) is not None), None)

    return refuse


def stated(module: str) -> Refuse:
    """The `refuse` of `specdec_kernels.{module}`, imported when it is asked."""

    def refuse(device: torch.device, dtype: torch.dtype, shape: Shape) -> str | None:
        reason: str | None = import_module(f"specdec_kernels.{module}").refuse(device, dtype, shape)
        return reason

    return refuse


def lazy(module: str, function: str) -> Load:
    """A `load` that imports `specdec_kernels.{module}` when it is called."""
    return lambda: getattr(import_module(f"specdec_kernels.{module}"), function)


def _refuse_cpu(device: torch.device, dtype: torch.dtype, shape: Shape) -> str | None:
    # Compiles the kernels on first use.
    from specdec_kernels.cpu import library

    return library.refuse(device, dtype)


def _refuse_library(name: str) -> Refuse:
    def refuse(device: torch.device, dtype: torch.dtype, shape: Shape) -> str | None:
        from specdec_kernels import linear

        return linear.refuse_library(name, device, dtype)

    return refuse


def _load_linear(name: str) -> Load:
    def load() -> Callable[..., Any]:
        from specdec_kernels import linear

        return linear.IMPLEMENTATIONS[name]

    return load


def _load_stack() -> Callable[..., Any]:
    raise ValueError("decoder_stack: this is the decoder in specdec.models, which calls the other operations")


_LOGITS = floats(torch.float32, torch.float16, torch.bfloat16)
_NUMPY = floats(torch.float64, torch.float32, torch.float16)

# Fastest first, the definition last. `shape` is that of the first tensor an operation takes.
OPERATIONS: Mapping[str, tuple[Implementation, ...]] = {
    "decoder_stack": (
        Implementation("cpu", _refuse_cpu, lazy("cpu.stack", "stack_forward")),
        Implementation("triton", floats(torch.float32, torch.float16, torch.bfloat16), _load_stack),
        Implementation("torch", anywhere, _load_stack),
    ),
    "linear": (
        Implementation("cpu", _refuse_cpu, _load_linear("cpu")),
        Implementation("onednn", _refuse_library("onednn"), _load_linear("onednn")),
        Implementation("fbgemm", _refuse_library("fbgemm"), _load_linear("fbgemm"), slower="rounds weights to float16"),
        Implementation("triton", stated("ops.product_triton"), _load_linear("triton")),
        Implementation("torch", anywhere, _load_linear("torch")),
    ),
    "layers": (
        Implementation("cuda", stated("ops.layers_cuda"), lazy("ops.layers_cuda", "bind_layers")),
        Implementation("torch", anywhere, lazy("ops.layers", "bind_layers")),
    ),
    "product": (
        Implementation("cuda", stated("ops.product_cuda"), lazy("ops.product_cuda", "product")),
        Implementation("triton", stated("ops.product_triton"), lazy("ops.product_triton", "product")),
        Implementation("torch", anywhere, lazy("ops.product", "product")),
    ),
    "attend": (
        Implementation("cuda", stated("ops.attend_cuda"), lazy("ops.attend_cuda", "attend")),
        Implementation("torch", anywhere, lazy("ops.attend", "attend")),
    ),
    "tree_attention": (
        Implementation("triton", stated("ops.attention_triton"), lazy("ops.attention_triton", "tree_attention")),
        Implementation("flex", stated("ops.attention_flex"), lazy("ops.attention_flex", "tree_attention")),
        Implementation("torch", anywhere, lazy("ops.attention", "tree_attention")),
    ),
    "rms_norm_residual": (
        Implementation("triton", stated("ops.fused_triton"), lazy("ops.fused_triton", "rms_norm_residual")),
        Implementation("torch", anywhere, lazy("ops.fused", "rms_norm_residual")),
    ),
    "rope_write": (
        Implementation("triton", stated("ops.fused_triton"), lazy("ops.fused_triton", "rope_write")),
        Implementation("torch", anywhere, lazy("ops.fused", "rope_write")),
    ),
    "silu_mul": (
        Implementation("triton", stated("ops.fused_triton"), lazy("ops.fused_triton", "silu_mul")),
        Implementation("torch", anywhere, lazy("ops.fused", "silu_mul")),
    ),
    "kv_keep": (
        Implementation("cuda", compiled("kv_keep"), lazy("ops.keep_cuda", "keep")),
        Implementation("triton", anywhere, lazy("ops.keep_triton", "keep")),
        Implementation("host", few_rows, lazy("ops.host", "keep")),
        Implementation("torch", anywhere, lazy("ops.keep", "keep")),
    ),
    "best_depth": (
        Implementation("host", few_rows, lazy("ops.host", "best_depth")),
        Implementation("torch", anywhere, lazy("ops.depth", "best_depth")),
    ),
    "learn_depth": (
        Implementation("host", few_rows, lazy("ops.host", "learn_depth")),
        Implementation("torch", anywhere, lazy("ops.depth", "learn_depth")),
    ),
    "commit": (
        Implementation("triton", anywhere, lazy("ops.commit_triton", "commit")),
        Implementation("host", every(_NUMPY, few_rows), lazy("ops.host", "commit")),
        Implementation("torch", anywhere, lazy("ops.commit", "commit")),
    ),
    "count_round": (
        Implementation("triton", anywhere, lazy("ops.commit_triton", "count_round")),
        Implementation("host", few_rows, lazy("ops.host", "count_round")),
        Implementation("torch", anywhere, lazy("ops.commit", "count_round")),
    ),
    "tree_shape": (
        Implementation("host", few_rows, lazy("ops.host", "tree_shape")),
        Implementation("torch", anywhere, lazy("ops.walk", "tree_shape")),
    ),
    "suffix_match": (
        Implementation("triton", anywhere, lazy("ops.match_triton", "suffix_match")),
        Implementation("torch", anywhere, lazy("ops.match", "suffix_match")),
    ),
    "gumbel": (
        Implementation("triton", anywhere, lazy("ops.philox_triton", "gumbel")),
        Implementation("torch", anywhere, lazy("ops.philox", "gumbel")),
    ),
    "philox": (
        Implementation("triton", anywhere, lazy("ops.philox_triton", "philox")),
        Implementation("torch", anywhere, lazy("ops.philox", "philox")),
    ),
    "uniforms": (
        Implementation("triton", anywhere, lazy("ops.philox_triton", "uniforms")),
        Implementation("torch", anywhere, lazy("ops.philox", "uniforms")),
    ),
    "verify_block": (
        Implementation("triton", anywhere, lazy("ops.rejection_triton", "verify_block")),
        Implementation("torch", anywhere, lazy("ops.verify", "verify_block")),
    ),
    "verify_coupled": (
        Implementation("triton", anywhere, lazy("ops.choice_triton", "verify_coupled")),
        Implementation("torch", anywhere, lazy("ops.verify", "verify_coupled")),
    ),
    "verify_greedy": (
        Implementation("cuda", every(_LOGITS, compiled("verify_greedy")), lazy("ops.verify_cuda", "verify_greedy")),
        Implementation("triton", anywhere, lazy("ops.choice_triton", "verify_greedy")),
        Implementation("host", every(_NUMPY, few_rows), lazy("ops.host", "verify_greedy")),
        Implementation("torch", anywhere, lazy("ops.verify", "verify_greedy")),
    ),
    "verify_lossless": (
        Implementation("triton", anywhere, lazy("ops.rejection_triton", "verify_lossless")),
        Implementation("torch", anywhere, lazy("ops.verify", "verify_lossless")),
    ),
    "verify_match": (
        Implementation("triton", anywhere, lazy("ops.choice_triton", "verify_match")),
        Implementation("torch", anywhere, lazy("ops.verify", "verify_match")),
    ),
    "warp": (
        Implementation(
            "triton",
            anywhere,
            lazy("ops.law_triton", "warp"),
            slower="took 4 to 12 times as long as torch with top-k and top-p on an H200",
        ),
        Implementation("torch", anywhere, lazy("ops.law", "warp")),
    ),
}


def choose(
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    shape: Shape = (),
    requested: str = "auto",
    environ: Mapping[str, str] = os.environ,
) -> Choice:
    """The implementation of `op` for tensors of `dtype` on `device`; `shape` is that of the first one.

    `auto` takes the first of the table that can run and records why the ones before it cannot. A name is taken at
    its word: `ValueError` when it cannot run. `SPECDEC_FORCE_PY=1` in `environ` leaves only the torch definition.
    Triton's interpreter (`TRITON_INTERPRET=1`) runs only by name.
    """
    if op not in OPERATIONS:
        raise ValueError(f"unknown operation {op!r}; known: {', '.join(OPERATIONS)}")
    table = OPERATIONS[op]
    names = [candidate.name for candidate in table]
    if requested not in ("auto", *names):
        raise ValueError(f"{op} has no implementation {requested!r}; use auto, {', '.join(names)}")
    rejected: list[tuple[str, str]] = []
    for candidate in table:
        if requested not in ("auto", candidate.name):
            continue
        problem = _problem(candidate, device, dtype, shape, requested, environ)
        if problem is None:
            return Choice(candidate.name, _reason(candidate.name, requested, environ, rejected), tuple(rejected))
        rejected.append((candidate.name, problem))
    raise ValueError(f"{op}: {rejected[-1][0]} {rejected[-1][1]}; use auto")


def implementations(
    op: str, device: torch.device, dtype: torch.dtype, shape: Shape = (), environ: Mapping[str, str] = os.environ
) -> dict[str, str | None]:
    """Every implementation of `op`, in order, with why it cannot run when asked for by name, or `None` if it can."""
    return {
        candidate.name: _problem(candidate, device, dtype, shape, candidate.name, environ)
        for candidate in OPERATIONS[op]
    }


@lru_cache(maxsize=4096)
def resolve(
    op: str, device: torch.device, dtype: torch.dtype, shape: Shape = (), requested: str = "auto"
) -> Callable[..., Any]:
    """The function that `choose` picks; raises what it raises.

    The answer is remembered, so a call in a round costs a look-up; `resolve.cache_clear()` after changing the
    environment. Leave out the parts of `shape` that decide nothing, or every new length is a new look-up.
    """
    name = choose(op, device, dtype, shape, requested).implementation
    return next(candidate for candidate in OPERATIONS[op] if candidate.name == name).load()


def _problem(
    candidate: Implementation,
    device: torch.device,
    dtype: torch.dtype,
    shape: Shape,
    requested: str,
    environ: Mapping[str, str],
) -> str | None:
    """Why `candidate` cannot run: what holds for all of its name, then what it says itself."""
    if candidate.name != "torch" and environ.get(FORCE_TORCH) == "1":
        return f"is ruled out by {FORCE_TORCH}=1"
    problem = None
    if candidate.name == "cuda" and device.type != "cuda":
        problem = f"runs on NVIDIA GPUs, not on {device.type}"
    elif candidate.name == "host" and device.type != "cpu":
        problem = f"works in the memory of the CPU, not on {device.type}"
    elif candidate.name == "triton":
        problem = _refuse_triton(device, requested, environ)
    if requested == "auto":
        problem = problem or candidate.slower
    return problem or candidate.refuse(device, dtype, shape)


def _refuse_triton(device: torch.device, requested: str, environ: Mapping[str, str]) -> str | None:
    interpreted = environ.get(INTERPRET) == "1"
    if device.type not in ("cuda", "cpu"):
        return f"runs on GPUs, not on {device.type}"
    if device.type == "cpu" and not interpreted:
        return f"runs on GPUs, not on the CPU; {INTERPRET}=1 interprets it"
    if interpreted and requested != "triton":
        return f"is interpreted with {INTERPRET}=1, which runs only by name"
    return _probe_triton(interpreted)


@cache
def _probe_triton(interpreted: bool) -> str | None:
    if find_spec("triton") is None:
        return "is not installed"
    # Triton compiles the function that launches a kernel with the machine's C compiler.
    if not interpreted and not any(map(which, (os.environ.get("CC") or "cc", "gcc", "clang"))):
        return "needs a C compiler; install gcc or clang"
    return None


def _reason(name: str, requested: str, environ: Mapping[str, str], rejected: list[tuple[str, str]]) -> str:
    if requested == name:
        return "asked for"
    if rejected and environ.get(FORCE_TORCH) == "1":
        return f"{FORCE_TORCH}=1"
    if rejected:
        return "; ".join(f"{other} {problem}" for other, problem in rejected)
    return "fastest that runs here"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

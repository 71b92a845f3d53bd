"""Every operation against its definition, torch.compile of the definition, and the time its bytes need.

    python benchmarks/kernels.py --out docs/results/kernels        # writes kernels.json, kernels.csv and kernels.md

A case is an operation with sizes: rows b, nodes n, vocabulary v, context c. The first case of every operation comes
first, so a run that `--seconds` cuts short still has all operations; what was measured is on disk after every case.

Times are microseconds, medians of single calls between two CUDA events, over copies of the arguments that together
exceed the L2 cache twice where memory allows. `us` is called eagerly, so it contains what the host needs to launch;
`graph_us` is one call within a replayed CUDA graph of all copies, in turn, what remains once launches cost nothing.
`floor_us` is the time in which the bytes that must move (every input that decides the result read once, every output
written once) are moved at the bandwidth that a plain device copy reaches in the same run. A kernel that may stop early,
such as a rejection, can be below it. `differ` is the largest absolute difference to the definition on the same input,
in floating point, or the number of integers that differ.

`tree_attention` has two rivals in torch, on the same caches: `sdpa`, scaled_dot_product_attention with a dense mask
that is made beforehand and with the heads of a group as rows, so that it reads a key once, too; and `flash`, the flash
attention in torch, on chains, which are all it can do. `attend` has one: `parts`, the launches it takes the place of.

On the CPU the definitions alone are timed, with a clock; there is nothing else to compare them with.
"""

import csv
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import cycle, islice, product, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from common import provenance
from torch import Tensor

from specdec.models.loading import choose_device
from specdec.models.report import ModelError
from specdec_kernels.dispatch import OPERATIONS, choose, resolve

# A Llama-3 8B layer: 32 query heads over 8 key-value heads of 128, hidden 4096, inner 14336, 32 layers.
HEADS, KV_HEADS, HEAD_SIZE, HIDDEN, INNER, LAYERS = 32, 8, 128, 4096, 14336, 32
VOCABULARIES = (128 * 1024, 32 * 1024, 256 * 1024 - 1)
WARPED = {"temperature": 0.8}

# Most bytes of arguments in one case: definitions need several times as much beside them.
LARGEST = {"cuda": 2.2e9, "cpu": 7e7, "mps": 2e8}
COPIES = 64
# Calls of a graph, at least: the gap between two replays is shared by them.
GRAPHED = 16

Row = dict[str, Any]


class Call(NamedTuple):
    """Arguments of one call, and what to look at afterwards where the operation works in place."""

    args: tuple[Any, ...]
    options: Mapping[str, Any] = {}
    changed: tuple[Tensor, ...] = ()


class Contender(NamedTuple):
    """Something to time: how to import it, and what it takes in place of the arguments of the operation."""

    load: Callable[[], Callable[..., Any]]
    prepare: Callable[[Call], Call] = lambda call: call


class Case(NamedTuple):
    """One row of the table per implementation. `size`: bytes of the arguments; `moved`: bytes that must move."""

    op: str
    label: str
    sizes: Mapping[str, int]
    dtype: torch.dtype
    shape: tuple[int, ...]
    size: float
    moved: float
    make: Callable[[torch.Generator], Call]


def draft(generator: torch.Generator, b: int, n: int, v: int, dtype: torch.dtype, tree: bool) -> dict[str, Tensor]:
    """A tree or chain of drafts, logits in which they are likely, and the laws they were drawn from."""
    device = generator.device
    logits = 3 * torch.randn(b, n, v, generator=generator, device=device)
    index = torch.arange(n, device=device).expand(b, n)
    parents = (index - 1) // 2 if tree else index - 1
    laws = torch.softmax(logits + 0.5 * torch.randn(b, n, v, generator=generator, device=device), -1)
    # The largest of the parent's law: mostly accepted, whatever the rule.
    tokens = laws.argmax(-1).gather(1, parents.clamp_min(0))
    return {
        "logits": logits.to(dtype),
        "tokens": tokens,
        "parents": parents.contiguous(),
        "valid": torch.ones(b, n, dtype=torch.bool, device=device),
        "sampled": index > 0,
        "draft_probs": laws,
        "accept": torch.rand(b, n, generator=generator, device=device),
        "token": torch.rand(b, generator=generator, device=device),
    }


def verification(op: str, names: Sequence[str], options: Mapping[str, Any], b: int, n: int, v: int) -> Case:
    """A verification of `b` rows of `n` nodes: chains, and trees from 64 nodes on where the rule takes them."""
    dtype, tree = torch.bfloat16, n >= 64 and "parents" in names
    if op in ("verify_greedy", "verify_match", "verify_coupled"):
        options = {"chain": not tree, **options}
    laws = 4 * b * n * v if "draft_probs" in names else 0

    def make(generator: torch.Generator) -> Call:
        made = draft(generator, b, n, v, dtype, tree)
        more = dict(options)
        if op == "verify_coupled":
            more |= {"seed": torch.arange(b, device=generator.device)}
            more |= {"position": torch.arange(n, device=generator.device).expand(b, n).contiguous()}
        return Call(tuple(made[name] for name in names), more)

    size = 2 * b * n * v + laws
    return Case(op, "tree" if tree else "chain", {"b": b, "n": n, "v": v}, dtype, (b, n, v), size, size, make)


def warp(label: str, options: Mapping[str, Any], b: int, n: int, v: int) -> Case:
    def make(generator: torch.Generator) -> Call:
        logits = 3 * torch.randn(b, n, v, generator=generator, device=generator.device)
        return Call((logits.to(torch.bfloat16),), options)

    size = 2 * b * n * v
    return Case("warp", label, {"b": b, "n": n, "v": v}, torch.bfloat16, (b, n, v), size, 3 * size, make)


def philox(b: int, n: int, v: int) -> Case:
    def make(generator: torch.Generator) -> Call:
        device = generator.device
        counter = [torch.zeros(1, 1, 1, dtype=torch.int64, device=device) for _ in range(4)]
        counter[0] = torch.arange(v // 4, device=device)[None, None]
        counter[2] = torch.arange(n, device=device)[None, :, None]
        return Call((tuple(counter), torch.arange(b, device=device)))

    words = b * n * (v // 4) * 4
    return Case("philox", "words", {"b": b, "n": n, "v": v}, torch.int64, (b,), 8 * words, 8 * words, make)


def uniforms(b: int, n: int) -> Case:
    def make(generator: torch.Generator) -> Call:
        return Call((torch.arange(b, device=generator.device), torch.arange(b, device=generator.device), 2, n, 3))

    size = 8 * b * (n + 1)
    return Case("uniforms", "a round", {"b": b, "n": n}, torch.int64, (b,), size, size, make)


def gumbel(b: int, n: int, v: int) -> Case:
    def make(generator: torch.Generator) -> Call:
        device = generator.device
        return Call((torch.arange(b, device=device), torch.arange(n, device=device).expand(b, n).contiguous(), v))

    size = 8 * b * n * v
    return Case("gumbel", "noise", {"b": b, "n": n, "v": v}, torch.int64, (b,), size, size, make)


def keep(b: int, n: int, c: int) -> Case:
    """Half of `n` nodes is kept, every other one, in all layers: as much moves as a path of that length can."""
    kept = max(1, n // 2)
    dtype, slots = torch.bfloat16, (2 * LAYERS, b, c + n, KV_HEADS, HEAD_SIZE)

    def make(generator: torch.Generator) -> Call:
        device = generator.device
        buffer = torch.randn(slots, generator=generator, device=device, dtype=dtype)
        nodes = torch.arange(1, 2 * kept + 1, 2, device=device).expand(b, kept).contiguous()
        count = torch.full((b,), kept, device=device)
        return Call(
            ((buffer,), torch.full((b,), c, device=device), nodes.clamp_max(max(1, n - 1)), count), {}, (buffer,)
        )

    slot = 2 * KV_HEADS * HEAD_SIZE
    moved = 2 * slots[0] * b * kept * slot
    return Case(
        "kv_keep", "every other", {"b": b, "n": n, "c": c}, dtype, slots, slot * slots[0] * b * slots[2], moved, make
    )


def attention(b: int, n: int, c: int) -> Case:
    dtype, tree = torch.bfloat16, n >= 64

    def make(generator: torch.Generator) -> Call:
        from specdec_kernels.ops.attention import pack_ancestors
        from specdec_kernels.ops.walk import ancestors

        device = generator.device
        normal = partial(torch.randn, generator=generator, device=device, dtype=dtype)
        query = normal(b, n, HEADS, HEAD_SIZE)
        keys, values = normal(2, b, c + n, KV_HEADS, HEAD_SIZE)
        length = torch.full((b,), c, device=device)
        options: dict[str, Any] = {"extent": c + n}
        if tree:
            parents = ((torch.arange(n, device=device) - 1) // 2).expand(b, n).contiguous()
            options["ancestors"] = pack_ancestors(ancestors(parents))
        return Call((query, keys, values, length), options)

    cache = 2 * 2 * b * (c + n) * KV_HEADS * HEAD_SIZE
    moved = cache + 2 * 2 * b * n * HEADS * HEAD_SIZE
    sizes = {"b": b, "n": n, "c": c}
    return Case(
        "tree_attention", "tree" if tree else "chain", sizes, dtype, (b, n, HEADS, HEAD_SIZE), cache, moved, make
    )


def attending(b: int, n: int, c: int) -> Case:
    """Rotation, cache write and attention of a layer."""
    dtype, heads = torch.bfloat16, HEADS + 2 * KV_HEADS

    def make(generator: torch.Generator) -> Call:
        device = generator.device
        normal = partial(torch.randn, generator=generator, device=device)
        angle = 3 * normal(b, n, HEAD_SIZE // 2)
        keys, values = normal(2, b, c + n, KV_HEADS, HEAD_SIZE, dtype=dtype)
        rotation = torch.stack((angle.cos(), angle.sin()), -1)
        length = torch.full((b,), c, device=device)
        projected = normal(b, n, heads, HEAD_SIZE, dtype=dtype)
        return Call((projected, rotation, keys, values, length), {"extent": c + n}, (keys[:, c:], values[:, c:]))

    cache = 2 * 2 * b * (c + n) * KV_HEADS * HEAD_SIZE
    moved = cache + 2 * 2 * b * n * heads * HEAD_SIZE + 4 * b * n * HEAD_SIZE
    sizes = {"b": b, "n": n, "c": c}
    return Case("attend", "chain", sizes, dtype, (b, n, heads, HEAD_SIZE), cache, moved, make)


def parts_of_attend(device: torch.device) -> Callable[..., Any]:
    """`attend` as the launches of its parts."""
    turn = resolve("rope_write", device, torch.bfloat16)
    mix = resolve("tree_attention", device, torch.bfloat16)

    def run(heads: Tensor, rotation: Tensor, keys: Tensor, values: Tensor, length: Tensor, *, extent: int) -> Tensor:
        slots = length[:, None] + torch.arange(heads.shape[1], device=device)
        mixed: Tensor = mix(turn(heads, rotation, slots, keys, values), keys, values, length, extent=extent)
        return mixed

    return run


def committing(b: int, n: int, c: int) -> Case:
    """A chain of which all was accepted, behind a text of `c` tokens."""
    v = VOCABULARIES[0]

    def make(generator: torch.Generator) -> Call:
        device = generator.device
        count = partial(torch.full, (b,), device=device)
        index = torch.arange(n, device=device)
        path = torch.where(index + 1 < n, index + 1, -1).expand(b, n).contiguous()
        tokens = torch.randint(0, v, (b, c + n), generator=generator, device=device)
        verdict = (torch.zeros(b, n, v, device=device), tokens[:, -n:], path, count(n - 1), count(1))
        return Call((*verdict, tokens, count(c), count(c + n + 1), count(0)), {"eos_ids": (2,), "argmax": True})

    size = 8 * b * (c + 4 * n)
    return Case("commit", "chain", {"b": b, "n": n, "c": c}, torch.float32, (b, n, v), size, 2 * size, make)


def counting(b: int, n: int) -> Case:
    def make(generator: torch.Generator) -> Call:
        counts = torch.zeros(b, 4 + n * n, dtype=torch.int64, device=generator.device)
        most = torch.full((b,), n - 1, device=generator.device)
        return Call((counts, most, most, most, most + 1, most >= 0), {"draft_forwards": 1, "max_depth": n - 1})

    size = 8 * b * (4 + n * n)
    return Case("count_round", "", {"b": b, "n": n}, torch.int64, (b, 4 + n * n), size, 2 * size, make)


def matching(b: int, c: int, longest: int) -> Case:
    def make(generator: torch.Generator) -> Call:
        tokens = torch.randint(0, 64, (b, c), generator=generator, device=generator.device)
        return Call((tokens, torch.full((b,), c, device=generator.device)), {"longest": longest})

    return Case("suffix_match", f"up to {longest}", {"b": b, "c": c}, torch.int64, (b, c), 8 * b * c, 8 * b * c, make)


def norm(b: int, n: int) -> Case:
    def make(generator: torch.Generator) -> Call:
        hidden, delta = torch.randn(
            2, b, n, HIDDEN, generator=generator, device=generator.device, dtype=torch.bfloat16
        ).unbind()
        return Call((hidden, delta, torch.ones(HIDDEN, device=generator.device, dtype=torch.bfloat16), 1e-5))

    size = 2 * 2 * b * n * HIDDEN
    return Case("rms_norm_residual", "", {"b": b, "n": n}, torch.bfloat16, (b, n, HIDDEN), size, 2 * size, make)


def silu(b: int, n: int) -> Case:
    def make(generator: torch.Generator) -> Call:
        return Call((torch.randn(b, n, 2 * INNER, generator=generator, device=generator.device, dtype=torch.bfloat16),))

    size = 2 * b * n * 2 * INNER
    return Case("silu_mul", "", {"b": b, "n": n}, torch.bfloat16, (b, n, 2 * INNER), size, 1.5 * size, make)


def rope(b: int, n: int, c: int) -> Case:
    dtype, heads = torch.bfloat16, HEADS + 2 * KV_HEADS

    def make(generator: torch.Generator) -> Call:
        device = generator.device
        normal = partial(torch.randn, generator=generator, device=device)
        angle = 3 * normal(b, n, HEAD_SIZE // 2)
        slots = (c + torch.arange(n, device=device)).expand(b, n).contiguous()
        keys, values = torch.zeros(2, b, c + n, KV_HEADS, HEAD_SIZE, device=device, dtype=dtype).unbind()
        rotation = torch.stack((angle.cos(), angle.sin()), -1)
        return Call((normal(b, n, heads, HEAD_SIZE, dtype=dtype), rotation, slots, keys, values), {}, (keys, values))

    states = 2 * b * n * heads * HEAD_SIZE
    size = states + 2 * 2 * b * (c + n) * KV_HEADS * HEAD_SIZE
    sizes = {"b": b, "n": n, "c": c}
    return Case(
        "rope_write", "", sizes, dtype, (b, n, heads, HEAD_SIZE), size, 2 * states + 4 * b * n * HEAD_SIZE, make
    )


def layer_product(label: str, options: Mapping[str, Any], out: int, into: int, b: int, n: int) -> Case:
    """A layer's product with what is fused to it: its weights are what must move."""
    dtype = torch.bfloat16

    def make(generator: torch.Generator) -> Call:
        normal = partial(torch.randn, generator=generator, device=generator.device, dtype=dtype)
        more = dict(options)
        if more.pop("normed", False):
            more |= {"norm": torch.ones(into, device=generator.device, dtype=dtype), "eps": 1e-5}
        if more.pop("added", False):
            more |= {"residual": normal(b, n, out)}
        return Call((normal(b, n, into), normal(out, into) / into**0.5), more)

    size = 2 * (out * into + b * n * (into + out))
    return Case("product", label, {"b": b, "n": n}, dtype, (b, n, into), size, size, make)


_TREE = ("logits", "tokens", "parents", "valid")
_LAWS = ("sampled", "draft_probs", "accept", "token")
VERIFICATIONS: Mapping[str, tuple[tuple[str, ...], Mapping[str, Any]]] = {
    "verify_greedy": (_TREE, {}),
    "verify_lossless": ((*_TREE, *_LAWS), WARPED),
    "verify_block": (("logits", "tokens", "valid", *_LAWS), WARPED),
    "verify_coupled": (_TREE, WARPED),
    "verify_match": ((*_TREE, "accept"), WARPED),
}
WARPS = {"temperature": {}, "top-k": {"top_k": 50}, "top-p": {"top_p": 0.9}, "min-p": {"min_p": 0.05}}


def cases() -> dict[str, list[Case]]:
    """The cases of every operation, the most telling first."""
    grid = [(1, 8), (8, 8), (64, 8), (1, 1), (64, 1), (1, 64), (8, 64), (64, 64)]
    found = {
        op: [verification(op, names, options, b, n, v) for v in VOCABULARIES for b, n in grid]
        for op, (names, options) in VERIFICATIONS.items()
    }
    found["warp"] = [
        warp(label, {**WARPED, **options}, b, n, v)
        for v, (b, n) in product(VOCABULARIES, [(1, 8), (8, 8), (1, 1), (64, 8)])
        for label, options in WARPS.items()
    ]
    found["philox"] = [philox(b, n, v) for v in VOCABULARIES for b, n in grid[:4]]
    found["uniforms"] = [uniforms(b, n) for b, n in grid]
    found["gumbel"] = [gumbel(b, n, v) for v in VOCABULARIES for b, n in grid[:4]]
    found["kv_keep"] = [
        keep(b, n, c) for c in (512, 4096, 32768) for b, n in [(1, 8), (8, 8), (64, 8), (1, 64), (8, 64)]
    ]
    found["tree_attention"] = [attention(b, n, c) for c in (4096, 512, 32768) for b, n in grid]
    found["attend"] = [attending(b, n, c) for c in (512, 4096, 32768) for b, n in ((1, 1), (1, 8), (8, 1), (1, 16))]
    found["commit"] = [committing(b, n, c) for c in (512, 32768) for b, n in grid[:5]]
    found["count_round"] = [counting(b, n) for b, n in grid[:5]]
    found["suffix_match"] = [
        matching(b, c, longest) for c in (4096, 512, 32768) for b in (1, 8, 64) for longest in (3, 16)
    ]
    found["rms_norm_residual"] = [norm(b, n) for b, n in grid]
    found["silu_mul"] = [silu(b, n) for b, n in grid]
    found["rope_write"] = [rope(b, n, c) for c in (512, 4096) for b, n in grid]
    found["product"] = [
        layer_product(label, options, out, into, b, n)
        for b, n in grid
        for label, options, out, into in (
            ("norm, gate and up", {"normed": True, "gated": True}, 2 * INNER, HIDDEN),
            ("down, residual", {"added": True}, HIDDEN, INNER),
            ("norm, qkv", {"normed": True}, (HEADS + 2 * KV_HEADS) * HEAD_SIZE, HIDDEN),
        )
    ]
    return {op: made for op, made in found.items() if op in OPERATIONS}


def planned(
    found: Mapping[str, Sequence[Case]], limit: float, quick: bool, compile: str
) -> Iterator[tuple[Case, bool]]:
    """Cases of at most `limit` bytes and whether torch.compile is to be timed on them, or the implementations.

    All first cases, all second ones, then what is compiled for the first ones (which takes long), then the rest.
    """
    fitting = [[case for case in made if case.size <= limit] for made in found.values()]
    ranks = [[case for case in line if case is not None] for line in zip_longest(*fitting)][: 2 if quick else None]
    passes = [(0, False), (1, False), *([] if compile == "none" else [(0, True)])]
    passes += [(rank, False) for rank in range(2, len(ranks))]
    passes += [(rank, True) for rank in range(1, len(ranks))] if compile == "all" else []
    yield from ((case, compiled) for rank, compiled in passes if rank < len(ranks) for case in ranks[rank])


def copies_of(case: Case, device: torch.device) -> list[Call]:
    """Arguments that together exceed the L2 cache twice; no more than `COPIES`, nor than four of the largest case."""
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20) if device.type == "cuda" else 0
    wanted = -(-2 * cache // max(1, int(case.size)))
    room = int(4 * LARGEST[device.type] // max(1, case.size))
    return [arguments(case, device, seed) for seed in range(max(1, min(COPIES, max(2, wanted), room)))]


def arguments(case: Case, device: torch.device, seed: int) -> Call:
    return case.make(torch.Generator(device).manual_seed(seed))


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def time_eager(function: Callable[..., Any], calls: Sequence[Call], device: torch.device, most: float) -> list[float]:
    """Microseconds of single calls, for about `most` seconds, at least 5 calls and at most 200."""
    for call in calls[:3]:
        function(*call.args, **call.options)
    synchronize(device)
    begin = time.perf_counter()
    function(*calls[0].args, **calls[0].options)
    synchronize(device)
    count = min(200, max(5, int(most / max(1e-6, time.perf_counter() - begin))))
    if device.type != "cuda":
        return [clocked(function, calls[index % len(calls)], device) for index in range(count)]
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for index, (start, end) in enumerate(marks):
        call = calls[index % len(calls)]
        start.record()
        function(*call.args, **call.options)
        end.record()
    torch.cuda.synchronize(device)
    return [1e3 * start.elapsed_time(end) for start, end in marks]


def clocked(function: Callable[..., Any], call: Call, device: torch.device) -> float:
    begin = time.perf_counter()
    function(*call.args, **call.options)
    synchronize(device)
    return 1e6 * (time.perf_counter() - begin)


def time_graph(function: Callable[..., Any], calls: Sequence[Call], device: torch.device, most: float) -> float:
    """Microseconds of one call within a replayed graph of all calls, after `time_eager` has warmed it up.

    Another replay goes ahead of each that is timed, which the host launches meanwhile.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            function(*call.args, **call.options)
    graph.replay()
    torch.cuda.synchronize(device)
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < 5 or (len(times) < 50 and time.perf_counter() - begin < most):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        graph.replay()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / len(calls))
    return statistics.median(times)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second that a copy reads and writes, over memory larger than any cache."""
    size = {"cuda": 1 << 30, "cpu": 1 << 27}.get(device.type, 1 << 28)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    calls = [Call((target, source))]
    return 2e6 * size / statistics.median(time_eager(lambda to, of: to.copy_(of), calls, device, 0.5))


def tensors_of(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [tensor for part in result or () for tensor in tensors_of(part)] if isinstance(result, tuple) else []


def outcome(contender: Contender, case: Case, device: torch.device) -> list[Tensor]:
    function, call = contender.load(), contender.prepare(arguments(case, device, 0))
    return [*tensors_of(function(*call.args, **call.options)), *call.changed]


def difference(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest absolute difference of floating-point results, plus how many integers differ; NaN shows as NaN."""
    total = torch.zeros((), dtype=torch.float64, device=wanted[0].device)
    for one, other in zip(found, wanted, strict=True):
        if not other.is_floating_point():
            total += (one != other).sum()
        elif other.numel():
            same = (one == other) | (one.isnan() & other.isnan())
            total = torch.maximum(total, torch.where(same, 0.0, (one.double() - other.double()).abs()).max())
    return float(total)


def contenders(case: Case, device: torch.device, compiled: bool) -> dict[str, Contender]:
    """What to time: the implementations and their rivals, or torch.compile of the definition."""
    found = partial(resolve, case.op, device, case.dtype, case.shape)
    if compiled:
        # Past a few recompilations of one function dynamo gives up on it, and would be timed as torch itself.
        torch.compiler.reset()
        return {"torch.compile": Contender(lambda: torch.compile(found("torch"), dynamic=False))}
    # On the CPU kernels would be interpreted, to be right and not fast. Elsewhere what cannot run raises its reason.
    other = () if device.type == "cpu" else ("cuda", "triton", "flex")
    names = [row.name for row in OPERATIONS[case.op] if row.name in (*other, "torch")]
    made = {name: Contender(partial(found, name)) for name in names}
    if case.op == "tree_attention" and device.type == "cuda":
        made["sdpa"] = Contender(lambda: sdpa, with_dense_mask)
        if case.label == "chain":
            made["flash"] = Contender(lambda: flash)
    if case.op == "attend" and device.type == "cuda":
        made["parts"] = Contender(partial(parts_of_attend, device))
    return made


def with_dense_mask(call: Call) -> Call:
    """The arguments of `sdpa` for those of `tree_attention`."""
    from specdec_kernels.ops.attention import visible_slots

    query, keys, values, length = call.args
    (rows, n, heads, size), extent, kv_heads = query.shape, call.options["extent"], keys.shape[2]
    seen = visible_slots(length, n, extent, call.options.get("ancestors"), n)
    mask = torch.zeros(seen.shape, dtype=query.dtype, device=query.device).masked_fill_(~seen, float("-inf"))
    grouped = query.view(rows, n, kv_heads, -1, size).permute(0, 2, 1, 3, 4).reshape(rows, kv_heads, -1, size)
    mask = mask[:, None].repeat_interleave(heads // kv_heads, 2)
    return Call((grouped, *(slots[:, :extent].transpose(1, 2) for slots in (keys, values)), mask))


def sdpa(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Dense attention of `[b kv_heads n*group d]`, as `[b n heads d]`."""
    mixed = torch.nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
    group = HEADS // KV_HEADS
    return mixed.unflatten(2, (-1, group)).permute(0, 2, 1, 3, 4).flatten(2, 3)


def flash(query: Tensor, keys: Tensor, values: Tensor, length: Tensor, *, extent: int) -> Tensor:
    """Flash attention over a chain at the end of `extent` slots, which all rows must have."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.bias import causal_lower_right

    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        mixed = torch.nn.functional.scaled_dot_product_attention(
            query.transpose(1, 2),
            keys[:, :extent].transpose(1, 2),
            values[:, :extent].transpose(1, 2),
            attn_mask=causal_lower_right(query.shape[1], extent),
            enable_gqa=True,
        )
    return mixed.transpose(1, 2)


def measure(
    case: Case, device: torch.device, *, bandwidth: float, compiled: bool, most: float, deadline: float
) -> Iterator[Row]:
    """The rows of one case; an implementation that fails has its error in `note`."""
    calls = copies_of(case, device)
    wanted = outcome(Contender(partial(resolve, case.op, device, case.dtype, case.shape, "torch")), case, device)
    chosen = choose(case.op, device, case.dtype, case.shape).implementation
    for name, contender in contenders(case, device, compiled).items():
        if time.monotonic() > deadline:
            return
        row: Row = {"op": case.op, "case": case.label, **dict.fromkeys("bnvc", ""), **case.sizes}
        row |= {"dtype": str(case.dtype).removeprefix("torch."), "implementation": name, "auto": name == chosen}
        row |= {"us": None, "low_us": None, "high_us": None, "graph_us": None, "calls": 0, "copies": len(calls)}
        row |= {"floor_us": 1e6 * case.moved / bandwidth, "differ": None, "note": ""}
        try:
            function, prepared = contender.load(), [contender.prepare(call) for call in calls]
            row["differ"] = difference(outcome(contender, case, device), wanted)
            times = sorted(time_eager(function, prepared, device, most))
            row |= {"us": statistics.median(times), "calls": len(times)}
            row |= {"low_us": times[len(times) // 10], "high_us": times[-1 - len(times) // 10]}
            if device.type == "cuda":
                # Definitions launch up to thousands of kernels a call, and capturing one costs what calling it does.
                count = max(2, min(int(5e5 / row["us"]), max(GRAPHED, len(prepared))))
                graphed = list(islice(cycle(prepared), count))
                row["graph_us"] = time_graph(function, graphed, device, most)
        except Exception as error:  # a table with a gap and its reason is worth more than no table
            row["note"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
            settle(device)
        yield row


def settle(device: torch.device) -> None:
    """Wait for what a failed call left behind and give its memory back."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def run(
    device: torch.device,
    *,
    seconds: float,
    quick: bool = False,
    ops: Sequence[str] = (),
    compile: str = "first",
    most: float = 0.2,
    keep: Callable[[dict[str, Any]], None] = lambda report: None,
) -> dict[str, Any]:
    """Measure until all cases are done or `seconds` are over; `keep` gets the report after every case. `most`: seconds
    of one timing.

    `compile`: torch.compile of the definition for `all` cases, the `first` of each operation, or `none`.
    """
    begin = time.monotonic()
    bandwidth = copy_bandwidth(device)
    found = {op: made for op, made in cases().items() if not ops or op in ops}
    plan = list(planned(found, LARGEST[device.type], quick, compile if device.type != "cpu" else "none"))
    report: dict[str, Any] = {
        "provenance": provenance(seconds=seconds, quick=quick, ops=list(ops), compile=compile, most=most),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "copy_gb_s": bandwidth / 1e9,
        "cases": len(plan),
        "done": 0,
        "rows": [],
    }
    keep(report)
    for case, compiled in plan:
        if time.monotonic() - begin > seconds:
            break
        try:
            report["rows"] += measure(
                case,
                device,
                bandwidth=bandwidth,
                compiled=compiled,
                most=most / 4 if quick else most,
                deadline=begin + seconds,
            )
        except (RuntimeError, ValueError) as error:
            note = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
            report["rows"].append({"op": case.op, "case": case.label, **case.sizes, "note": note})
            settle(device)
        report["done"] += 1
        keep(report)
    return report


COLUMNS = ("op", "case", "b", "n", "v", "c", "dtype", "implementation")


def table(report: Mapping[str, Any]) -> str:
    """The report in markdown; the implementation that `auto` runs is marked."""
    lines = [
        f"{report['device']}, copies at {report['copy_gb_s']:.0f} GB/s; {report['done']} of {report['cases']} cases.",
        "",
        "| " + " | ".join((*COLUMNS, "us", "10 to 90 %", "graph us", "floor us", "differ", "note")) + " |",
        "|---" * (len(COLUMNS) + 6) + "|",
    ]
    for row in report["rows"]:
        cells = [str(row.get(column, "")) for column in COLUMNS]
        cells[-1] += " *" if row.get("auto") else ""
        spread = f"{row['low_us']:.1f} to {row['high_us']:.1f}" if row.get("us") is not None else ""
        cells += [number(row.get("us")), spread, number(row.get("graph_us")), number(row.get("floor_us"))]
        cells += ["" if row.get("differ") is None else f"{row['differ']:.2g}", row.get("note", "").replace("|", "/")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", "\\* what `auto` runs"])


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def write(report: Mapping[str, Any], out: Path) -> None:
    """`out` with the suffixes .json (everything), .csv (the rows) and .md (the table)."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    out.with_suffix(".md").write_text(table(report) + "\n")
    names = list(dict.fromkeys(name for row in report["rows"] for name in row))
    with out.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(report["rows"])


@click.command()
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--seconds", default=600.0, show_default=True, help="Stop after so long; what was measured is kept.")
@click.option("--quick", is_flag=True, help="Two cases of each operation, a quarter of the calls.")
@click.option("--op", "ops", multiple=True, help="Only these operations.")
@click.option("--compile", type=click.Choice(["first", "all", "none"]), default="first", show_default=True)
@click.option("--most", default=0.2, show_default=True, help="Seconds of one timing, of which a case has several.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Write OUT.json, OUT.csv and OUT.md.")
def main(
    device: str, seconds: float, quick: bool, ops: tuple[str, ...], compile: str, most: float, out: Path | None
) -> None:
    """Time every operation."""
    unknown = sorted(set(ops) - set(cases()))
    if unknown:
        raise click.UsageError(f"no cases for {', '.join(unknown)}; there are {', '.join(cases())}")
    try:
        place = choose_device(device)
    except ModelError as error:
        raise click.UsageError(str(error)) from error
    if place.type == "cuda" and place.index is None:
        place = torch.device("cuda", torch.cuda.current_device())
    if place.type != "cuda":
        click.echo(f"on {place.type} the torch definitions alone are timed", err=True)
    keep = (lambda report: write(report, out)) if out else (lambda report: None)
    with torch.inference_mode():
        report = run(place, seconds=seconds, quick=quick, ops=ops, compile=compile, most=most, keep=keep)
    click.echo(table(report))


if __name__ == "__main__":
    main()

"""Where the time of a forward goes on a CPU, and what limits its products.

    chrt -r 10 python benchmarks/cpu_profile.py --out docs/results/cpu_profile.jsonl
    python benchmarks/cpu_profile.py --out docs/results/cpu_profile.jsonl --report docs/performance.md

For each weight format and number of nodes n: milliseconds of each kind of work (`library.WORKS`), counted by the
kernels themselves, the mean over threads. The model is that of `cpu_kernels.py`. In the same rounds all threads at once
read memory, and run the instructions of each format's products on data in the first-level cache (`cpu_peak.cpp`). A
product takes at least its bytes over that bandwidth and its multiply-adds over that rate. Every number is a median over
rounds with its quartiles.
"""

import ctypes
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import torch
from common import ROOT, Rows, origin, read_rows, replace_section
from cpu_kernels import build_packed, make_weights, stack_run

from specdec_kernels.compiling import run
from specdec_kernels.cpu import library
from specdec_kernels.cpu.build import SOURCE, compile_flags, find_compiler
from specdec_kernels.cpu.packed import FORMATS, Arena
from specdec_kernels.cpu.stack import Stack

NODES = (1, 2, 4, 8, 16)
PRODUCTS = {"qkv": ("qkv",), "out": ("out",), "feed": ("gate", "up"), "down": ("down",), "head": ("head",)}
REST = {"attention": ("attend",), "norms, rotation, rounding": ("prepare", "rotate", "start"), "waiting": ("wait",)}
# As the sources of the kernels define them.
MACROS = {"avx512vnni": ("AVX512", "VNNI"), "avx512": ("AVX512",), "avx2": ("AVX2",), "neon": ("NEON",)}
# Far beyond the last-level cache of one part of a server processor.
READ_BYTES = 512 << 20
# Ten milliseconds or more: starting threads takes a tenth of one.
PEAK_ROUNDS = 40000


def compile_peak(instruction_set: str, folder: Path) -> ctypes.CDLL:
    path = folder / "peak.so"
    macros = [f"-DSPECDEC_ISA={instruction_set}", *(f"-DSPECDEC_{name}" for name in MACROS.get(instruction_set, ()))]
    source = str(ROOT / "benchmarks" / "cpu_peak.cpp")
    # What is visible is called; what the kernels export is not.
    flags = [flag for flag in compile_flags(instruction_set) if flag != "-fvisibility=hidden"]
    run([find_compiler(), *flags, *macros, f"-I{SOURCE}", "-shared", source, "-o", str(path)])
    peak = ctypes.CDLL(str(path))
    peak.peak.argtypes, peak.peak.restype = (ctypes.c_int32, ctypes.c_int64), ctypes.c_int64
    peak.read_memory.argtypes, peak.read_memory.restype = (ctypes.c_void_p, ctypes.c_int64), None
    return peak


def on_all(pool: ThreadPoolExecutor, threads: int, function: Callable[[int], Any]) -> tuple[float, list[Any]]:
    """Seconds until all threads are done, and what they return."""
    begin = time.perf_counter()
    results = list(pool.map(function, range(threads)))
    return time.perf_counter() - begin, results


def spread(values: Iterable[float]) -> list[float]:
    """Median and quartiles: median, first, third."""
    first, median, third = statistics.quantiles(values, n=4)
    return [round(value, 4) for value in (median, first, third)]


def size_of(stack: Stack, parts: tuple[str, ...]) -> dict[str, int]:
    """Bytes and weights of the matrices of these names, in all layers."""
    model = stack.weights
    found = [model.head] if parts == ("head",) else [getattr(layer, part) for layer in model.layers for part in parts]
    return {
        "bytes": sum(matrix.bytes for matrix in found),
        "weights": sum(matrix.out_features * matrix.in_features for matrix in found),
    }


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Rows, as JSON lines; not there yet.")
@click.option("--rounds", default=40, show_default=True)
@click.option("--layers", default=30, show_default=True)
@click.option("--context", default=128, show_default=True, help="Tokens in the cache before the measured forward.")
@click.option("--threads", default=2, show_default=True)
@click.option("--only", multiple=True, type=click.Choice(FORMATS))
@click.option("--report", type=click.Path(path_type=Path), help="Write the tables of --out into this document instead.")
def main(
    out: Path, rounds: int, layers: int, context: int, threads: int, only: tuple[str, ...], report: Path | None
) -> None:
    if report is not None:
        replace_section(report, "cpu profile", section(*read_rows(out)))
        return
    if out.exists():
        raise SystemExit(f"{out} is there already; a profile is one run, so name another file")
    torch.set_num_threads(threads)
    instruction_set = library.load().instruction_sets[0]
    config, tensors = make_weights(layers)
    stacks = {format: build_packed(config, tensors, format) for format in only or FORMATS}
    spent = torch.zeros(threads, len(library.WORKS), dtype=torch.int64)
    runs = {format: stack_run(stack, context, spent=spent) for format, stack in stacks.items()}
    memory = Arena(READ_BYTES)(READ_BYTES)
    memory.zero_()
    share = READ_BYTES // threads // 64 * 64
    bandwidth: list[float] = []
    rates: dict[str, list[float]] = defaultdict(list)
    times: dict[tuple[str, int, str], list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(threads) as pool:
        peak = compile_peak(instruction_set, Path(folder))
        for _ in range(rounds):
            seconds, _ = on_all(
                pool, threads, lambda thread: peak.read_memory(memory.data_ptr() + thread * share, share // 4)
            )
            bandwidth.append(1e-9 * share * threads / seconds)
            for format, run_forward in runs.items():
                index = FORMATS.index(format)
                seconds, done = on_all(pool, threads, lambda _, index=index: peak.peak(index, PEAK_ROUNDS))
                rates[format].append(1e-9 * sum(done) / seconds)
                for nodes in NODES:
                    spent.zero_()
                    begin = time.perf_counter()
                    run_forward(nodes)
                    times[format, nodes, "forward"].append(1e3 * (time.perf_counter() - begin))
                    for work, mean in zip(library.WORKS, (spent.double().mean(0) / 1e6).tolist(), strict=True):
                        times[format, nodes, work].append(mean)
    rows = Rows(out, rounds=rounds, layers=layers, context=context, instruction_set=instruction_set)
    rows.add(measured="bandwidth", gb_s=spread(bandwidth), bytes=READ_BYTES)
    for format, stack in stacks.items():
        rows.add(measured="rate", format=format, gmac_s=spread(rates[format]))
        rows.add(measured="size", format=format, **{name: size_of(stack, parts) for name, parts in PRODUCTS.items()})
    for format in stacks:
        for nodes in NODES:
            works = {work: spread(times[format, nodes, work]) for work in ("forward", *library.WORKS)}
            rows.add(measured="forward", format=format, nodes=nodes, ms=works)
    click.echo(section(rows.about, rows.rows))


def section(about: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    settings, of = about["settings"], defaultdict(list)
    for row in rows:
        of[row["measured"]].append(row)
    gb_s, low, high = of["bandwidth"][0]["gb_s"]
    rates = {row["format"]: row["gmac_s"] for row in of["rate"]}
    sizes = {row["format"]: row for row in of["size"]}

    def bounds(format: str, nodes: int, products: Iterable[str]) -> tuple[float, float]:
        """Milliseconds to read the weights of the products, and to multiply by them."""
        found = [sizes[format][name] for name in products]
        read, weights = (sum(size[kind] for size in found) for kind in ("bytes", "weights"))
        return read / gb_s / 1e6, weights * nodes / rates[format][0] / 1e6

    def cells(*values: float) -> str:
        return " | ".join(f"{value:.2f}" for value in values)

    lines = [
        f"Random weights in the shape of SmolLM2-135M, {settings['context']} cached tokens, {settings['rounds']} "
        f"rounds, medians, milliseconds; instruction set {settings['instruction_set']}. {origin(about)}",
        "",
        f"All threads together read {gb_s:.1f} GB/s (quartiles {low:.1f} and {high:.1f}). In the first-level cache "
        "they multiply and add, in 10^9 a second: "
        + ", ".join(f"{format} {rate:.0f} ({a:.0f} and {b:.0f})" for format, (rate, a, b) in rates.items())
        + ".",
        "",
        f"| format | n | forward (quartiles) | products | to read them | to multiply | {' | '.join(REST)} |",
        "|---" * (6 + len(REST)) + "|",
    ]
    for row in of["forward"]:
        ms, format, nodes = row["ms"], row["format"], row["nodes"]
        forward, first, third = ms["forward"]
        rest = [sum(ms[work][0] for work in works) for works in REST.values()]
        products = sum(ms[name][0] for name in PRODUCTS)
        lines.append(
            f"| {format} | {nodes} | {forward:.2f} ({first:.2f} to {third:.2f}) | "
            f"{cells(products, *bounds(format, nodes, PRODUCTS), *rest)} |"
        )
    heads = (f"{name}: ms, read, multiply" for name in PRODUCTS)
    lines += ["", f"| format | n | {' | '.join(heads)} |", "|---" * (2 + len(PRODUCTS)) + "|"]
    for row in of["forward"]:
        if row["nodes"] not in (1, 8):
            continue
        each = (
            cells(row["ms"][name][0], *bounds(row["format"], row["nodes"], [name])).replace(" |", ",")
            for name in PRODUCTS
        )
        lines.append(f"| {row['format']} | {row['nodes']} | {' | '.join(each)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

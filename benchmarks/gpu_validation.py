"""Everything that only a GPU can answer, in one run of twenty minutes: correctness, kernels, rooflines, speedups.

Sections run in order, each within its share of the time; after each one `gpu_validation.json` and `gpu_validation.md`
hold all that is known, so a run that is cut off or a section that fails leaves the rest. Needs this repository's tree,
torch, triton and transformers; nothing is downloaded, and models have random weights.

PYTHONPATH=.:kernels:cli python benchmarks/gpu_validation.py --out out
PYTHONPATH=.:kernels:cli python benchmarks/gpu_validation.py --out out --only plain,synthetic
python benchmarks/gpu_validation.py --out out --dry
"""

import dataclasses
import gc
import importlib.util
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
# The folder of a script is on the path, where transformers would take `kernels.py` for a library of that name.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]

import click  # noqa: E402
import torch  # noqa: E402

from specdec import controllers, drafters, policies  # noqa: E402
from specdec.graphs import Rounds, finish_rounds, graphed_parts, with_cuda_graph  # noqa: E402
from specdec.state import init_state, output_tokens  # noqa: E402
from specdec.step import build_step, iterate  # noqa: E402
from specdec.synthetic import expected_length, guesses, guessing, random_text, rate_for, steer  # noqa: E402
from specdec.transforms import Parts  # noqa: E402
from specdec.types import Controller, Drafter, Model, implementations  # noqa: E402
from specdec_kernels.graphs import cuda_recorder, eager_recorder  # noqa: E402

Row = dict[str, Any]

DEPTHS = range(1, 9)
LENGTHS = (2.0, 3.0, 4.0)

# Tokens per second of the earlier lab's targets for models of the size of gpt2, by accelerator.
LAB_TARGETS = {"A100": 60, "H100": 100}


@dataclasses.dataclass
class Context:
    """What the sections need: the device, how much to do, and until when (`deadline`, on `time.monotonic`)."""

    device: torch.device
    dry: bool
    out: Path
    sizes: tuple[str, ...]
    new_tokens: int
    prompt_tokens: int
    smollm: Path | None
    questions: Path | None
    commit: str | None
    kernels: dict[str, str] = dataclasses.field(default_factory=dict)
    deadline: float = math.inf
    copy_bandwidth: float | None = None

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.dry else torch.bfloat16

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def recorder(self) -> Any:
        return cuda_recorder(self.device) if self.device.type == "cuda" else eager_recorder

    def stand_in(self) -> Any:
        """What captures in place of CUDA graphs, where there are none."""
        return None if self.device.type == "cuda" else eager_recorder

    def release(self) -> None:
        """Give memory of models that are gone back to the device."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


# --- measuring -------------------------------------------------------------------------------------------------------


def seconds_of(context: Context, work: Callable[[], Any]) -> float:
    """Wall seconds of `work`, device included."""
    context.synchronize()
    begin = time.perf_counter()
    work()
    context.synchronize()
    return time.perf_counter() - begin


def launch_seconds(context: Context, work: Callable[[], Any], repeats: int) -> float:
    """Median seconds that the host spends on `work` before it can go on; the device is idle at the beginning."""
    times = []
    for _ in range(repeats):
        context.synchronize()
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return median(times)


def copy_bandwidth(context: Context) -> float:
    """Bytes per second, read and written, of a copy on the device: the median of 20."""
    size = 2**20 if context.dry else 2**30
    source = torch.ones(size, dtype=torch.uint8, device=context.device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * size / median(seconds_of(context, lambda: target.copy_(source)) for _ in range(20))


def read_bandwidth(context: Context) -> float:
    """Bytes per second of a reduction that only reads: the median of 20."""
    source = torch.ones((2**20 if context.dry else 2**30) // 4, device=context.device)
    source.sum()
    return 4 * source.numel() / median(seconds_of(context, source.sum) for _ in range(20))


def model_bytes(size: str, dtype: torch.dtype) -> int:
    """Bytes of the weights that a forward of one token reads: all but an input embedding of its own."""
    from transformers import AutoModelForCausalLM

    from specdec.models.synthetic import llama_config

    config = llama_config(size)
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    count = sum(parameter.numel() for parameter in module.parameters())
    if not config.tie_word_embeddings:
        count -= config.vocab_size * config.hidden_size
    return count * dtype.itemsize


def cache_bytes(size: str, dtype: torch.dtype, context: float) -> float:
    """Bytes of keys and values of `context` tokens."""
    from specdec.models.synthetic import llama_config

    config = llama_config(size)
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize * context


def random_llama(context: Context, size: str, **options: Any) -> Model:
    from specdec.models.synthetic import llama

    return llama(size, context.device, context.dtype, **{"kernels": context.kernels, **options})


def start(context: Context, parts: Parts, prompt: Sequence[int], new_tokens: int) -> tuple[Any, Any]:
    """A step of `parts` and its first state."""
    step = build_step(*parts)
    state = init_state(
        [list(prompt)],
        model=parts.model,
        drafter=parts.drafter,
        controller=parts.controller,
        max_new_tokens=new_tokens,
    )
    return step, state


def greedy_parts(model: Model, drafter: Drafter, controller: Controller) -> Parts:
    return Parts(model, drafter, policies.greedy(), controller)


def run_rounds(context: Context, rounds: Rounds, begin: Any, repeats: int) -> tuple[float, Any]:
    """Median seconds of decoding from `begin` to the end, and the last state."""
    times, final = [], begin
    for _ in range(repeats):
        rounds.load(begin)
        context.synchronize()
        now = time.perf_counter()
        final = finish_rounds(rounds)
        context.synchronize()
        times.append(time.perf_counter() - now)
    return median(times), final


def eager_seconds(context: Context, parts: Parts, prompt: Sequence[int], new_tokens: int) -> tuple[float, Any]:
    """Seconds of the rounds of a decoding by `iterate`, prefill excluded, and the last state."""
    step, state = start(context, parts, prompt, new_tokens)
    context.synchronize()
    now = time.perf_counter()
    *_, (state, _) = iterate(step, state)
    context.synchronize()
    return time.perf_counter() - now, state


# --- sections --------------------------------------------------------------------------------------------------------


def machine(context: Context) -> Iterator[Row]:
    """Versions, hardware, driver, commit, bandwidth."""

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    def said(*words: str) -> str | None:
        if shutil.which(words[0]) is None:
            return None
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False, timeout=20)
        return done.stdout.strip() or None

    packages = ("torch", "triton", "transformers", "jaxtyping", "beartype", "numpy", "hypothesis")
    row: Row = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": context.commit or said("git", "rev-parse", "HEAD"),
        "python": platform.python_version(),
        "packages": {name: installed(name) for name in packages},
        "cuda": torch.version.cuda,
        "cuda_compiler": _compiler(),
        "cores": os.cpu_count(),
        "device": str(context.device),
        "kernels": context.kernels,
    }
    if context.device.type == "cuda":
        properties = torch.cuda.get_device_properties(context.device)
        row |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": properties.total_memory / 2**30,
            "driver": said("nvidia-smi", "--query-gpu=driver_version,clocks.max.mem,power.limit", "--format=csv"),
        }
    context.copy_bandwidth = copy_bandwidth(context)
    row |= {"copy_gb_s": context.copy_bandwidth / 1e9, "read_gb_s": read_bandwidth(context) / 1e9}
    yield row


def _compiler() -> str:
    """What CUDA C++ is compiled with, or why it is not."""
    from specdec_kernels.cuda.build import BuildError, find_compiler

    try:
        found = find_compiler()
    except BuildError as error:
        return str(error)
    return f"{found.name} {found.version}"


def doctor(context: Context) -> Iterator[Row]:
    """What dispatch would run for every operation, and why."""
    from specdec_kernels.dispatch import OPERATIONS, choose

    for op in OPERATIONS:
        try:
            choice = choose(op, context.device, context.dtype)
            yield {"op": op, "implementation": choice.implementation, "reason": choice.reason}
        except Exception as error:
            yield {"op": op, "error": f"{type(error).__name__}: {error}"}


def tests(context: Context) -> Iterator[Row]:
    """The tests of kernels, graphs and backends on this device; the logs stay beside the results."""
    there = sorted(ROOT.glob("property_tests/test_backends_agree*.py"))
    paths = [str(path.relative_to(ROOT)) for path in there] + ["property_tests/test_law_triton.py", "tests/kernels"]
    if context.dry:
        paths = ["tests/kernels/test_graphs.py"]
    checked = importlib.util.find_spec("beartype") is not None
    addopts = "--import-mode=importlib"
    if checked:
        addopts += " --jaxtyping-packages=specdec,specdec_kernels,beartype.beartype"
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "--tb=short", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist") is not None:
        # Most of the time goes to compiling kernels, which processes do side by side.
        command += ["-n", str(min(12, os.cpu_count() or 1)), "--dist", "worksteal"]
    yield _logged(context, "pytest", [*command, "-o", f"addopts={addopts}", *paths], checked=checked, paths=paths)


def sanitizer(context: Context) -> Iterator[Row]:
    """compute-sanitizer over small decodings that use every kernel of a round."""
    tool = shutil.which("compute-sanitizer") or next(
        (str(path) for path in Path("/usr/local").glob("cuda*/bin/compute-sanitizer")), None
    )
    if tool is None or context.device.type != "cuda":
        yield {"skipped": "compute-sanitizer is not installed" if tool is None else "needs a CUDA device"}
        return
    chosen = [word for op, name in context.kernels.items() for word in ("--kernel", f"{op}={name}")]
    for check in ("memcheck", "racecheck"):
        command = [tool, "--tool", check, "--error-exitcode", "7", sys.executable, str(Path(__file__).resolve())]
        # Without the caching allocator, every tensor ends where its memory does.
        environ = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        yield _logged(context, check, [*command, "--exercise", "--out", str(context.out), *chosen], environ)


def _logged(context: Context, name: str, command: list[str], environ: dict[str, str] | None = None, **more: Any) -> Row:
    """Run a command until the deadline, keep what it said in a log, and say how it ended."""
    log = context.out / f"{''.join(c if c.isalnum() else '_' for c in name)}.log"
    begin = time.monotonic()
    with log.open("w") as sink:
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env=environ or dict(os.environ),
                stdout=sink,
                stderr=subprocess.STDOUT,
                check=False,
                timeout=max(1.0, context.left()),
            )
            code: int | str = done.returncode
        except subprocess.TimeoutExpired:
            code = "ran out of time"
    lines = log.read_text(errors="replace").splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR", "========= Invalid"))]
    return {
        "run": name,
        "exit": code,
        "seconds": time.monotonic() - begin,
        "last": lines[-1] if lines else "",
        "failed": failed[:40],
        "log": log.name,
        **more,
    }


def exercise(context: Context) -> None:
    """Small decodings through every kernel of a round: trees and chains, every policy, greedy and sampled."""
    from specdec.sampling import Sampling

    target, draft = random_llama(context, "nano"), random_llama(context, "nano", seed=1)
    sampled = Sampling(temperature=0.8, top_k=40, top_p=0.9)
    for policy, sampling, drafter in (
        (policies.greedy(), Sampling(), drafters.ngram()),
        (policies.greedy(), Sampling(), drafters.suffix()),
        (policies.lossless(), sampled, drafters.suffix(nodes=5)),
        (policies.greedy(), Sampling(), drafters.draft_model(draft, mode="greedy", branching=(2, 2))),
        (policies.lossless(), sampled, drafters.draft_model(draft, branching=(2, 1))),
        (policies.block(), sampled, drafters.draft_model(draft)),
        (policies.match(), sampled, drafters.draft_model(draft)),
        (policies.coupled(), sampled, drafters.draft_model(draft, mode="coupled")),
    ):
        controller = controllers.fixed(3)
        step = build_step(target, drafter, policy, controller, sampling=sampling)
        # One row goes through other kernels than two.
        for prompts in ([[1, 2, 3, 1, 2], [5, 6, 7]], [[1, 2, 3, 1, 2]]):
            state = init_state(prompts, model=target, drafter=drafter, controller=controller, max_new_tokens=8)
            *_, (state, _) = iterate(step, state)
    context.synchronize()


def kernels(context: Context) -> Iterator[Row]:
    """The kernel table of `benchmarks/kernels.py`, whose files lie beside these."""
    script = HERE / "kernels.py"
    if not script.is_file():
        yield {"skipped": "benchmarks/kernels.py is not there"}
        return
    seconds = max(1.0, context.left() - 10)
    command = [sys.executable, str(script), "--out", str(context.out / "kernels"), "--seconds", f"{seconds:.0f}"]
    # A quarter of the usual time of a timing, so that more cases fit.
    yield _logged(context, "kernels", [*command, "--most", "0.05"])


def plain(context: Context) -> Iterator[Row]:
    """Plain decoding, batch 1, beside the bandwidth roofline and Hugging Face `generate` on the same weights."""
    for size in context.sizes:
        if context.left() < 5:
            yield {"size": size, "skipped": "no time left"}
            continue
        yield from _guard({"size": size}, _plain(context, size))
        context.release()


def _plain(context: Context, size: str) -> Iterator[Row]:
    new = context.new_tokens
    prompt = random_text(1, context.prompt_tokens, 500)[0].tolist()
    model = random_llama(context, size)
    parts = greedy_parts(model, drafters.none(), controllers.fixed(0))
    middle = context.prompt_tokens + new / 2
    bandwidth = context.copy_bandwidth or copy_bandwidth(context)
    weights, cached = model_bytes(size, context.dtype), cache_bytes(size, context.dtype, middle)
    floor = (weights + cached) / bandwidth
    row: Row = {
        "size": size,
        "implementations": implementations(model),
        "weights_gb": weights / 1e9,
        "cache_mb": cached / 1e6,
        "roofline_tokens_s": 1 / floor,
    }

    step, state = start(context, parts, prompt, new)
    rounds = Rounds(step, state, context.recorder())
    elapsed, final = run_rounds(context, rounds, state, 3)
    graphed = output_tokens(final)[0]
    row |= {
        "graph_tokens_s": new / elapsed,
        "of_roofline": new / elapsed * floor,
        "round_us": 1e6 * elapsed / new,
        "graph_host_us": 1e6 * launch_seconds(context, rounds.replay, 30),
    }
    yield {**row, "part": "specdec graph"}

    _, state = start(context, parts, prompt, new)
    few = min(new, 32)
    step, state = start(context, parts, prompt, few + 8)
    for _ in range(4):
        state, _ = step(state)
    held = [state]

    def one() -> None:
        held[0], _ = step(held[0])

    host = launch_seconds(context, one, 12)
    eager, final = eager_seconds(context, parts, prompt, few)
    yield {
        "size": size,
        "part": "specdec eager",
        "tokens_s": few / eager,
        "host_us": 1e6 * host,
        "same_tokens_as_graph": output_tokens(final)[0] == graphed[:few],
    }

    forward = graphed_parts(parts, recorder=context.stand_in())
    eager_seconds(context, forward, prompt, 4)
    elapsed, final = eager_seconds(context, forward, prompt, few)
    yield {
        "size": size,
        "part": "specdec forward graph",
        "tokens_s": few / elapsed,
        "same_tokens_as_graph": output_tokens(final)[0] == graphed[:few],
        "graphs": str(forward.model.about["graph"]),
    }
    del rounds, state, final, held, step, parts, forward, model
    context.release()
    yield from _huggingface(context, size, prompt, few, graphed)


def _huggingface(context: Context, size: str, prompt: Sequence[int], new: int, ours: Sequence[int]) -> Iterator[Row]:
    from specdec.models.synthetic import llama_huggingface

    module = llama_huggingface(size, context.device, context.dtype)
    module.generation_config.eos_token_id = None
    module.generation_config.pad_token_id = 0
    ids = torch.tensor([list(prompt)], device=context.device)

    def generate(count: int, **options: Any) -> list[int]:
        with torch.inference_mode():
            out = module.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count, **options
            )
        found: list[int] = out[0, len(prompt) :].tolist()
        return found

    def measure(name: str, **options: Any) -> Row:
        if context.left() < 3:
            return {"size": size, "part": name, "skipped": "no time left"}
        generate(4, **options)
        first = seconds_of(context, lambda: generate(1, **options))
        tokens: list[list[int]] = []
        whole = seconds_of(context, lambda: tokens.append(generate(new, **options)))
        agree = next((i for i, pair in enumerate(zip(tokens[0], ours, strict=False)) if pair[0] != pair[1]), new)
        return {
            "size": size,
            "part": name,
            "tokens_s": (len(tokens[0]) - 1) / max(whole - first, 1e-9),
            "first_difference_to_specdec": agree,
        }

    yield measure("transformers generate")
    yield from _guard({"size": size}, iter([lambda: measure("transformers prompt lookup", prompt_lookup_num_tokens=4)]))
    if size == context.sizes[0] or context.left() < 15:
        return
    assistant = llama_huggingface(context.sizes[0], context.device, context.dtype, seed=1)
    assistant.generation_config.eos_token_id = None
    assistant.generation_config.pad_token_id = 0
    what = f"transformers assisted by {context.sizes[0]} (random: nothing is accepted)"
    yield from _guard({"size": size}, iter([lambda: measure(what, assistant_model=assistant)]))


def synthetic(context: Context) -> Iterator[Row]:
    """Measured speedup of drafts accepted at a chosen rate, beside what the cost model of `expected` predicts."""
    for size in context.sizes:
        if context.left() < 5:
            yield {"size": size, "skipped": "no time left"}
            continue
        yield from _guard({"size": size}, _synthetic(context, size))
        context.release()


def _synthetic(context: Context, size: str) -> Iterator[Row]:
    new, recorder = 2 * context.new_tokens, context.recorder()
    model = random_llama(context, size)
    deepest = max(DEPTHS)
    text = random_text(1, context.prompt_tokens + new + 4 * deepest, model.vocab_size).to(context.device)
    prompt = text[0, : context.prompt_tokens].tolist()
    steered = steer(model, text)

    costs = forward_costs(context, model, prompt)
    step, state = start(context, greedy_parts(steered, drafters.none(), controllers.fixed(0)), prompt, new)
    plain_seconds, final = run_rounds(context, Rounds(step, state, recorder), state, 3)
    assert output_tokens(final)[0] == text[0, len(prompt) : len(prompt) + new].tolist()
    # What a round takes beside the forward: verification, bookkeeping, and the gap between two graphs.
    overhead = max(0.0, plain_seconds / new - costs[1])
    yield {
        "size": size,
        "plain_tokens_s": new / plain_seconds,
        "overhead_us": 1e6 * overhead,
        "forward_us": {n: 1e6 * seconds for n, seconds in costs.items()},
    }
    for k in DEPTHS if not context.dry else (1, 4):
        if context.left() < 3:
            yield {"size": size, "k": k, "skipped": "no time left"}
            return
        parts = greedy_parts(steered, guessing(text), controllers.fixed(k))
        step, state = start(context, parts, prompt, new)
        rounds = Rounds(step, state, recorder)
        for wanted in LENGTHS:
            rate = rate_for(wanted, deepest)
            guess = guesses(text, rate, model.vocab_size, seed=k)
            begin = dataclasses.replace(state, drafter=dataclasses.replace(state.drafter, guess=guess))
            elapsed, final = run_rounds(context, rounds, begin, 2)
            counted = int(final.metrics.target_forwards[0] - state.metrics.target_forwards[0])
            cost = costs[k + 1] + overhead
            predicted = expected_length(rate, k) * (costs[1] + overhead) / cost
            measured = plain_seconds / elapsed
            realized = new / counted * (costs[1] + overhead) / cost
            yield {
                "size": size,
                "k": k,
                "mean_length_at_8": wanted,
                "rate": rate,
                "tokens_per_round_expected": expected_length(rate, k),
                "tokens_per_round": new / counted,
                "tokens_s": new / elapsed,
                "speedup": measured,
                "predicted": predicted,
                "off": measured / predicted - 1,
                "predicted_at_realized_length": realized,
                "off_at_realized_length": measured / realized - 1,
                "text_is_the_target's": output_tokens(final)[0] == text[0, len(prompt) : len(prompt) + new].tolist(),
            }


def forward_costs(context: Context, model: Model, prompt: Sequence[int], repeats: int = 20) -> dict[int, float]:
    """Seconds of a forward of n tokens behind the prompt, n up to 9, in a queue of them as in decoding."""
    graphed = with_cuda_graph(model, range(1, max(DEPTHS) + 2), recorder=context.recorder())
    from specdec import cache as kv
    from specdec.state import prefill

    tokens = torch.tensor([[*prompt, *prompt[:16]]], device=context.device)
    length = torch.tensor([len(prompt)], device=context.device)
    cache, _ = prefill(graphed, tokens, length, len(prompt) + 16)
    costs = {}
    for n in range(1, max(DEPTHS) + 2):
        window = tokens[:, len(prompt) : len(prompt) + n]

        def forwards(count: int, window: torch.Tensor = window) -> None:
            nonlocal cache
            for _ in range(count):
                _, _, cache = graphed.forward(cache, window)
                cache = kv.truncate(cache, length)

        forwards(3)
        costs[n] = seconds_of(context, lambda work=forwards: work(repeats)) / repeats
    return costs


def ablation(context: Context) -> Iterator[Row]:
    """A target with a draft model of its own: eager, graphs, graphs and a second stream; the tokens must be the same.

    Both models are steered to one text, the draft model right at a given rate, so that all is measured at the same
    acceptance.
    """
    from specdec.overlap import overlapped

    size = context.sizes[-1] if context.dry else context.sizes[min(1, len(context.sizes) - 1)]
    new, k, rate = context.new_tokens, 4, 0.9
    target = random_llama(context, size)
    draft = random_llama(context, context.sizes[0], seed=1, changes={"num_hidden_layers": 2})
    text = random_text(1, context.prompt_tokens + new + 64, target.vocab_size).to(context.device)
    prompt, wanted = text[0, : context.prompt_tokens].tolist(), text[0, context.prompt_tokens :][:new].tolist()
    guess = guesses(text, rate, target.vocab_size)

    def parts(graphs: bool, sync: str | None) -> Parts:
        drafted = steer(draft, guess)
        made = greedy_parts(steer(target, text), drafters.draft_model(drafted, mode="greedy"), controllers.fixed(k))
        if graphs:
            made = graphed_parts(made, recorder=context.stand_in())
        return made if sync is None else overlapped(made, sync)

    for name, graphs, sync in (
        ("eager", False, None),
        ("eager + streams, event", False, "event"),
        ("graph", True, None),
        ("graph + streams, event", True, "event"),
        ("graph + streams, barrier", True, "barrier"),
    ):
        if context.left() < 3:
            yield {"variant": name, "skipped": "no time left"}
            continue
        yield from _guard({"variant": name}, _variant(context, name, size, parts(graphs, sync), prompt, wanted))
    step, state = start(context, parts(False, None), prompt, new)
    yield from _guard({"variant": "whole round graph"}, _whole(context, size, step, state, wanted))


def _variant(
    context: Context, name: str, size: str, made: Parts, prompt: Sequence[int], wanted: list[int]
) -> Iterator[Row]:
    eager_seconds(context, made, prompt, len(wanted))
    measured = [eager_seconds(context, made, prompt, len(wanted)) for _ in range(3)]
    elapsed, final = median(seconds for seconds, _ in measured), measured[-1][1]
    yield {
        "variant": name,
        "size": size,
        "tokens_s": len(wanted) / elapsed,
        "rounds": int(final.metrics.target_forwards[0]),
        "draft_forwards": int(final.metrics.draft_forwards[0]),
        "tokens_identical": all(output_tokens(state)[0] == wanted for _, state in measured),
        "graphs": str(made.model.about.get("graph", "")),
        "draft_graphs": str(made.model.about.get("draft_graph", "")),
    }


def _whole(context: Context, size: str, step: Any, state: Any, wanted: list[int]) -> Iterator[Row]:
    elapsed, final = run_rounds(context, Rounds(step, state, context.recorder()), state, 3)
    yield {
        "variant": "whole round graph",
        "size": size,
        "tokens_s": len(wanted) / elapsed,
        "rounds": int(final.metrics.target_forwards[0]),
        "draft_forwards": int(final.metrics.draft_forwards[0]),
        "tokens_identical": output_tokens(final)[0] == wanted,
    }


def smollm(context: Context) -> Iterator[Row]:
    """SmolLM2-135M on real questions: tokens identical to `transformers` in float32, bfloat16 differences explained."""
    if context.smollm is None or not context.smollm.is_dir():
        yield {"skipped": "no folder of SmolLM2-135M was given (--smollm)"}
        return
    if context.questions is None or not context.questions.is_file():
        yield {"skipped": "no Spec-Bench questions were given (--questions)"}
        return
    from transformers import AutoModelForCausalLM

    from specdec.divergence import first_divergence
    from specdec.models.loading import load

    device, new = str(context.device), 64
    lines = [json.loads(line) for line in context.questions.read_text().splitlines() if line.strip()]
    loaded = {kind: load(str(context.smollm), device=device, dtype=kind) for kind in ("float32", "bfloat16")}
    module = AutoModelForCausalLM.from_pretrained(context.smollm, dtype=torch.float32).to(context.device).eval()
    made = {"none": drafters.none, "ngram": drafters.ngram, "suffix": lambda: drafters.suffix(min_share=0.3)}
    for line in lines[:40]:
        if context.left() < 3:
            yield {"question": line["question_id"], "skipped": "no time left"}
            return
        ids = loaded["float32"].tokenizer.apply_chat_template(
            [{"role": "user", "content": line["turns"][0]}], add_generation_prompt=True, return_dict=False
        )[-512:]
        given = torch.tensor([ids], device=context.device)
        with torch.inference_mode():
            out = module.generate(given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=new)
        wanted = out[0, len(ids) :].tolist()
        row: Row = {"question": line["question_id"]}
        for kind, one in loaded.items():
            for name, build in made.items():
                drafter, controller = build(), controllers.fixed(0 if name == "none" else 4)
                step = build_step(one.model, drafter, policies.greedy(), controller, eos_ids=one.eos_ids)
                state = init_state([ids], model=one.model, drafter=drafter, controller=controller, max_new_tokens=new)
                *_, (state, _) = iterate(step, state)
                parted = first_divergence(one.model, ids, output_tokens(state)[0], wanted)
                row[f"{kind} {name}"] = "identical" if parted is None else parted._asdict()
        yield row


def targets(context: Context) -> Iterator[Row]:
    """The earlier lab's targets for models of the size of gpt2, beside what this machine does."""
    from transformers import AutoModelForCausalLM, GPT2Config

    from specdec.models.decoder import build_decoder

    changes = {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 257} if context.dry else {}
    config = GPT2Config(**changes)
    dtype = torch.float32 if context.dry else torch.float16
    torch.manual_seed(0)
    with torch.device(context.device):
        module = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    tensors = {name: tensor for name, tensor in module.state_dict().items() if name != "lm_head.weight"}
    model = build_decoder(config, tensors, name="gpt2-random", dtype=dtype, device=context.device)
    parts = greedy_parts(model, drafters.none(), controllers.fixed(0))
    prompt, new = random_text(1, 64, config.vocab_size)[0].tolist(), context.new_tokens
    step, state = start(context, parts, prompt, new)
    elapsed, _ = run_rounds(context, Rounds(step, state, context.recorder()), state, 3)
    count = sum(parameter.numel() for parameter in module.parameters()) - config.n_positions * config.n_embd
    floor = count * dtype.itemsize / (context.copy_bandwidth or copy_bandwidth(context))
    yield {
        "model": "gpt2 shape, random weights",
        "dtype": str(dtype).removeprefix("torch."),
        "tokens_s": new / elapsed,
        "roofline_tokens_s": 1 / floor,
        "lab_targets_tokens_s": LAB_TARGETS,
    }
    few = min(new, 32)
    eager, _ = eager_seconds(context, parts, prompt, few)
    yield {"model": "gpt2 shape, eager", "tokens_s": few / eager}


def _guard(key: Row, rows: Iterator[Any]) -> Iterator[Row]:
    """The rows of a part; what it raises is a row, too. Items that are functions make their row when called."""
    try:
        for row in rows:
            yield row() if callable(row) else row
    except Exception as error:
        yield {**key, **_failure(error)}


def _failure(error: Exception) -> Row:
    return {"error": f"{type(error).__name__}: {error}"[:600], "traceback": traceback.format_exc()[-3000:]}


# --- running ---------------------------------------------------------------------------------------------------------

# Shares of the time: seconds that suffice on an H100.
SECTIONS: dict[str, tuple[Callable[[Context], Iterator[Row]], float]] = {
    "machine": (machine, 10),
    "doctor": (doctor, 30),
    "plain": (plain, 80),
    "synthetic": (synthetic, 90),
    "ablation": (ablation, 40),
    "targets": (targets, 15),
    "tests": (tests, 130),
    "kernels": (kernels, 350),
    "sanitizer": (sanitizer, 340),
    "smollm": (smollm, 170),
}


def run(context: Context, names: Sequence[str], seconds: float) -> dict[str, Any]:
    """Run the sections in order, and write what is known after each row."""
    end = time.monotonic() + seconds
    results: dict[str, Any] = {"dry": context.dry, "seconds": seconds, "sections": {}}
    for place, name in enumerate(names):
        section, _ = SECTIONS[name]
        left = end - time.monotonic()
        share = SECTIONS[name][1] / sum(SECTIONS[other][1] for other in names[place:])
        context.deadline = time.monotonic() + left * share
        entry: dict[str, Any] = {"about": " ".join((section.__doc__ or "").split()), "rows": []}
        results["sections"][name] = entry
        begin = time.monotonic()
        if left < 1:
            entry["skipped"] = "no time left"
        else:
            click.echo(f"[{seconds - left:6.1f} s] {name}", err=True)
            try:
                for row in section(context):
                    entry["rows"].append(row)
                    write(context.out, results)
            except Exception as error:
                entry |= _failure(error)
                click.echo(f"  {entry['error']}", err=True)
        entry["seconds"] = time.monotonic() - begin
        context.release()
        write(context.out, results)
    return results


def write(out: Path, results: dict[str, Any]) -> None:
    (out / "gpu_validation.json").write_text(json.dumps(results, indent=1, default=str) + "\n")
    lines = ["# GPU validation", ""]
    for name, entry in results["sections"].items():
        lines += [f"## {name}", "", entry["about"], ""]
        lines += [f"{key}: {entry[key]}\n" for key in ("skipped", "error") if key in entry]
        lines += [*table(entry["rows"]), ""]
    (out / "gpu_validation.md").write_text("\n".join(lines))


def table(rows: Sequence[Row]) -> list[str]:
    """Markdown tables, one for each run of rows with the same columns."""
    lines: list[str] = []
    before: list[str] | None = None
    for row in rows:
        columns = [name for name in row if name != "traceback"]
        if columns != before:
            lines += ["", "| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
            before = columns
        lines.append("| " + " | ".join(_cell(row[name]) for name in columns) + " |")
    return lines


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_cell(item)}" for key, item in value.items())
    if isinstance(value, list):
        return "; ".join(_cell(item) for item in value)
    return str(value).replace("|", "/").replace("\n", " ")


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the results.")
@click.option("--seconds", default=1300.0, show_default=True, help="Time for everything.")
@click.option("--only", default="", help=f"Sections, separated by commas: {', '.join(SECTIONS)}.")
@click.option("--sizes", default="1b,3b,8b", show_default=True, help="Llama shapes, smallest first.")
@click.option("--new-tokens", default=128, show_default=True)
@click.option("--prompt-tokens", default=448, show_default=True)
@click.option("--smollm", "folder", type=click.Path(path_type=Path), help="Folder of SmolLM2-135M.")
@click.option("--questions", type=click.Path(path_type=Path), help="A Spec-Bench question file.")
@click.option("--kernel", "kernels", multiple=True, help="OPERATION=IMPLEMENTATION of the fused forward; repeat it.")
@click.option("--commit", envvar="SPECDEC_COMMIT", help="Commit of the tree, where git cannot tell.")
@click.option("--dry", is_flag=True, help="Tiny shapes on the CPU: does the script run?")
@click.option("--exercise", "exercising", is_flag=True, hidden=True)
def main(
    out: Path,
    seconds: float,
    only: str,
    sizes: str,
    new_tokens: int,
    prompt_tokens: int,
    folder: Path | None,
    questions: Path | None,
    kernels: tuple[str, ...],
    commit: str | None,
    dry: bool,
    exercising: bool,
) -> None:
    """Run the sections and write OUT/gpu_validation.json and .md."""
    names = [name for name in only.split(",") if name] or list(SECTIONS)
    odd = [given for given in kernels if "=" not in given]
    if odd:
        raise click.BadParameter(f"{odd[0]!r} is not OPERATION=IMPLEMENTATION", param_hint="'--kernel'")
    unknown = [name for name in names if name not in SECTIONS]
    if unknown:
        raise click.BadParameter(f"{unknown[0]!r} is no section; use {', '.join(SECTIONS)}", param_hint="'--only'")
    if not dry and not torch.cuda.is_available():
        raise click.UsageError("no CUDA device is there; --dry runs tiny shapes on the CPU")
    out.mkdir(parents=True, exist_ok=True)
    if commit:
        # For the scripts that this one starts.
        os.environ["SPECDEC_COMMIT"] = commit
    context = Context(
        device=torch.device("cpu") if dry else torch.device("cuda", torch.cuda.current_device()),
        dry=dry,
        out=out,
        sizes=("nano",) if dry else tuple(sizes.split(",")),
        new_tokens=8 if dry else new_tokens,
        prompt_tokens=16 if dry else prompt_tokens,
        smollm=folder,
        questions=questions,
        commit=commit,
        kernels=dict(given.split("=", 1) for given in kernels),
    )
    if exercising:
        exercise(context)
        return
    results = run(context, names, seconds)
    problems = sum(
        ("error" in entry) + sum("error" in row for row in entry["rows"]) for entry in results["sections"].values()
    )
    click.echo(f"{out / 'gpu_validation.md'}: {len(names)} sections, {problems} with errors")


if __name__ == "__main__":
    main()

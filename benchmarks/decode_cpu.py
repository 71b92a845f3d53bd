"""Greedy decoding on a CPU: Hugging Face plain and with prompt lookup, specdec plain and with its default drafter.

One process, contenders interleaved prompt by prompt (A B C, A B C, ...), medians over prompts and repeats, ratios
paired by prompt. Prefill is included on all sides.

python benchmarks/decode_cpu.py --questions 8 --out docs/results/decode_cpu.json
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from common import chat_prompt, huggingface_greedy, huggingface_model, provenance, read_questions

from specdec import Sampling, build_step, controllers, drafters, init_state, iterate, output_tokens, policies, registry
from specdec.models.costs import cached_costs
from specdec.models.loading import Loaded, load
from specdec.registry import parse_controller, parse_drafter
from specdec.transforms import Parts, timed_parts, with_timing
from specdec_kernels.clock import Clock

MODEL = "smollm2-135m"


def specdec_runner(parts: Parts, eos_ids: tuple[int, ...], new_tokens: int) -> Callable[[list[int]], dict[str, Any]]:
    """Decode one prompt and say how long the rounds and their phases took."""

    def run(prompt: list[int]) -> dict[str, Any]:
        clock = Clock()
        timed = timed_parts(parts, clock)
        step = with_timing(build_step(*timed, eos_ids=eos_ids), clock)
        begin = time.perf_counter()
        state = init_state(
            [prompt], model=timed.model, drafter=timed.drafter, controller=timed.controller, max_new_tokens=new_tokens
        )
        rounds = list(iterate(step, state))
        seconds = time.perf_counter() - begin
        timing = [info.timing or {} for _, info in rounds]
        own = [t["total"] - t["verify"] for t in timing]
        return {
            "seconds": seconds,
            "tokens": output_tokens(rounds[-1][0])[0],
            "rounds": len(rounds),
            "own_ms_per_round": 1e3 * statistics.median(own),
        }

    return run


def default_parts(loaded: Loaded) -> Parts:
    """What `specdec decode` runs when it is told nothing."""
    drafting = registry.build_drafter(
        parse_drafter(registry.DEFAULT_DRAFTER),
        target=loaded,
        sampling=Sampling(),
        policy="greedy",
        load_draft=load,
    )
    controller = registry.build_controller(
        parse_controller(registry.DEFAULT_CONTROLLER),
        target=loaded.model,
        drafts=drafting.models,
        costs=cached_costs,
    )
    return Parts(loaded.model, drafting.drafter, policies.greedy(), controller)


def huggingface_runner(module: Any, new_tokens: int, **options: Any) -> Callable[[list[int]], dict[str, Any]]:
    def run(prompt: list[int]) -> dict[str, Any]:
        begin = time.perf_counter()
        tokens = huggingface_greedy(module, prompt, new_tokens, **options)
        return {"seconds": time.perf_counter() - begin, "tokens": tokens}

    return run


@click.command()
@click.option("--questions", default=8, show_default=True)
@click.option("--questions-file", type=click.Path(path_type=Path))
@click.option("--repeats", default=2, show_default=True)
@click.option("--new-tokens", default=64, show_default=True)
@click.option("--quantize", multiple=True, help="Add specdec over weights in this format (repeatable).")
@click.option("--threads", default=2, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Write rows and provenance as JSON.")
def main(
    questions: int,
    questions_file: Path | None,
    repeats: int,
    new_tokens: int,
    quantize: tuple[str, ...],
    threads: int,
    out: Path | None,
) -> None:
    torch.set_num_threads(threads)
    loaded = load(MODEL, device="cpu")
    model = loaded.model
    module = huggingface_model(loaded.path)
    plain = Parts(model, drafters.none(), policies.greedy(), controllers.fixed(0))
    contenders = {
        "HF plain": huggingface_runner(module, new_tokens),
        "HF prompt lookup 3": huggingface_runner(module, new_tokens, prompt_lookup_num_tokens=3),
        "HF prompt lookup 5": huggingface_runner(module, new_tokens, prompt_lookup_num_tokens=5),
        "specdec none": specdec_runner(plain, loaded.eos_ids, new_tokens),
        "specdec default": specdec_runner(default_parts(loaded), loaded.eos_ids, new_tokens),
    }
    for weights in quantize:
        other = load(MODEL, device="cpu", quantize=weights)
        unaided = Parts(other.model, drafters.none(), policies.greedy(), controllers.fixed(0))
        contenders[f"specdec none {weights}"] = specdec_runner(unaided, other.eos_ids, new_tokens)
        contenders[f"specdec default {weights}"] = specdec_runner(default_parts(other), other.eos_ids, new_tokens)
    asked = read_questions(questions_file, questions, spread=True)
    prompts = [chat_prompt(loaded.tokenizer, question["turns"][0]) for question in asked]
    for run in contenders.values():
        run(prompts[0])
    rows = []
    for repeat in range(repeats):
        for question, prompt in zip(asked, prompts, strict=True):
            for name, run in contenders.items():
                result = run(prompt)
                rows.append({"contender": name, "question_id": question["question_id"], "repeat": repeat, **result})
                click.echo(
                    f"{name:20s} {question['category']:16s} {len(result['tokens']) / result['seconds']:6.1f} tok/s",
                    err=True,
                )
    click.echo(table(rows))
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        settings = provenance(
            model=MODEL, dtype="float32", new_tokens=new_tokens, repeats=repeats, about=dict(model.about)
        )
        out.write_text(json.dumps({**settings, "rows": rows}, indent=1) + "\n")


def table(rows: list[dict[str, Any]]) -> str:
    """Median tokens per second, median and range of the paired ratio to HF plain, and identity of the tokens."""
    baseline = {(row["question_id"], row["repeat"]): row for row in rows if row["contender"] == "HF plain"}
    lines = [
        "| contender | tok/s (median) | ratio to HF plain: median (min to max) | own ms per round | same tokens |",
        "|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(row["contender"] for row in rows):
        here = [row for row in rows if row["contender"] == name]
        speed = statistics.median(len(row["tokens"]) / row["seconds"] for row in here)
        pairs = [(row, baseline[row["question_id"], row["repeat"]]) for row in here]
        ratios = [
            (len(row["tokens"]) / row["seconds"]) / (len(base["tokens"]) / base["seconds"]) for row, base in pairs
        ]
        own = [row["own_ms_per_round"] for row in here if "own_ms_per_round" in row]
        same = sum(row["tokens"] == base["tokens"] for row, base in pairs)
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        own_text = f"{statistics.median(own):.2f}" if own else ""
        lines.append(f"| {name} | {speed:.1f} | {spread} | {own_text} | {same}/{len(pairs)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

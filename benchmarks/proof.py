"""The proof on the real model: every drafter and both adapters write what `transformers` writes, token for token.

Greedy decoding is compared with `generate`; coupled sampling with itself across drafters, depths and batches. Rows are
appended as they finish, so an interrupted run goes on where it stopped.

python benchmarks/proof.py --questions 40 --out docs/results/proof.jsonl
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import torch
from common import chat_prompt, huggingface_greedy, huggingface_model, provenance, read_questions

from specdec import Sampling, controllers, decode, drafters, output_tokens, policies
from specdec.divergence import first_divergence
from specdec.models.loading import Loaded, load
from specdec.types import Drafter, Model

MODEL = "smollm2-135m"


def greedy_drafters(model: Model, short: Model) -> dict[str, Callable[[], Drafter]]:
    """Every drafter that can run beside the target `model`, with the draft model `short`."""
    made: dict[str, Callable[[], Drafter]] = {
        "none": drafters.none,
        "ngram": drafters.ngram,
        "ngram-tree": lambda: drafters.ngram(matches=3),
        "suffix": drafters.suffix,
        "suffix-tree": lambda: drafters.suffix(nodes=12),
    }
    made |= {
        "model": lambda: drafters.draft_model(short, mode="greedy"),
        "model-tree": lambda: drafters.draft_model(short, mode="greedy", branching=(2, 2)),
        "first": lambda: drafters.first_hit(drafters.ngram(min_ngram=2), drafters.draft_model(short, mode="greedy")),
        "union": lambda: drafters.union(drafters.draft_model(short, mode="greedy"), drafters.ngram()),
    }
    if model.early_exit is not None:
        made |= {
            "early_exit": lambda: drafters.early_exit(model, 10, mode="greedy"),
            "early_exit-tree": lambda: drafters.early_exit(model, 10, mode="greedy", branching=(2, 1, 1)),
        }
    return made


def greedy_rows(
    loaded: Loaded,
    short: Model,
    questions: list[dict[str, Any]],
    wanted: list[list[int]],
    new_tokens: int,
    names: set[str],
    batch: int,
) -> Iterator[Any]:
    """Compare each drafter's greedy output with `generate`, `batch` questions to a decode."""
    prompts = [chat_prompt(loaded.tokenizer, question["turns"][0]) for question in questions]
    for name, make in greedy_drafters(loaded.model, short).items():
        if names and name not in names:
            continue
        for begin in range(0, len(questions), batch):
            rows = range(begin, min(begin + batch, len(questions)))
            ids = [questions[row]["question_id"] for row in rows]
            key = {"kind": "greedy", "question_id": ids, "adapter": loaded.adapter, "drafter": name}
            if not (yield key):
                continue
            state = decode(
                [prompts[row] for row in rows],
                model=loaded.model,
                drafter=make(),
                policy=policies.greedy(),
                controller=controllers.fixed(4),
                max_new_tokens=new_tokens,
                eos_ids=loaded.eos_ids,
            )
            outputs = output_tokens(state)
            parted = [
                first_divergence(loaded.model, prompts[row], tokens, wanted[row])
                for row, tokens in zip(rows, outputs, strict=True)
            ]
            yield {
                **key,
                "prompt_tokens": [len(prompts[row]) for row in rows],
                "new_tokens": [len(tokens) for tokens in outputs],
                "identical": [found is None for found in parted],
                "divergence": [None if found is None else found._asdict() for found in parted],
            }


def reference_outputs(loaded: Loaded, questions: list[dict[str, Any]], new_tokens: int, store: Path) -> list[list[int]]:
    """What `generate` writes, one question at a time, kept in `store` for a run that goes on."""
    known: dict[str, list[int]] = json.loads(store.read_text()) if store.is_file() else {}
    module = None
    for question in questions:
        key = f"{question['question_id']}:{new_tokens}"
        if key not in known:
            module = module or huggingface_model(loaded.path)
            prompt = chat_prompt(loaded.tokenizer, question["turns"][0])
            known[key] = huggingface_greedy(module, prompt, new_tokens)
            store.write_text(json.dumps(known))
    return [known[f"{question['question_id']}:{new_tokens}"] for question in questions]


def coupled_rows(loaded: Loaded, questions: list[dict[str, Any]], new_tokens: int) -> Iterator[Any]:
    """Coupled sampling writes one text whatever the drafter, the depth and the batch."""
    model = loaded.model
    made: dict[str, Callable[[], Drafter]] = {
        "none": drafters.none,
        "ngram": drafters.ngram,
        "suffix": drafters.suffix,
        "early_exit": lambda: drafters.early_exit(model, 10, mode="coupled"),
    }
    prompts = [chat_prompt(loaded.tokenizer, question["turns"][0]) for question in questions]

    def run(name: str, k: int, rows: list[int]) -> list[list[int]]:
        state = decode(
            [prompts[row] for row in rows],
            model=model,
            drafter=made[name](),
            policy=policies.coupled(),
            controller=controllers.fixed(k),
            max_new_tokens=new_tokens,
            sampling=Sampling(temperature=0.8, top_p=0.95),
            eos_ids=loaded.eos_ids,
            seed=[1000 + row for row in rows],
        )
        return output_tokens(state)

    for begin in range(0, len(prompts) - 2, 3):
        group = [begin, begin + 1, begin + 2]
        plain: list[list[int]] | None = None
        for name in made:
            for k in [0] if name == "none" else range(1, 9):
                for batch in (1, 3):
                    key = {
                        "kind": "coupled",
                        "question_id": [questions[row]["question_id"] for row in group],
                        "adapter": loaded.adapter,
                        "drafter": name,
                        "k": k,
                        "batch": batch,
                    }
                    if not (yield key):
                        continue
                    plain = plain or [run("none", 0, [row])[0] for row in group]
                    tokens = run(name, k, group) if batch == 3 else [run(name, k, [row])[0] for row in group]
                    same = [one == other for one, other in zip(tokens, plain, strict=True)]
                    yield {**key, "identical": same, "new_tokens": [len(row) for row in tokens]}


@click.command()
@click.option("--questions", default=40, show_default=True)
@click.option("--questions-file", type=click.Path(path_type=Path))
@click.option("--coupled-questions", default=3, show_default=True, help="In groups of three.")
@click.option("--new-tokens", default=64, show_default=True)
@click.option("--adapter", "adapters", multiple=True, default=("decoder", "huggingface"), show_default=True)
@click.option("--drafter", "names", multiple=True, help="Only these drafters (repeatable).")
@click.option("--batch", default=8, show_default=True, help="Questions to a greedy decode.")
@click.option("--threads", default=2, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("docs/results/proof.jsonl"), show_default=True)
def main(
    questions: int,
    questions_file: Path | None,
    coupled_questions: int,
    new_tokens: int,
    adapters: tuple[str, ...],
    names: tuple[str, ...],
    batch: int,
    threads: int,
    out: Path,
) -> None:
    torch.set_num_threads(threads)
    out.parent.mkdir(parents=True, exist_ok=True)
    settings = provenance(
        model=MODEL, dtype="float32", new_tokens=new_tokens, k=4, batch=batch, template="chat", prompt_limit=512
    )
    out.with_suffix(".meta.json").write_text(json.dumps(settings, indent=2) + "\n")
    done: set[str] = set()
    if out.is_file():
        done = {json.dumps(json.loads(line)["key"], sort_keys=True) for line in out.read_text().splitlines()}
    # The draft model is the target's first third, with a cache of its own.
    short = load(MODEL, adapter="decoder", device="cpu").model
    assert short.early_exit is not None
    short = short.early_exit(10)
    with out.open("a") as sink:
        for adapter in adapters:
            loaded = load(MODEL, adapter=adapter, device="cpu")
            asked = read_questions(questions_file, questions)
            wanted = reference_outputs(loaded, asked, new_tokens, out.with_suffix(".reference.json"))
            sources = [greedy_rows(loaded, short, asked, wanted, new_tokens, set(names), batch)]
            if adapter == "decoder" and not names:
                sources.append(coupled_rows(loaded, asked[:coupled_questions], new_tokens))
            for source in sources:
                # A generator first names the row it would make and is told whether it is wanted.
                for key in source:
                    if json.dumps(key, sort_keys=True) in done:
                        continue
                    row = source.send(True)
                    sink.write(json.dumps({"key": key, **row, "commit": settings["commit"]}) + "\n")
                    sink.flush()
                    if not all(row["identical"]):
                        click.echo(f"differs: {row}")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    for kind in ("greedy", "coupled"):
        here = [row for row in rows if row["kind"] == kind]
        same = [one for row in here for one in row["identical"]]
        click.echo(f"{kind}: {sum(same)} of {len(same)} outputs identical")


if __name__ == "__main__":
    main()

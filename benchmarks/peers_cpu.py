"""What else a user could run on this CPU: Hugging Face, packages from PyPI, llama.cpp, and specdec in each format.

One run, contenders interleaved prompt by prompt, the same token ids in and the same number of tokens out, prefill
included. Ratios are paired by prompt. Tokens are compared with Hugging Face's greedy ones in float32. Rows are
appended as they come, so an interrupted run goes on where it stopped; packages that are not installed are left out.

llama.cpp runs in a Python of its own (llama-cpp-python and numpy), named with --llama-python or SPECDEC_LLAMA_PYTHON;
its GGUF files are made from the checkpoint: F32, F16, Q8_0, and Q4_1 with embeddings in Q8_0 as its own tools do.

python benchmarks/peers_cpu.py --out docs/results/peers_cpu.jsonl --llama-python ~/llama/bin/python
python benchmarks/peers_cpu.py --out docs/results/peers_cpu.jsonl --report docs/performance.md
"""

import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from common import (
    Rows,
    chat_prompt,
    huggingface_greedy,
    huggingface_model,
    origin,
    read_questions,
    read_rows,
    replace_section,
)
from decode_cpu import default_parts, specdec_runner

from specdec import controllers, drafters, policies
from specdec.models.loading import Loaded, load
from specdec.models.weights import Weights
from specdec.transforms import Parts

MODEL = "smollm2-135m"
FORMATS = ("fp32", "fp16", "int8", "int4")
GGUF_TYPES = ("F32", "F16", "Q8_0", "Q4_1")
CONTEXT = 1024
LOOKUP = 5

Run = Callable[[list[int]], dict[str, Any]]


def timed(generate: Callable[[list[int]], list[int]]) -> Run:
    def run(prompt: list[int]) -> dict[str, Any]:
        begin = time.perf_counter()
        tokens = generate(prompt)
        return {"tokens": tokens, "seconds": time.perf_counter() - begin}

    return run


def huggingface(path: Path, new_tokens: int) -> Iterator[tuple[str, Run]]:
    module = huggingface_model(path)
    yield "HF plain", timed(lambda prompt: huggingface_greedy(module, prompt, new_tokens))
    for k in (3, 5, 10):
        yield (
            f"HF prompt lookup {k}",
            timed(lambda prompt, k=k: huggingface_greedy(module, prompt, new_tokens, prompt_lookup_num_tokens=k)),
        )


def flashspec(path: Path, new_tokens: int, stop: tuple[int, ...]) -> Iterator[tuple[str, Run]]:
    if find_spec("flashspec") is None:
        return
    from flashspec import BanditConfig, FlashSpecConfig, SamplingConfig, SpeculativeEngine
    from flashspec.engine import NgramDrafter, TargetModel

    device = torch.device("cpu")
    target = TargetModel(str(path), device, torch.float32, model=huggingface_model(path))
    for gamma in (3, 6):
        config = FlashSpecConfig(
            device="cpu",
            dtype="float32",
            drafter_strategy="bandit",
            bandit=BanditConfig(n_arms=1),
            sampling=SamplingConfig(temperature=0.0, gamma=gamma),
        )
        engine = SpeculativeEngine(config, [NgramDrafter()], target)

        def generate(prompt: list[int], engine: Any = engine) -> list[int]:
            result = engine.generate(torch.tensor([prompt]), max_new_tokens=new_tokens, eos_token_ids=stop)
            found: list[int] = result.output_ids[0, : result.n_tokens_generated].tolist()
            return found

        yield f"flashspec lookup {gamma}", timed(generate)


def economize(path: Path, new_tokens: int, stop: tuple[int, ...]) -> Iterator[tuple[str, Run]]:
    if find_spec("economize") is None:
        return
    import economize as package
    from economize.techniques.lookup import LookupConfig

    model = package.apply(huggingface_model(path), LookupConfig())
    for cycle in (4, 6):
        decoding = package.DecodeConfig(cycle_length=cycle)

        def generate(prompt: list[int], decoding: Any = decoding) -> list[int]:
            result = model.decode(torch.tensor(prompt), new_tokens, decoding=decoding, stop=list(stop))
            tokens = torch.as_tensor(result.tokens).flatten().tolist()
            return tokens[len(prompt) :] if tokens[: len(prompt)] == prompt else tokens

        yield f"economize lookup {cycle - 1}", timed(generate)


def dejavuu(path: Path, new_tokens: int, stop: tuple[int, ...]) -> Iterator[tuple[str, Run]]:
    if find_spec("dejavuu") is None:
        return
    from dejavuu import DejaVu
    from dejavuu.core.engine import generate as decode
    from dejavuu.drafters import make_drafter

    model = DejaVu.from_pretrained(path, method="pld", backend="hf", device="cpu", dtype="float32")

    def generate(prompt: list[int]) -> list[int]:
        return list(decode(model.model, prompt, new_tokens, make_drafter("pld"), 8, stop[0]).tokens)

    yield "dejavuu pld 8", timed(generate)


def llama(python: str, loaded: Loaded, folder: Path, new_tokens: int, threads: int) -> Iterator[tuple[str, Run]]:
    for kind in GGUF_TYPES:
        path = folder / f"{MODEL}-{kind}.gguf"
        if not path.is_file():
            write_gguf(loaded, path, kind)
        worker = subprocess.Popen(
            [python, str(Path(__file__).with_name("llama_worker.py")), str(path), str(threads), str(CONTEXT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert worker.stdout is not None
        if not worker.stdout.readline():
            raise SystemExit(f"{python} cannot run llama.cpp on {path}; install llama-cpp-python there")
        for lookup in (0, LOOKUP):

            def run(prompt: list[int], worker: Any = worker, lookup: int = lookup) -> dict[str, Any]:
                request = {"prompt": prompt, "new_tokens": new_tokens, "lookup": lookup, "stop": loaded.eos_ids}
                worker.stdin.write(json.dumps(request) + "\n")
                worker.stdin.flush()
                result: dict[str, Any] = json.loads(worker.stdout.readline())
                return result

            yield f"llama.cpp {kind} {f'lookup {lookup}' if lookup else 'plain'}", run


def write_gguf(loaded: Loaded, path: Path, kind: str) -> None:
    """The checkpoint as a GGUF file whose matrices are of type `kind`; norms stay float32."""
    from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, get_tensor_name_map, quantize

    config = json.loads((loaded.path / "config.json").read_text())
    draft = path.with_suffix(".partial")
    writer = GGUFWriter(draft, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_vocab_size(config["vocab_size"])
    tokenizer = json.loads((loaded.path / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"] | {entry["content"]: entry["id"] for entry in tokenizer["added_tokens"]}
    special = {entry["content"] for entry in tokenizer["added_tokens"]}
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges(merges)
    writer.add_eos_token_id(loaded.eos_ids[0])
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, tensor in Weights(loaded.path).items():
        array = tensor.float().numpy()
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
        if heads is not None:
            array = array.reshape(config[heads], 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        # Four bits are too few for the head, which here is the embedding.
        chosen = "F32" if array.ndim == 1 else "Q8_0" if kind == "Q4_1" and "embed" in name else kind
        into = GGMLQuantizationType[chosen]
        stored = quantize(np.ascontiguousarray(array), into)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), stored, raw_dtype=into)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(draft, path)


def specdec(new_tokens: int) -> Iterator[tuple[str, Run]]:
    for weights in FORMATS:
        loaded = load(MODEL, device="cpu", quantize=None if weights == "fp32" else weights)
        plain = Parts(loaded.model, drafters.none(), policies.greedy(), controllers.fixed(0))
        yield f"specdec {weights} none", specdec_runner(plain, loaded.eos_ids, new_tokens)
        yield f"specdec {weights} default", specdec_runner(default_parts(loaded), loaded.eos_ids, new_tokens)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Rows, as JSON lines.")
@click.option("--questions", default=20, show_default=True)
@click.option("--questions-file", type=click.Path(path_type=Path))
@click.option("--repeats", default=1, show_default=True)
@click.option("--new-tokens", default=64, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--llama-python", envvar="SPECDEC_LLAMA_PYTHON", help="A Python with llama-cpp-python and numpy.")
@click.option("--gguf", type=click.Path(path_type=Path), help="Folder for GGUF files.  [default: beside the rows]")
@click.option("--only", multiple=True, help="Run contenders whose name contains this; HF plain always runs.")
@click.option("--report", type=click.Path(path_type=Path), help="Write the table of --out into this document instead.")
@click.option("--section", "section_name", default="peers", show_default=True, help="Of the document.")
def main(
    out: Path,
    questions: int,
    questions_file: Path | None,
    repeats: int,
    new_tokens: int,
    threads: int,
    llama_python: str | None,
    gguf: Path | None,
    only: tuple[str, ...],
    report: Path | None,
    section_name: str,
) -> None:
    if report is not None:
        replace_section(report, section_name, section(*read_rows(out)))
        return
    torch.set_num_threads(threads)
    loaded = load(MODEL, device="cpu")
    rows = Rows(out, model=MODEL, new_tokens=new_tokens, questions=questions, repeats=repeats)
    sources = [
        huggingface(loaded.path, new_tokens),
        flashspec(loaded.path, new_tokens, loaded.eos_ids),
        economize(loaded.path, new_tokens, loaded.eos_ids),
        dejavuu(loaded.path, new_tokens, loaded.eos_ids),
        specdec(new_tokens),
    ]
    if llama_python:
        folder = gguf or out.parent
        folder.mkdir(parents=True, exist_ok=True)
        sources.append(llama(llama_python, loaded, folder, new_tokens, threads))
    contenders = dict(pair for source in sources for pair in source)
    if only:
        kept = [name for name in contenders if name == "HF plain" or any(part in name for part in only)]
        contenders = {name: contenders[name] for name in kept}
    asked = read_questions(questions_file, questions, spread=True)
    prompts = [chat_prompt(loaded.tokenizer, question["turns"][0]) for question in asked]
    for run in contenders.values():
        run(prompts[0])
    for repeat in range(repeats):
        for question, prompt in zip(asked, prompts, strict=True):
            for name, run in contenders.items():
                key = {"contender": name, "question_id": question["question_id"], "repeat": repeat}
                if rows.has(**key):
                    continue
                result = run(prompt)
                rows.add(**key, category=question["category"], seconds=result["seconds"], tokens=result["tokens"])
                speed = len(result["tokens"]) / result["seconds"]
                click.echo(f"{name:28s} {question['category']:16s} {speed:6.1f} tok/s", err=True)
    click.echo(section(rows.about, rows.rows))


def ratios(rows: list[dict[str, Any]], name: str, base: str) -> list[float]:
    """Speed of one contender over another's, prompt by prompt."""
    speed = {(row["contender"], row["question_id"], row["repeat"]): len(row["tokens"]) / row["seconds"] for row in rows}
    keys = [key[1:] for key in speed if key[0] == name]
    return [speed[name, *key] / speed[base, *key] for key in keys if (base, *key) in speed]


def section(about: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    settings, base = about["settings"], "HF plain"
    wanted = {(row["question_id"], row["repeat"]): row["tokens"] for row in rows if row["contender"] == base}
    names = list(dict.fromkeys(row["contender"] for row in rows))
    lines = [
        f"{settings['model']}, greedy, {settings['questions']} questions, {settings['new_tokens']} new tokens, prefill "
        f"included, repeats {settings['repeats']}. Ratios are by question: geometric mean (smallest to largest). "
        f"{origin(about)}",
        "",
        "| contender | tok/s (median) | ratio to HF plain | same tokens as HF greedy |",
        "|---|---|---|---|",
    ]
    for name in names:
        here = [row for row in rows if row["contender"] == name and (row["question_id"], row["repeat"]) in wanted]
        found = ratios(rows, name, base)
        speed = statistics.median(len(row["tokens"]) / row["seconds"] for row in here)
        same = sum(row["tokens"] == wanted[row["question_id"], row["repeat"]] for row in here)
        spread = f"{statistics.geometric_mean(found):.2f} ({min(found):.2f} to {max(found):.2f})"
        lines.append(f"| {name} | {speed:.1f} | {spread} | {same}/{len(here)} |")
    mean = {name: statistics.geometric_mean(ratios(rows, name, base)) for name in names}
    lines += ["", "Against the best mode of llama.cpp on the same weights:", ""]
    for format, kind in (("fp32", "F32"), ("fp16", "F16"), ("int8", "Q8_0"), ("int4", "Q4_1")):
        theirs = [name for name in names if name.startswith(f"llama.cpp {kind} ")]
        ours = [name for name in names if name.startswith(f"specdec {format} ")]
        if theirs and ours:
            best = max(theirs, key=mean.__getitem__)
            parts = [f"{name} {statistics.geometric_mean(ratios(rows, name, best)):.2f}" for name in ours]
            lines.append(f"- {best}: {', '.join(parts)}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

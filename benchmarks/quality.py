"""What a weight format costs in quality and saves in memory and time, against float32.

Perplexity, mean KL divergence from float32 and how often both would choose the same token, over a text that comes with
every Python: its language reference, every second topic in alphabetical order (calibration uses the others). Windows
of 512 tokens, the first token of each given. Rows are appended format by format; a second run adds what is missing.

The built-in model was dequantized from four bits, so four bits hold it without loss. `rescaled` is the same function in
weights that lie on no grid: every input channel of a matrix of the layers is multiplied by a random factor between
2^-1/2 and 2^1/2, and the norm weights, or the rows of the matrix before, are divided by it.

python benchmarks/quality.py --out docs/results/quality.jsonl
python benchmarks/quality.py --out docs/results/quality.jsonl --report docs/performance.md
"""

import hashlib
import pydoc_data.topics as python_docs
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import torch
from common import Rows, origin, read_rows, replace_section
from load_worker import CONTEXT, measure
from torch import Tensor

from specdec.models.loading import QUANTIZED, Loaded, load
from specdec.models.quantize import quantize
from specdec.models.source import PACKED
from specdec.models.store import MARKER
from specdec.models.weights import Weights, write_tensors

MODEL = "smollm2-135m"
FORMATS = ("fp32", "fp16", "bf16", "int8", "int4", "int4 calibrated")
WEIGHTS = ("built-in", "rescaled")
WINDOW = 512


def text() -> str:
    return "\n\n".join(python_docs.topics[name] for name in sorted(python_docs.topics)[::2])


def windows_of(tokenizer: Any, tokens: int) -> tuple[Tensor, ...]:
    ids = torch.tensor(tokenizer(text()[: 8 * tokens])["input_ids"][:tokens])
    return torch.split(ids, WINDOW)


def log_probs(loaded: Loaded, window: Tensor) -> Tensor:
    cache = loaded.model.init_cache(1, len(window))
    logits, _, _ = loaded.model.forward(cache, window[None])
    assert logits is not None
    return logits[0, :-1].log_softmax(-1)


def compare(loaded: Loaded, references: list[Tensor], windows: tuple[Tensor, ...]) -> dict[str, float]:
    """Perplexity, mean KL(float32 || format) and share of positions with the same best token."""
    surprise, divergence, same, count = 0.0, 0.0, 0, 0
    for window, p in zip(windows, references, strict=True):
        q = log_probs(loaded, window)
        surprise -= float(q.gather(1, window[1:, None]).double().sum())
        divergence += float((p.exp() * (p - q)).sum(-1).double().sum())
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        count += len(p)
    mean = torch.tensor(surprise / count).exp()
    return {"perplexity": float(mean), "kl": divergence / count, "same_top": same / count, "positions": count}


def rescale(loaded: Loaded, folder: Path) -> Path:
    """The checkpoint of `loaded` with rescaled channels, as a folder; see the top of this file."""
    model, weights = loaded.model, {name: tensor.clone() for name, tensor in Weights(loaded.path).items()}
    generator = torch.Generator().manual_seed(0)

    def factors(count: int) -> Tensor:
        return 2 ** (torch.rand(count, generator=generator) - 0.5)

    for index in range(model.num_layers):
        layer = f"model.layers.{index}"
        block = {name.removeprefix(f"{layer}."): part for name, part in weights.items() if name.startswith(f"{layer}.")}
        for norm, readers in (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            scale = factors(len(block[f"{norm}.weight"]))
            block[f"{norm}.weight"] /= scale
            for reader in readers:
                block[f"{reader}.weight"] *= scale
        value, out = block["self_attn.v_proj.weight"], block["self_attn.o_proj.weight"]
        scale = factors(len(value))
        value /= scale[:, None]
        # Every key-value head serves several heads of queries in a row.
        _, _, _, kv_heads, size = model.init_cache(1, 1).store.slots[0].shape
        out *= scale.view(kv_heads, size).repeat_interleave(out.shape[1] // len(value), 0).flatten()
        scale = factors(len(block["mlp.up_proj.weight"]))
        block["mlp.up_proj.weight"] /= scale[:, None]
        block["mlp.down_proj.weight"] *= scale
    folder.mkdir()
    for path in loaded.path.iterdir():
        if path.suffix in (".json", ".jinja") and path.name != MARKER:
            shutil.copyfile(path, folder / path.name)
    write_tensors(folder / "model.safetensors", weights, {})
    return folder


def forward_ms(loaded: Loaded, nodes: int, repeats: int, context: int = 128) -> float:
    """Median time of a forward of `nodes` tokens behind `context` others."""
    from specdec import cache as kv

    tokens = (torch.arange(context + nodes) % loaded.model.vocab_size)[None]
    cache = loaded.model.init_cache(1, context + nodes)
    _, _, cache = loaded.model.forward(cache, tokens[:, :context], logits=False)
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        _, _, cache = loaded.model.forward(cache, tokens[:, context:])
        times.append(1e3 * (time.perf_counter() - begin))
        cache = kv.truncate(cache, torch.tensor([context]))
    return statistics.median(times)


def prepare(source: str, name: str, folder: Path) -> str:
    """What `load` takes for a model in a format: the model itself in float32, else a folder that is made of it."""
    format, _, calibrated = name.partition(" ")
    if format == "fp32":
        return source
    return str(quantize(source, format, folder / name.replace(" ", "-"), calibrate=bool(calibrated)))


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Rows, as JSON lines.")
@click.option("--tokens", default=4096, show_default=True)
@click.option("--repeats", default=20, show_default=True, help="Forwards per timing.")
@click.option("--threads", default=2, show_default=True)
@click.option("--only", multiple=True, type=click.Choice(FORMATS))
@click.option("--report", type=click.Path(path_type=Path), help="Write the table of --out into this document instead.")
def main(out: Path, tokens: int, repeats: int, threads: int, only: tuple[str, ...], report: Path | None) -> None:
    if report is not None:
        replace_section(report, "quality", section(*read_rows(out)))
        return
    torch.set_num_threads(threads)
    reference = load(MODEL, device="cpu")
    windows = windows_of(reference.tokenizer, tokens)
    references = [log_probs(reference, window) for window in windows]
    digest = hashlib.sha256(torch.cat(windows).numpy().tobytes()).hexdigest()
    rows = Rows(out, model=MODEL, tokens=tokens, window=WINDOW, tokens_sha256=digest, repeats=repeats)
    with tempfile.TemporaryDirectory() as scratch:
        for weights in WEIGHTS:
            folder = Path(scratch) / weights
            folder.mkdir()
            wanted = [name for name in only or FORMATS if not rows.has(weights=weights, format=name)]
            source = MODEL if weights == "built-in" or not wanted else str(rescale(reference, folder / MODEL))
            for name in wanted:
                place = prepare(source, name, folder)
                loaded = load(place, device="cpu")
                stored = loaded.path / (PACKED if (loaded.path / PACKED).is_file() else "model.safetensors")
                row = compare(loaded, references, windows) | {"file_bytes": stored.stat().st_size}
                row |= {f"ms_{nodes}": forward_ms(loaded, nodes, repeats) for nodes in (1, 8)}
                del loaded
                if weights == "built-in":
                    row |= measure(place)
                    if name in QUANTIZED:
                        row["whole_peak_ratio"] = measure(MODEL, name)["peak_ratio"]
                rows.add(weights=weights, format=name, **row)
                click.echo(f"{weights} {name}: {rows.rows[-1]}", err=True)
    click.echo(section(rows.about, rows.rows))


def section(about: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    settings = about["settings"]
    heads = "weights|format|perplexity|against fp32|mean KL|same best token|tok/s|t(8) / t(1)"
    heads += "|file, MB|load, s|peak, MB|peak ratio|with --quantize"
    lines = [
        f"{settings['model']}, {settings['tokens']} tokens of Python's language reference in windows of "
        f"{settings['window']} (SHA-256 of the tokens {settings['tokens_sha256'][:12]}). Peak: by how much the "
        "resident size of a new process exceeds that of one without a model; peak ratio: the same over packed "
        f"weights and a cache of {CONTEXT} tokens; last, the ratio where the float32 model is loaded with "
        f"`--quantize`. {origin(about)}",
        "",
        f"| {' | '.join(heads.split('|'))} |",
        "|---" * len(heads.split("|")) + "|",
    ]
    exact = next((row["perplexity"] for row in rows if row["format"] == "fp32"), None)
    for row in rows:
        against = "" if exact is None else f"{100 * (row['perplexity'] / exact - 1):+.2f} %"
        cells = [
            row["weights"],
            row["format"],
            f"{row['perplexity']:.3f}",
            against,
            f"{row['kl']:.2g}",
            f"{100 * row['same_top']:.1f} %",
            f"{1e3 / row['ms_1']:.0f}",
            f"{row['ms_8'] / row['ms_1']:.2f}",
            f"{row['file_bytes'] / 1e6:.0f}",
            f"{row['load_s']:.2f}" if "load_s" in row else "",
            f"{row['peak_mib'] * 2**20 / 1e6:.0f}" if "peak_mib" in row else "",
            f"{row['peak_ratio']:.2f}" if "peak_ratio" in row else "",
            f"{row['whole_peak_ratio']:.2f}" if "whole_peak_ratio" in row else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

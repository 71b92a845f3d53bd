"""What a weight format costs in quality and saves in memory and time, against float32.

Perplexity, mean KL divergence from float32 and how often both would choose the same token, over a text that comes with
every Python: its language reference, every second topic in alphabetical order (calibration uses the others). Windows
of 512 tokens, the first token of each given. Rows are appended format by format; a second run adds what is missing.

python benchmarks/quality.py --out docs/results/quality.jsonl
python benchmarks/quality.py --out docs/results/quality.jsonl --report docs/performance.md
"""

import hashlib
import pydoc_data.topics as python_docs
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import torch
from common import Rows, origin, read_rows, replace_section
from torch import Tensor

from specdec.models.loading import Loaded, load
from specdec.models.quantize import quantize
from specdec.models.source import PACKED

MODEL = "smollm2-135m"
FORMATS = ("fp32", "fp16", "bf16", "int8", "int4", "int4 calibrated")
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


def compare(loaded: Loaded, reference: Loaded, windows: tuple[Tensor, ...]) -> dict[str, float]:
    """Perplexity, mean KL(float32 || format) and share of positions with the same best token."""
    surprise, divergence, same, count = 0.0, 0.0, 0, 0
    for window in windows:
        p, q = log_probs(reference, window), log_probs(loaded, window)
        surprise -= float(q.gather(1, window[1:, None]).double().sum())
        divergence += float((p.exp() * (p - q)).sum(-1).double().sum())
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        count += len(p)
    mean = torch.tensor(surprise / count).exp()
    return {"perplexity": float(mean), "kl": divergence / count, "same_top": same / count, "positions": count}


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


def load_format(name: str, folder: Path) -> tuple[Loaded, int, float]:
    """The model in a format, the bytes of its file and the seconds it took to load."""
    format, _, calibrated = name.partition(" ")
    if format == "fp32":
        begin = time.perf_counter()
        loaded = load(MODEL, device="cpu")
        file = loaded.path / "model.safetensors"
    else:
        path = quantize(MODEL, format, folder / name.replace(" ", "-"), calibrate=bool(calibrated))
        begin = time.perf_counter()
        loaded, file = load(str(path), device="cpu"), path / PACKED
    return loaded, file.stat().st_size, time.perf_counter() - begin


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
    digest = hashlib.sha256(torch.cat(windows).numpy().tobytes()).hexdigest()
    rows = Rows(out, model=MODEL, tokens=tokens, window=WINDOW, tokens_sha256=digest, repeats=repeats)
    with tempfile.TemporaryDirectory() as folder:
        for name in only or FORMATS:
            if rows.has(format=name):
                continue
            loaded, size, seconds = load_format(name, Path(folder))
            quality = compare(loaded, reference, windows)
            times = {f"ms_{nodes}": forward_ms(loaded, nodes, repeats) for nodes in (1, 8)}
            rows.add(format=name, file_bytes=size, load_s=seconds, **quality, **times)
            click.echo(f"{name}: {rows.rows[-1]}", err=True)
            del loaded
    click.echo(section(rows.about, rows.rows))


def section(about: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    settings = about["settings"]
    lines = [
        f"{settings['model']}, {settings['tokens']} tokens of Python's language reference in windows of "
        f"{settings['window']} (SHA-256 of the tokens {settings['tokens_sha256'][:12]}). {origin(about)}",
        "",
        "| format | perplexity | against fp32 | mean KL | same best token | file, MB | load, s | tok/s | t(8) / t(1) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    exact = next((row["perplexity"] for row in rows if row["format"] == "fp32"), None)
    for row in rows:
        against = "" if exact is None else f"{100 * (row['perplexity'] / exact - 1):+.2f} %"
        lines.append(
            f"| {row['format']} | {row['perplexity']:.3f} | {against} | {row['kl']:.2g} "
            f"| {100 * row['same_top']:.1f} % | {row['file_bytes'] / 1e6:.0f} | {row['load_s']:.1f} "
            f"| {1e3 / row['ms_1']:.0f} | {row['ms_8'] / row['ms_1']:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()

"""What loading a model takes in a process of its own: seconds, and how far the resident size rises above that of the
same process without the model. `quality.py` starts it; one JSON object comes out.

python benchmarks/load_worker.py MODEL [FORMAT]
"""

import json
import subprocess
import sys
import time

import torch

from specdec.models.decoder import supports
from specdec.models.loading import load, read_config
from specdec.models.report import silent
from specdec.models.source import find_source
from specdec.models.tokenizer import find_tokenizer, read_tokenizer
from specdec_kernels.cpu import library
from specdec_kernels.memory import memory

CONTEXT = 512


def without_model(name: str) -> None:
    """Everything that `with_model` does apart from the weights: code, configuration and tokenizer."""
    source = find_source(name, silent)
    supports(read_config(source, False))
    tokenizer = read_tokenizer(source.folder) if source.converted else find_tokenizer(
        source.folder, trust_remote_code=False
    )  # fmt: skip
    tokenizer("Hello")
    print(json.dumps({"peak": memory()["rss_peak"]}))


def with_model(name: str, format: str | None) -> None:
    begin = time.perf_counter()
    loaded = load(name, device="cpu", quantize=format)
    seconds = time.perf_counter() - begin
    cache = loaded.model.init_cache(1, CONTEXT)
    held = loaded.model.about["weight_bytes"] + cache.store.slots[0].nbytes
    # Memory of a cache counts once it is written.
    loaded.model.forward(cache, torch.arange(CONTEXT)[None], logits=False)
    print(json.dumps({"peak": memory()["rss_peak"], "load_s": seconds, "held_mib": held / 2**20}))


def measure(name: str, format: str | None = None) -> dict[str, float]:
    """`load_s`; `peak_mib` above the process without a model; `peak_ratio` of that to weights and a cache of
    `CONTEXT` tokens."""

    def run(*arguments: str) -> dict[str, float]:
        command = [sys.executable, __file__, *arguments]
        found: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        return found

    alone, whole = run("--without", name), run(name, *([format] if format else []))
    peak = whole["peak"] - alone["peak"]
    return {"load_s": whole["load_s"], "peak_mib": peak, "peak_ratio": peak / whole["held_mib"]}


if __name__ == "__main__":
    library.load()
    if sys.argv[1] == "--without":
        without_model(sys.argv[2])
    else:
        with_model(sys.argv[1], (sys.argv[2:] or [None])[0])

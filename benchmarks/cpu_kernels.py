"""What a forward of n nodes costs, t(n), for the torch decoder and the CPU kernels in each weight format.

    python benchmarks/cpu_kernels.py --out t_of_n.json

The model has random weights in the shape of SmolLM2-135M (30 layers, hidden 576, 9 heads over 3 key-value heads of 64,
inner 1536, 49152 tokens, tied), so no download is needed; time depends on shapes only. Contenders take turns, one
forward each, so that a busy machine slows all of them alike; the table has minima over the rounds, the JSON all times.
Read bandwidth is measured in the same rounds: no forward can be faster than its weights are read.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from typing import Any

import torch

from specdec.cache import truncate
from specdec.models.checkpoint import Reader
from specdec.models.decoder import build_decoder
from specdec.models.families import FAMILIES
from specdec_kernels.cpu import library
from specdec_kernels.cpu.packed import FORMATS, Arena
from specdec_kernels.cpu.stack import Stack, build_stack, stack_forward

NODES = (1, 2, 4, 8, 16, 32)
Run = Callable[[int], None]


def make_weights(layers: int) -> tuple[Any, dict[str, torch.Tensor]]:
    from transformers import AutoConfig

    hidden, inner, heads, kv_heads, vocab = 576, 1536, 9, 3, 49152
    config = AutoConfig.for_model(
        "llama",
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    generator = torch.Generator().manual_seed(0)

    def random(out: int, into: int) -> torch.Tensor:
        return torch.randn(out, into, generator=generator) / into**0.5

    tensors = {"model.embed_tokens.weight": random(vocab, hidden), "model.norm.weight": torch.ones(hidden)}
    for index in range(layers):
        layer = f"model.layers.{index}"
        width = hidden // heads * kv_heads
        shapes = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (width, hidden)}
        shapes |= {"self_attn.v_proj": (width, hidden), "self_attn.o_proj": (hidden, hidden)}
        shapes |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
        tensors |= {f"{layer}.{name}.weight": random(*shape) for name, shape in shapes.items()}
        tensors |= {
            f"{layer}.{name}.weight": torch.ones(hidden) for name in ("input_layernorm", "post_attention_layernorm")
        }
    return config, tensors


def build_packed(config: Any, tensors: dict[str, torch.Tensor], format: str) -> Stack:
    family = FAMILIES[config.model_type]
    spec = family.describe(config)
    reader = Reader(tensors, torch.float32, torch.device("cpu"))
    ends = family.ends(config, spec, reader)
    layers = (family.layer(config, spec, reader, index) for index in range(spec.num_layers))
    return build_stack(spec, layers, ends.final_norm.weight, ends.embedding, ends.head, format)


def decoder_run(config: Any, tensors: dict[str, torch.Tensor], linear: str, context: int) -> Run:
    model = build_decoder(config, tensors, name=linear, dtype=torch.float32, device=torch.device("cpu"), linear=linear)
    tokens = torch.zeros(1, max(*NODES, context), dtype=torch.int64)
    cache = model.init_cache(1, context + max(NODES))
    _, _, filled = model.forward(cache, tokens[:, :context], logits=False)

    def run(n: int) -> None:
        nonlocal filled
        _, _, used = model.forward(filled, tokens[:, :n])
        filled = truncate(used, torch.tensor([context]))

    return run


def stack_run(stack: Stack, context: int, *, best: bool = False, spent: torch.Tensor | None = None) -> Run:
    slots = torch.zeros(2 * stack.num_layers, 1, context + max(NODES), stack.kv_heads, stack.head_size)
    length = torch.tensor([context])

    def run(n: int) -> None:
        places = context + torch.arange(n)[None]
        tokens = torch.zeros(1, n, dtype=torch.int64)
        stack_forward(
            stack, slots, tokens, places, places, length, context + n, logits=not best, best=best, spent=spent
        )

    return run


def read_run() -> tuple[Run, int]:
    memory = Arena(512 << 20)(512 << 20).view(torch.float32)
    memory.zero_()

    def run(n: int) -> None:
        memory.sum()

    return run, memory.nbytes


def measure(contenders: dict[str, Run], rounds: int) -> dict[str, dict[int, list[float]]]:
    times: dict[str, dict[int, list[float]]] = {name: {n: [] for n in NODES} for name in contenders}
    for _ in range(rounds):
        for n in NODES:
            for name, run in contenders.items():
                begin = time.perf_counter()
                run(n)
                times[name][n].append(1e3 * (time.perf_counter() - begin))
    return times


def table(times: dict[str, dict[int, list[float]]]) -> str:
    lines = [
        f"| ms, minimum | {' | '.join(f'n = {n}' for n in NODES)} | t(8) / t(1) |",
        "|---" * (len(NODES) + 2) + "|",
    ]
    for name, by_nodes in times.items():
        least = {n: min(values) for n, values in by_nodes.items()}
        cells = " | ".join(f"{least[n]:.1f}" for n in NODES)
        lines.append(f"| {name} | {cells} | {least[8] / least[1]:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--context", type=int, default=128, help="tokens in the cache before the measured forward")
    parser.add_argument("--only", nargs="*", help="contenders to run: torch, onednn and weight formats")
    parser.add_argument("--out", help="JSON file for all times")
    options = parser.parse_args()
    reason = library.available()
    if reason is not None:
        raise SystemExit(f"the CPU implementation {reason}")
    wanted = options.only or ["torch", "onednn", *FORMATS]
    config, tensors = make_weights(options.layers)
    contenders, sizes = {}, {}
    for name in wanted:
        if name in FORMATS:
            stack = build_packed(config, tensors, name)
            sizes[name] = stack.bytes
            contenders[f"cpu {name}"] = stack_run(stack, options.context)
            contenders[f"cpu {name}, argmax only"] = stack_run(stack, options.context, best=True)
        else:
            contenders[name] = decoder_run(config, tensors, name, options.context)
    read, bytes_read = read_run()
    times = measure({**contenders, "read 512 MiB": read}, options.rounds)
    reading = min(min(values) for values in times.pop("read 512 MiB").values())
    bandwidth = bytes_read / reading / 1e6
    print(table(times))
    print(f"\nread bandwidth {bandwidth:.1f} GB/s; weights would be read in", end=" ")
    print(", ".join(f"{name} {size / bandwidth / 1e6:.1f} ms" for name, size in sizes.items()))
    if options.out:
        about = {"instruction_set": library.load().instruction_sets[0], "threads": torch.get_num_threads()}
        about |= {"torch": torch.__version__, "processor": platform.machine(), "context": options.context}
        with open(options.out, "w") as file:
            json.dump({"about": about, "bandwidth_gb_s": bandwidth, "bytes": sizes, "ms": times}, file, indent=1)


if __name__ == "__main__":
    main()

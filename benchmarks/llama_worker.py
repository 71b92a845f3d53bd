"""llama.cpp behind a pipe: greedy decoding of token ids, plain or with prompt lookup, one JSON object per line.

It runs in an environment of its own, with llama-cpp-python and numpy and nothing of this project, so it imports
neither. `peers_cpu.py` starts one process per GGUF file: `python llama_worker.py MODEL.gguf THREADS CONTEXT`.

A request is `{"prompt": [ids], "new_tokens": n, "lookup": k}`; the answer `{"tokens": [ids], "seconds": s,
"forwards": m}`. `lookup` 0 decodes plainly, else up to k tokens that followed the longest match (3 tokens to 1) are
verified with the next one; where nothing matches, the forward has one token.
"""

import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import llama_cpp
import numpy as np


class Session:
    """A model and its context, called through llama.cpp's own interface: the Python wrapper copies every logit."""

    def __init__(self, path: str, threads: int, context: int) -> None:
        llama_cpp.llama_backend_init()
        model_options = llama_cpp.llama_model_default_params()
        model_options.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), model_options)
        if not self.model:
            raise SystemExit(f"llama.cpp cannot load {path}")
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = context, context, context
        options.n_threads = options.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, options)
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(context, 0, 1)

    def forward(self, tokens: Sequence[int], start: int, scored: int) -> list[int]:
        """Write `tokens` from position `start` on; the best next token after each of the last `scored`."""
        batch, first = self.batch, len(tokens) - scored
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, start + i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            batch.logits[i] = i >= first
        if llama_cpp.llama_decode(self.context, batch):
            raise SystemExit("llama_decode failed")
        rows = (llama_cpp.llama_get_logits_ith(self.context, i) for i in range(first, len(tokens)))
        return [int(np.argmax(np.ctypeslib.as_array(row, (self.vocab,)))) for row in rows]

    def truncate(self, length: int) -> None:
        llama_cpp.llama_memory_seq_rm(self.memory, 0, length, -1)

    def generate(self, prompt: list[int], new_tokens: int, lookup: int, stop: Sequence[int] = ()) -> dict[str, Any]:
        begin = time.perf_counter()
        self.truncate(0)
        tokens = [*prompt, *self.forward(prompt, 0, 1)]
        end, forwards = len(prompt) + new_tokens, 1
        while len(tokens) < end and tokens[-1] not in stop:
            length = len(tokens)
            drafts = find_drafts(tokens, min(lookup, end - length - 1)) if lookup else []
            best = self.forward([tokens[-1], *drafts], length - 1, 1 + len(drafts))
            forwards += 1
            accepted = next((i for i, draft in enumerate(drafts) if draft != best[i]), len(drafts))
            fresh = [*drafts[:accepted], best[accepted]]
            cut = next((i + 1 for i, token in enumerate(fresh) if token in stop), len(fresh))
            tokens += fresh[:cut]
            self.truncate(len(tokens) - 1)
        return {"tokens": tokens[len(prompt) :], "seconds": time.perf_counter() - begin, "forwards": forwards}


def find_drafts(tokens: list[int], count: int, longest: int = 3) -> list[int]:
    """What followed the first earlier occurrence of the last tokens, longest match first."""
    for size in range(min(longest, len(tokens) - 1), 0, -1):
        suffix = tokens[-size:]
        for start in range(len(tokens) - size):
            if tokens[start : start + size] == suffix:
                return tokens[start + size : start + size + count]
    return []


def main() -> None:
    path, threads, context = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    session = Session(path, threads, context)
    print(json.dumps({"ready": llama_cpp.__version__}), flush=True)
    for line in sys.stdin:
        print(json.dumps(session.generate(**json.loads(line))), flush=True)


if __name__ == "__main__":
    main()

"""How large the inputs of each linear layer are over a text, channel by channel: what errors in its weights count.

The output error of a linear layer is sum_i e_i x_i, so with inputs that are uncorrelated its mean square is
sum_i e_i^2 E[x_i^2]: the weight of an error is the mean square of its channel (the diagonal of the Hessian of OBQ:
Frantar & Alistarh, 2022, arXiv:2208.11580; llama.cpp calls it an importance matrix).
"""

import pydoc_data.topics as python_docs
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdec.models.tokenizer import find_tokenizer

TOKENS = 2048
_WINDOW = 512


def calibration_text() -> str:
    """English prose with some code that comes with every Python: its language reference, topics in alphabetical
    order. The odd ones; the even ones are left for measuring (`benchmarks/quality.py`)."""
    return "\n\n".join(python_docs.topics[name] for name in sorted(python_docs.topics)[1::2])


def measure_importance(folder: Path, *, tokens: int = TOKENS) -> dict[str, Tensor]:
    """Mean square of every input channel of every matrix of the layers, by the names of `cpu.weights.tensors_of`.

    Runs the model as transformers does, in float32, over the first `tokens` tokens of `calibration_text`.
    """
    from transformers import AutoModelForCausalLM

    module: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    tokenizer = find_tokenizer(folder, trust_remote_code=False)
    ids = torch.tensor(tokenizer(calibration_text()[: 8 * tokens])["input_ids"][:tokens])
    found: dict[str, Tensor] = {}

    def listen(linear: Any, *names: str) -> None:
        def add(_: Any, inputs: tuple[Tensor, ...]) -> None:
            squares = inputs[0].detach().float().square().flatten(0, -2).sum(0)
            for name in names:
                found[name] = found.get(name, torch.zeros_like(squares)) + squares / len(ids)

        linear.register_forward_pre_hook(add)

    for index, layer in enumerate(module.model.layers):
        name = f"layers.{index}"
        listen(layer.self_attn.q_proj, f"{name}.qkv")
        listen(layer.self_attn.o_proj, f"{name}.out")
        listen(layer.mlp.gate_proj, f"{name}.gate", f"{name}.up")
        listen(layer.mlp.down_proj, f"{name}.down")
    with torch.inference_mode():
        for window in torch.split(ids, _WINDOW):
            module.model(window[None])
    return found

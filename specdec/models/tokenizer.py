"""Tokenizers of model folders, and the tokens that end an answer."""

import json
from pathlib import Path
from typing import Any

from specdec.models.report import ModelError, one_line

_SETTINGS = ("bos_token", "eos_token", "unk_token", "pad_token", "model_max_length", "clean_up_tokenization_spaces")


def read_tokenizer(folder: Path) -> Any:
    """The fast tokenizer that a conversion wrote into `folder`: `tokenizer.json`, its settings and chat template.

    Finding the right class for any folder (`find_tokenizer`) imports most of transformers first; the store knows what
    it wrote and skips that. Raises `ModelError` when a file is missing or damaged.
    """
    from transformers import PreTrainedTokenizerFast

    build: Any = PreTrainedTokenizerFast
    try:
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        template = folder / "chat_template.jinja"
        return build(
            tokenizer_file=str(folder / "tokenizer.json"),
            chat_template=template.read_text(encoding="utf-8") if template.is_file() else None,
            **{name: settings[name] for name in _SETTINGS if name in settings},
        )
    # The tokenizers package raises a bare Exception for a file that it cannot parse.
    except Exception as error:
        raise ModelError(
            f"the tokenizer in {folder} cannot be read ({one_line(error)}); remove the model and fetch it again"
        ) from error


def find_tokenizer(folder: Path, *, trust_remote_code: bool) -> Any:
    """The tokenizer of any Hugging Face model folder; raises `ModelError` when it has none that can be read."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    # Tokenizers of many kinds are built here, each with its own errors for a damaged file, some bare Exceptions.
    except Exception as error:
        raise ModelError(
            f"the tokenizer in {folder} cannot be read ({one_line(error)}); "
            "put the model's tokenizer.json and tokenizer_config.json there"
        ) from error


def end_ids(folder: Path, config: Any, tokenizer: Any) -> tuple[int, ...]:
    """Every token that ends an answer: those of `generation_config.json`, else of the configuration, and the
    tokenizer's own, without repeats."""
    try:
        stated = json.loads((folder / "generation_config.json").read_text(encoding="utf-8")).get("eos_token_id")
    except (OSError, ValueError):
        stated = None
    if stated is None:
        stated = getattr(config, "eos_token_id", None)
    ids = stated if isinstance(stated, list) else [stated]
    return tuple(dict.fromkeys(int(index) for index in (*ids, tokenizer.eos_token_id) if index is not None))

"""The toy target `tabular`: an exact model over printable characters, for tests, demonstrations and dry runs."""

import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specdec.grammar import Entry, number, whole

if TYPE_CHECKING:
    from specdec.models.loading import Loaded

ALPHABET = string.ascii_lowercase + " " + string.ascii_uppercase + string.digits + string.punctuation + "\n"

TOYS: Mapping[str, Entry] = {
    "tabular": Entry(
        "an exact toy model over printable characters",
        {"vocab_size": whole(2), "seed": whole(0), "sharpness": number(0)},
    )
}


class CharacterTokenizer:
    """A token per character of the first `vocab_size - 1` of `ALPHABET`; the last token ends the text."""

    chat_template = None

    def __init__(self, vocab_size: int) -> None:
        if vocab_size > len(ALPHABET) + 1:
            raise ValueError(f"vocab_size of tabular must be at most {len(ALPHABET) + 1}, got {vocab_size}")
        self.alphabet = ALPHABET[: vocab_size - 1]
        self.eos_token_id = vocab_size - 1

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        unknown = sorted(set(text) - set(self.alphabet))
        if unknown:
            raise ValueError(f"the toy model knows no {unknown[0]!r}; its characters are {self.alphabet!r}")
        return {"input_ids": [self.alphabet.index(character) for character in text]}

    def decode(self, ids: Sequence[int], **options: Any) -> str:
        return "".join(self.alphabet[index] for index in ids if index != self.eos_token_id)


def load_toy(options: Mapping[str, Any], *, device: str) -> "Loaded":
    """The toy as a loaded model."""
    from specdec.models.loading import Loaded, choose_device
    from specdec.models.tabular import tabular

    settings = {"vocab_size": len(ALPHABET) + 1, **options}
    tokenizer = CharacterTokenizer(settings["vocab_size"])
    # Its laws are float64, which MPS lacks; a toy gains nothing from an accelerator.
    model = tabular(**settings, device="cpu" if device == "auto" else choose_device(device))
    return Loaded(
        model=model,
        tokenizer=tokenizer,
        eos_ids=(tokenizer.eos_token_id,),
        name="tabular",
        source="toy",
        path=Path(),
        revision=None,
        adapter=model.adapter,
        adapter_reason="the toy has one implementation",
    )

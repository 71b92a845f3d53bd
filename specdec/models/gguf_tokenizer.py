"""The tokenizer that a GGUF file describes, as a `tokenizers` object.

A GGUF file lists tokens, merges and the name of the rule that splits text before merging
(`tokenizer.ggml.pre`), not the rule itself. The rules here are those of the models' own tokenizers. A name that is
not listed is refused: splitting by a different rule still produces text, but not the tokens that the model was
trained on.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from specdec.models.report import ModelError, one_line

_CONTROL, _USER_DEFINED = 3, 4

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


class _Rule(NamedTuple):
    """How text is cut before merging. `split`: a pattern, or `None` for GPT-2's. `digits`: every digit on its own."""

    split: str | None = None
    digits: bool = False
    whole_tokens_first: bool = False
    normalize: bool = False
    bos: bool = False


_RULES = {
    "gpt-2": _Rule(),
    "smollm": _Rule(digits=True),
    "llama-bpe": _Rule(_LLAMA3, whole_tokens_first=True, bos=True),
    "qwen2": _Rule(_QWEN2, normalize=True),
    "deepseek-r1-qwen": _Rule(_QWEN2, normalize=True, bos=True),
}


def byte_level_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """The byte-level BPE tokenizer (`tokenizer.ggml.model` is `gpt2`) of a GGUF file's metadata.

    Control tokens become special tokens and user-defined ones plain added tokens, so neither is ever cut. Raises
    `ModelError` when the splitting rule is unknown or a part is missing.
    """
    name = metadata.get("tokenizer.ggml.pre", "")
    if name not in _RULES:
        raise ModelError(
            f"the GGUF file splits text by the rule {name!r}, which is not known here (known: {', '.join(_RULES)}); "
            "use the model's Hugging Face folder instead"
        )
    rule = _RULES[name]
    tokens, merges = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.merges")
    if not tokens or merges is None:
        raise ModelError("the GGUF file carries no vocabulary; use the model's Hugging Face folder instead")

    vocabulary = {token: index for index, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    # The tokenizers package raises a bare Exception when merges and vocabulary disagree.
    try:
        tokenizer = Tokenizer(BPE(vocabulary, pairs, ignore_merges=rule.whole_tokens_first))
    except Exception as error:
        raise ModelError(f"the GGUF file's vocabulary is not consistent ({one_line(error)}); fetch it again") from error
    if rule.normalize:
        tokenizer.normalizer = normalizers.NFC()
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if rule.digits else []
    if rule.split is not None:
        steps.append(pre_tokenizers.Split(Regex(rule.split), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule.split is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()

    kinds = metadata.get("tokenizer.ggml.token_type") or []
    added = [(token, kind) for token, kind in zip(tokens, kinds, strict=False) if kind in (_CONTROL, _USER_DEFINED)]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token, kind in added if kind == _CONTROL])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token, kind in added if kind == _USER_DEFINED])

    bos = metadata.get("tokenizer.ggml.bos_token_id")
    if bos is not None and metadata.get("tokenizer.ggml.add_bos_token", rule.bos):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]} $A", pair=f"{tokens[bos]} $A {tokens[bos]} $B", special_tokens=[(tokens[bos], bos)]
        )
    return tokenizer


def special_tokens(metadata: Mapping[str, Any]) -> dict[str, str]:
    """The named special tokens: `bos_token`, `eos_token`, `unk_token`, `pad_token`, as far as the file names them."""
    tokens = metadata["tokenizer.ggml.tokens"]
    ids = {
        f"{name}_token": metadata.get(f"tokenizer.ggml.{key}_token_id")
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    return {name: tokens[index] for name, index in ids.items() if index is not None}


def end_tokens(metadata: Mapping[str, Any]) -> list[int]:
    """Every token that ends an answer: the file's end of sequence and end of turn, and turn ends its template uses."""
    tokens, template = metadata["tokenizer.ggml.tokens"], metadata.get("tokenizer.chat_template", "")
    ends = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    turn_ends = [text for text in ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>") if text in template]
    ends += [tokens.index(text) for text in turn_ends if text in tokens]
    return list(dict.fromkeys(end for end in ends if end is not None))

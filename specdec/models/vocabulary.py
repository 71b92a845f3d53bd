"""Bring a draft model to the target's vocabulary, or say why that cannot be done.

A draft model proposes token ids, so the same id must stand for the same string in both models. Checkpoints often pad
their matrices to a round size; the padding stands for no string and may differ.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from specdec.cache import KVCache
from specdec.models.loading import Loaded
from specdec.models.report import ModelError
from specdec.types import Model


def align_vocabulary(draft: Loaded, target: Loaded) -> Model:
    """The draft's model with logits over the target's `vocab_size` tokens.

    Ids past the draft's matrix get -inf, ids past the target's are dropped; the draft's own model is returned when
    the sizes agree. Raises `ModelError` when the tokenizers give an id to different strings.
    """
    check_vocabulary(draft, target)
    if draft.model.vocab_size == target.model.vocab_size:
        return draft.model
    return _resize(draft.model, target.model.vocab_size)


def check_vocabulary(draft: Loaded, target: Loaded) -> None:
    """Raise `ModelError`, naming the first token that differs, unless both tokenizers list the same tokens."""
    ours, theirs = _by_id(draft), _by_id(target)
    first = next((index for index in sorted(ours.keys() | theirs.keys()) if ours.get(index) != theirs.get(index)), None)
    if first is None:
        return
    raise ModelError(
        f"the draft {draft.name!r} and the target {target.name!r} have different vocabularies: token {first} is "
        f"{_quote(ours, first)} in the draft ({len(ours)} tokens) and {_quote(theirs, first)} in the target "
        f"({len(theirs)} tokens); use a draft of the target's family, or a drafter without a model (ngram, suffix)"
    )


def _by_id(loaded: Loaded) -> dict[int, str]:
    return {index: token for token, index in loaded.tokenizer.get_vocab().items()}


def _quote(tokens: Mapping[int, str], index: int) -> str:
    return repr(tokens[index]) if index in tokens else "nothing"


def _resize(model: Model, vocab_size: int) -> Model:
    own_size, early_exit = model.vocab_size, model.early_exit

    def forward(
        cache: KVCache,
        tokens: Tensor,
        depth: Tensor | None = None,
        visible: Tensor | None = None,
        *,
        logits: bool = True,
        features: bool = False,
    ) -> tuple[Tensor | None, Tensor | None, KVCache]:
        # The target may emit an id of its padding, for which the draft has no row; what the draft makes of it only
        # matters to its guesses.
        known = tokens.clamp(max=own_size - 1)
        scores, hidden, cache = model.forward(cache, known, depth, visible, logits=logits, features=features)
        if scores is not None:
            scores = pad(scores[..., :vocab_size], (0, max(0, vocab_size - own_size)), value=-torch.inf)
        return scores, hidden, cache

    resized_exit = None if early_exit is None else lambda layers: _resize(early_exit(layers), vocab_size)
    return model._replace(vocab_size=vocab_size, forward=forward, early_exit=resized_exit)

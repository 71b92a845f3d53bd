from pathlib import Path

import pytest
import torch

from specdec.cache import init_cache
from specdec.models.loading import Loaded
from specdec.models.report import ModelError
from specdec.models.vocabulary import align_vocabulary
from specdec.types import Model


def toy(vocab_size, seen=None):
    """A model whose logits are `100 * position + id`; it records the tokens it is given."""

    def forward(cache, tokens, depth=None, visible=None, *, logits=True, features=False):
        if seen is not None:
            seen.append(tokens)
        rows, n = tokens.shape
        scores = 100.0 * torch.arange(n)[:, None] + torch.arange(vocab_size)
        return (
            scores.expand(rows, n, vocab_size) if logits else None,
            torch.ones(rows, n, 3) if features else None,
            cache,
        )

    return Model(
        name="toy",
        adapter="toy",
        vocab_size=vocab_size,
        max_length=64,
        device=torch.device("cpu"),
        dtype=torch.float32,
        init_cache=lambda rows, capacity: init_cache(torch.zeros(1, rows, capacity, 1, 1)),
        forward=forward,
        num_layers=2,
        early_exit=lambda layers: toy(vocab_size, seen),
    )


def loaded(name, tokenizer, model):
    return Loaded(model, tokenizer, (256,), name, "folder", Path(), None, "toy", "asked for")


def scores_of(model, tokens, **options):
    return model.forward(model.init_cache(1, 8), torch.tensor([tokens]), **options)


def test_equal_vocabularies_keep_the_draft_as_it_is(make_tokenizer):
    draft = loaded("d", make_tokenizer("<end>"), toy(260))
    assert align_vocabulary(draft, loaded("t", make_tokenizer("<end>"), toy(260))) is draft.model


def test_larger_matrix_of_the_draft_is_cut_to_the_targets(make_tokenizer):
    draft = loaded("d", make_tokenizer("<end>"), toy(272))
    model = align_vocabulary(draft, loaded("t", make_tokenizer("<end>"), toy(257)))
    logits, features, _ = scores_of(model, [1, 2], features=True)
    assert model.vocab_size == 257
    assert torch.equal(logits, scores_of(draft.model, [1, 2])[0][..., :257])
    assert features.shape == (1, 2, 3)


def test_smaller_matrix_of_the_draft_never_proposes_the_targets_padding(make_tokenizer):
    seen = []
    draft = loaded("d", make_tokenizer("<end>"), toy(257, seen))
    model = align_vocabulary(draft, loaded("t", make_tokenizer("<end>"), toy(272)))
    logits, _, _ = scores_of(model, [1, 270])
    assert logits.shape == (1, 2, 272)
    assert torch.equal(logits[..., :257], scores_of(draft.model, [1, 2])[0])
    assert (logits[..., 257:] == -torch.inf).all()
    assert seen[0].tolist() == [[1, 256]]


def test_prefill_without_logits_and_early_exit_are_aligned_too(make_tokenizer):
    draft = loaded("d", make_tokenizer("<end>"), toy(257))
    model = align_vocabulary(draft, loaded("t", make_tokenizer("<end>"), toy(272)))
    assert scores_of(model, [1], logits=False)[0] is None
    assert model.early_exit(1).vocab_size == 272
    assert scores_of(model.early_exit(1), [1])[0].shape == (1, 1, 272)


def test_first_token_that_differs_is_named(make_tokenizer):
    draft = loaded("small", make_tokenizer("<end>", extra=("ab",)), toy(258))
    target = loaded("big", make_tokenizer("<end>", extra=("cd",)), toy(258))
    with pytest.raises(ModelError) as caught:
        align_vocabulary(draft, target)
    assert "token 256 is 'ab' in the draft (258 tokens) and 'cd' in the target (258 tokens)" in str(caught.value)
    assert "'small'" in str(caught.value)
    assert "'big'" in str(caught.value)


def test_token_that_only_one_side_has_is_a_difference(make_tokenizer):
    draft = loaded("d", make_tokenizer("<end>"), toy(272))
    target = loaded("t", make_tokenizer("<end>", "<turn>"), toy(272))
    with pytest.raises(ModelError, match="token 257 is nothing in the draft"):
        align_vocabulary(draft, target)

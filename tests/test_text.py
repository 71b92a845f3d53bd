"""Detokenization and stop strings: the text depends on the tokens, never on how rounds cut them."""

import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE

from specdec.controllers import fixed
from specdec.drafters import draft_model, none
from specdec.models.tabular import tabular, tabular_draft
from specdec.policies import lossless
from specdec.sampling import Sampling
from specdec.state import init_state, output_tokens
from specdec.step import build_step
from specdec.text import Piece, TextRule, TextState, build_rule, feed, finish, init_text, iterate_text, text_of
from specdec.types import STOPPED_LENGTH, STOPPED_TEXT, DecodeState

SAMPLE = "Grüße, 日本語 🙂👩‍👩‍👧 and plain text.\n\n" * 3


def fold(rule: TextRule, chunks: Sequence[Sequence[int]], context: Sequence[int] = ()) -> tuple[str, int, list[str]]:
    """The whole text, the number of tokens kept, and the pieces."""
    state, pieces, kept = init_text(rule, context), [], 0
    for chunk in chunks:
        state, piece = feed(state, chunk, rule)
        pieces.append(piece.text)
        kept += piece.kept
    pieces.append(finish(state, rule))
    assert text_of([token for chunk in chunks for token in chunk], rule, context) == "".join(pieces)
    return "".join(pieces), kept, pieces


def cut(tokens: list[int], seed: int) -> list[list[int]]:
    """`tokens` in random chunks, some of them empty."""
    source = random.Random(seed)
    places = [0, *sorted(source.choices(range(len(tokens) + 1), k=len(tokens) // 2)), len(tokens)]
    return [tokens[begin:end] for begin, end in pairwise(places)]


def letters(*stops: str) -> TextRule:
    """Token i is the i-th lower-case letter."""
    return TextRule(lambda ids: "".join(chr(ord("a") + index) for index in ids), stops)


def spell(text: str) -> list[int]:
    return [ord(character) - ord("a") for character in text]


def fallback_tokenizer() -> Any:
    """Llama 2's way: words carry their space in front, the text's first space is dropped, rare characters are bytes."""
    from transformers import PreTrainedTokenizerFast

    tokens = [f"<0x{byte:02X}>" for byte in range(256)] + ["▁Hello", "▁world", "▁"]
    backend = Tokenizer(BPE({token: index for index, token in enumerate(tokens)}, [], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    build: Any = PreTrainedTokenizerFast
    return build(tokenizer_object=backend)


@pytest.mark.parametrize("seed", range(5))
def test_text_does_not_depend_on_rounds(make_tokenizer: Callable[..., Any], seed: int) -> None:
    tokenizer = make_tokenizer("<end>")
    rule = build_rule(tokenizer)
    text, kept, pieces = fold(rule, cut(tokenizer(SAMPLE)["input_ids"], seed))
    assert text == SAMPLE
    assert kept == len(tokenizer(SAMPLE)["input_ids"])
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("seed", range(5))
def test_stop_string_does_not_depend_on_rounds(make_tokenizer: Callable[..., Any], seed: int) -> None:
    tokenizer = make_tokenizer("<end>")
    tokens = tokenizer(SAMPLE)["input_ids"]
    rule = build_rule(tokenizer, stops=["👧 a", "never", "日本人"])
    text, kept, _ = fold(rule, cut(tokens, seed))
    assert text == SAMPLE[: SAMPLE.index("👧 a")]
    assert kept == len(tokenizer(text + "👧 a")["input_ids"])


def test_half_a_character_waits(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer("<end>")
    _, _, pieces = fold(build_rule(tokenizer), [[token] for token in tokenizer("é🙂")["input_ids"]])
    assert pieces == ["", "é", "", "", "", "🙂", ""]


def test_bytes_that_are_no_character_are_shown_at_last(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer("<end>")
    broken = tokenizer("🙂")["input_ids"][:3]
    tokens = [*tokenizer("a")["input_ids"], *broken, *tokenizer("b")["input_ids"], *broken]
    text, _, _ = fold(build_rule(tokenizer), [[token] for token in tokens])
    assert text == tokenizer.decode(tokens) == "a\ufffdb\ufffd"


def test_work_depends_on_the_new_tokens_only(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer("<end>")
    longest = 0

    def decode(ids: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return str(tokenizer.decode(list(ids)))

    rule = TextRule(decode, ("\n\n\n",))
    text, _, _ = fold(rule, [[token] for token in tokenizer(SAMPLE * 10)["input_ids"]])
    assert text == SAMPLE * 10
    assert longest <= 10
    endless = [tokenizer("é")["input_ids"][1]] * 500
    text, _, _ = fold(rule, [[token] for token in endless])
    assert text == "\ufffd" * 500
    assert longest <= 65


def test_special_tokens_without_end_do_not_pile_up(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer("<pad>", "<end>")
    rule = build_rule(tokenizer)
    state = init_text(rule)
    for token in [tokenizer.convert_tokens_to_ids("<pad>")] * 500:
        state, _ = feed(state, [token], rule)
    assert len(state.window) <= 65
    assert feed(state, tokenizer("end")["input_ids"], rule)[1].text == "end"


def test_leading_space_depends_on_the_context() -> None:
    tokenizer = fallback_tokenizer()
    rule = build_rule(tokenizer)
    hello, world = 256, 257
    assert fold(rule, [[hello], [world]])[0] == "Hello world"
    assert fold(rule, [[world], [world]], context=[hello])[0] == " world world"


def test_byte_fallback_shows_whole_characters() -> None:
    tokenizer = fallback_tokenizer()
    tokens = [256, *"日本🙂".encode(), 257]
    text, _, pieces = fold(build_rule(tokenizer), [[token] for token in tokens])
    assert text == tokenizer.decode(tokens) == "Hello日本🙂 world"
    assert not any("\ufffd" in piece for piece in pieces)


def test_special_tokens_are_not_text(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer("<turn>", "<end>")
    turn, end = tokenizer.convert_tokens_to_ids(["<turn>", "<end>"])
    a, b = tokenizer("ab")["input_ids"]
    text, kept, _ = fold(build_rule(tokenizer, stops=["<end>"], hidden=[end]), [[a, turn, b], [end]])
    assert (text, kept) == ("ab", 4)


def test_stop_string_may_begin_in_one_token_and_end_in_another() -> None:
    rule = TextRule(lambda ids: "".join(["one x", "xy t", "wo"][index] for index in ids), ("xxy",))
    state, first = feed(TextState(), [0], rule)
    assert (first, state.held) == (Piece("one ", 1), "x")
    state, second = feed(state, [1, 2], rule)
    assert second == Piece("", 1)
    assert (state.stop, finish(state, rule)) == ("xxy", "")


def test_nothing_follows_a_stop_string() -> None:
    rule = letters("cd")
    state, piece = feed(TextState(), spell("abcdef"), rule)
    assert piece == Piece("ab", 4)
    assert feed(state, spell("gh"), rule) == (state, Piece("", 0))


def test_stop_string_that_is_complete_first_wins() -> None:
    assert fold(letters("bcde", "cd"), [spell("abcdef")])[:2] == ("ab", 4)
    assert fold(letters("cd", "bcd"), [spell("abcdef")])[:2] == ("a", 4)


def test_what_could_be_a_stop_string_waits_and_is_released() -> None:
    _, _, pieces = fold(letters("aab"), [spell("a"), spell("a"), spell("a"), spell("c"), spell("aa")])
    assert pieces == ["", "", "a", "aac", "", "aa"]


def test_empty_stop_string_is_refused(make_tokenizer: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="stop string is empty"):
        build_rule(make_tokenizer("<end>"), stops=["a", ""])


def decode_tabular(rows: int, rule: TextRule, *, k: int, seed: int = 0) -> tuple[DecodeState[Any, Any], list[str]]:
    target = tabular(6, seed=3)
    drafter = none() if k == 0 else draft_model(tabular_draft(target, agreement=0.9), mode="greedy")
    state = init_state(
        [[row % 6] for row in range(rows)],
        model=target,
        drafter=drafter,
        controller=fixed(k),
        max_new_tokens=60,
        seed=[seed + row for row in range(rows)],
    )
    step = build_step(target, drafter, lossless(), fixed(k), sampling=Sampling(temperature=0.0))
    texts = [""] * rows
    for done in iterate_text(step, state, rule):
        texts = [text + piece for text, piece in zip(texts, done.pieces, strict=True)]
        state = done.state
        assert torch.equal(state.cache.length, state.length - 1)
    return state, texts


def test_stop_strings_end_each_row_of_a_batch_where_its_text_ends() -> None:
    free, whole = decode_tabular(4, letters(), k=0)
    assert free.finish.tolist() == [STOPPED_LENGTH] * 4
    # A string that row 0 contains late enough to span several rounds.
    stop = whole[0][20:23]
    for k in (0, 1, 5):
        state, texts = decode_tabular(4, letters(stop), k=k)
        for row, text in enumerate(texts):
            stopped = stop in whole[row]
            expected = whole[row][: whole[row].find(stop)] if stopped else whole[row]
            assert text == expected
            assert int(state.finish[row]) == (STOPPED_TEXT if stopped else STOPPED_LENGTH)
            assert output_tokens(state)[row] == spell(expected + stop if stopped else expected)
            assert int(state.metrics.emitted[row]) == len(output_tokens(state)[row])
        assert int(state.finish[0]) == STOPPED_TEXT


def test_stop_string_at_the_end_of_a_round_ends_the_row() -> None:
    # Without drafts every round ends with the token that completes it.
    _, whole = decode_tabular(1, letters(), k=0)
    state, texts = decode_tabular(1, letters(whole[0][3:5]), k=0)
    assert int(state.finish[0]) == STOPPED_TEXT
    assert texts[0] == whole[0][: whole[0].find(whole[0][3:5])]


def test_held_text_is_shown_when_the_row_ends() -> None:
    _, whole = decode_tabular(1, letters(), k=0)
    _, texts = decode_tabular(1, letters(whole[0][-2:] + "zz"), k=0)
    assert texts == whole

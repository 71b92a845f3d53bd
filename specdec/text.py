"""From committed tokens to text, a few tokens at a time: detokenization that never shows half a character, and stop
strings that may begin in one round and end in another.

Text is a fold: `feed(state, tokens, rule) -> (state, piece)`. The work of a call depends on the new tokens only, and
the text on the tokens only, however they are cut into calls. `iterate_text` folds the rounds of a decoding.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from specdec.state import truncate_state
from specdec.step import any_running
from specdec.types import RUNNING, STOPPED_TEXT, DecodeState, Step, StepInfo

# What a decoder writes for bytes that are no character, or not one yet: one for the whole beginning of a character
# (byte-level tokenizers), or one for each of the bytes around it (byte fallback).
_REPLACEMENT = "\ufffd"
# Invalid bytes could go on for ever. Past so many tokens all but the last three characters of them are shown as they
# are: a beginning of a character is at most three bytes. Three characters are at most twelve tokens.
_MAX_WINDOW, _MAX_INCOMPLETE, _MIN_WINDOW = 64, 3, 12
# Tokens before the text that are looked at.
_CONTEXT = 16


class TextRule(NamedTuple):
    """How tokens become text. `decode(ids)` is the tokenizer's; it must not change text it gave for a beginning of
    `ids`. `stops`: strings that end the text. `hidden`: tokens that are never text (end of sequence)."""

    decode: Callable[[Sequence[int]], str]
    stops: tuple[str, ...] = ()
    hidden: frozenset[int] = frozenset()


class Piece(NamedTuple):
    """What a call adds: `text` to print now, and how many of its tokens are `kept`, the one that completes a stop
    string included."""

    text: str
    kept: int


@dataclasses.dataclass(frozen=True)
class TextState:
    """Where the text stands: the last tokens, and characters that are not certain yet.

    `window`: last tokens; the first `settled` of them are there because decoders treat the beginning of a text
    differently. `shown`: how many characters of the window's text were passed on. `held`: end of the text passed on
    that may be the beginning of a stop string. `stop`: the stop string that ended the text.
    """

    window: tuple[int, ...] = ()
    settled: int = 0
    shown: int = 0
    held: str = ""
    stop: str | None = None


class TextRound(NamedTuple):
    """A round with its text: `pieces[row]` goes behind what the row has printed so far."""

    state: DecodeState[Any, Any]
    info: StepInfo
    pieces: list[str]


def build_rule(tokenizer: Any, *, stops: Sequence[str] = (), hidden: Iterable[int] = ()) -> TextRule:
    """The rule of a Hugging Face tokenizer. Special tokens are not text, so no stop string matches them."""
    if "" in stops:
        raise ValueError("a stop string is empty; it would end the text before it begins")

    def decode(ids: Sequence[int]) -> str:
        text = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)

    return TextRule(decode, tuple(stops), frozenset(hidden))


def init_text(rule: TextRule, context: Sequence[int] = ()) -> TextState:
    """The state before the first token. `context`: the tokens before it, of which the last few are read, so that a
    leading space is kept where the text continues another."""
    visible = [token for token in context[-_CONTEXT:] if token not in rule.hidden]
    for count in range(1, min(len(visible), 8) + 1):
        window = tuple(visible[-count:])
        text = rule.decode(window)
        if text and not text.startswith(_REPLACEMENT):
            return TextState(window, count, len(text) - _uncertain(text))
    return TextState()


def feed(state: TextState, tokens: Sequence[int], rule: TextRule) -> tuple[TextState, Piece]:
    """Append `tokens` to the text. After a stop string nothing is kept."""
    if state.stop is not None:
        return state, Piece("", 0)
    parts: list[str] = []
    # Token by token, so that rounds do not show: neither in the text nor in the place of a stop string.
    for index, token in enumerate(tokens):
        if token in rule.hidden:
            continue
        state, fresh = _append(state, token, rule.decode)
        text, held, stop = _release(state.held + fresh, rule.stops)
        parts.append(text)
        state = dataclasses.replace(state, held=held, stop=stop)
        if stop is not None:
            return state, Piece("".join(parts), index + 1)
    return state, Piece("".join(parts), len(tokens))


def finish(state: TextState, rule: TextRule) -> str:
    """What was held back, when no more tokens follow."""
    if state.stop is not None:
        return ""
    text, held, stop = _release(state.held + rule.decode(state.window)[state.shown :], rule.stops)
    return text if stop is not None else text + held


def text_of(tokens: Sequence[int], rule: TextRule, context: Sequence[int] = ()) -> str:
    """The text that `tokens` add to that of `context`: what `iterate_text` gives piece by piece, at once."""
    state, piece = feed(init_text(rule, context), tokens, rule)
    return piece.text + finish(state, rule)


def iterate_text(step: Step[Any, Any], state: DecodeState[Any, Any], rule: TextRule) -> Iterator[TextRound]:
    """`step.iterate` with text: a stop string ends its row, which keeps the token that completes it as its last.

    `info` tells what the step committed, tokens behind a stop string included; the state is without them.
    """
    texts = [init_text(rule, context) for context in _last_tokens(state)]
    while any_running(state):
        before = state.length
        was_done = state.done.tolist()
        state, info = step(state)
        pieces, kept = [], []
        for row, (tokens, count) in enumerate(zip(info.emitted.tolist(), info.num_emitted.tolist(), strict=True)):
            texts[row], piece = feed(texts[row], tokens[:count], rule)
            pieces.append(piece.text)
            kept.append(piece.kept)
        stopped = [text.stop is not None and not done for text, done in zip(texts, was_done, strict=True)]
        if any(stopped):
            state = truncate_state(state, before + torch.tensor(kept, device=before.device), STOPPED_TEXT)
            # A stop string that ends with the round's last token cuts nothing, and ends its row all the same.
            ended = torch.tensor(stopped, device=before.device)
            state = dataclasses.replace(state, finish=torch.where(ended, STOPPED_TEXT, state.finish))
        for row, (code, done) in enumerate(zip(state.finish.tolist(), was_done, strict=True)):
            if code != RUNNING and not done:
                pieces[row] += finish(texts[row], rule)
        yield TextRound(state, info, pieces)


def _append(state: TextState, token: int, decode: Callable[[Sequence[int]], str]) -> tuple[TextState, str]:
    """One more token, and the characters that are certain now."""
    window = (*state.window, token)
    text = decode(window)
    crowded = len(window) > _MAX_WINDOW
    certain = max(state.shown, len(text) - min(_uncertain(text), _MAX_INCOMPLETE if crowded else len(text)))
    fresh, settled, shown = text[state.shown : certain], state.settled, certain
    tail = window[settled:]
    # Where nothing is pending, the tokens since the last such place are context enough from here on.
    if certain == len(text) and (before := decode(tail)):
        window, settled, shown = tail, len(tail), len(before)
    elif crowded:
        window, settled = window[-_MIN_WINDOW:], 0
        shown = max(0, len(decode(window)) - (len(text) - certain))
    return dataclasses.replace(state, window=window, settled=settled, shown=shown), fresh


def _uncertain(text: str) -> int:
    """Characters at the end that further bytes may still change."""
    return len(text) - len(text.rstrip(_REPLACEMENT))


def _release(text: str, stops: tuple[str, ...]) -> tuple[str, str, str | None]:
    """What may be printed of `text`, what must wait, and the stop string that is complete first."""
    found = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    if found:
        end, _, stop = min(found)
        return text[: end - len(stop)], "", stop
    wait = max((_overlap(text, stop) for stop in stops), default=0)
    return text[: len(text) - wait], text[len(text) - wait :], None


def _overlap(text: str, stop: str) -> int:
    """The longest end of `text` that is a beginning of `stop`, but not all of it."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if stop.startswith(text[-size:])), 0)


def _last_tokens(state: DecodeState[Any, Any]) -> list[list[int]]:
    index = state.length[:, None] - torch.arange(_CONTEXT, 0, -1, device=state.length.device)
    last = state.tokens.gather(1, index.clamp_min(0)).tolist()
    return [row[-length:] for row, length in zip(last, state.length.tolist(), strict=True)]

"""The suffix automaton against a search through the text."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from specdec.drafters.suffix import ESCAPE, NEGLIGIBLE, SuffixAutomaton

texts = st.lists(st.integers(0, 2), min_size=1, max_size=24)


def read(text):
    automaton = SuffixAutomaton()
    for token in text:
        automaton.extend(token)
    return automaton


def ends(text, pattern):
    """The places right behind each occurrence of `pattern`."""
    m = len(pattern)
    return tuple(place + m for place in range(len(text) - m + 1) if text[place : place + m] == pattern)


def longest_match(text, suffix_of):
    """The length of the longest suffix of `suffix_of` that occurs in `text` with something behind it or at its end."""
    return max((m for m in range(len(suffix_of) + 1) if ends(text, suffix_of[len(suffix_of) - m :])), default=0)


def blended(text, suffix, matched):
    """The law after `suffix`, of which the last `matched` tokens occur: longest matches first, by searching."""
    law, left, before = Counter(), 1.0, None
    for m in range(matched, 0, -1):
        places = ends(text, suffix[len(suffix) - m :])
        if places == before:
            continue
        before = places
        if left <= NEGLIGIBLE:
            break
        following = Counter(text[place] for place in places if place < len(text))
        total = sum(following.values())
        if total:
            believed = m / (m + ESCAPE)
            for token, count in following.items():
                law[token] += left * believed * count / total
            left *= 1 - believed
    return law


def same(left, right):
    return set(left) == set(right) and all(abs(left[token] - right[token]) < 1e-12 for token in left)


@given(texts)
def test_the_match_is_the_longest_suffix_that_occurs_earlier(text):
    state, matched = read(text).match()
    earlier = [m for m in range(len(text)) if len(ends(text, text[len(text) - m :])) > 1]
    assert matched == max(earlier)
    assert (state == 0) == (matched == 0)


@given(texts)
def test_the_law_blends_the_matches_from_long_to_short(text):
    automaton = read(text)
    state, matched = automaton.match()
    law = automaton.law(state, matched)
    assert same(law, blended(text, text, matched))
    assert sum(law.values()) < 1


@given(texts, st.lists(st.integers(0, 3), min_size=1, max_size=4))
def test_following_tokens_keeps_the_longest_match(text, drafted):
    automaton = read(text)
    state, matched = automaton.match()
    read_so_far = text[len(text) - matched :]
    for token in drafted:
        state, matched = automaton.follow(state, matched, token)
        read_so_far = [*read_so_far, token]
        assert matched == longest_match(text, read_so_far)
        law = automaton.law(state, matched)
        assert same(law, blended(text, read_so_far, matched))


@given(texts)
def test_short_matches_can_be_left_out(text):
    automaton = read(text)
    state, matched = automaton.match()
    assert automaton.law(state, matched, shortest=matched + 1) == {}

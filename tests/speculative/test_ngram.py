"""Drafting from the text: against a search through the whole of it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from commfuse.errors import UsageError
from commfuse.speculative import NGramDrafter, parse_drafter


def searched(tokens: list[int], draft_length: int, longest: int, shortest: int) -> list[int]:
    """What followed the last earlier occurrence of the longest repeated ending."""
    for size in range(longest, shortest - 1, -1):
        ending = tokens[-size:]
        if len(ending) < size:
            continue
        for end in range(len(tokens) - 1, size - 1, -1):
            if tokens[end - size : end] == ending:
                return tokens[end : end + draft_length]
    return []


@given(
    # Few different tokens, so that they repeat; in pieces, as they are accepted.
    st.lists(st.lists(st.integers(0, 3), max_size=6), max_size=12),
    st.integers(0, 7),
    st.integers(1, 3),
    st.integers(0, 3),
)
def test_against_a_search(pieces, draft_length, shortest, more):
    longest = shortest + more
    drafter, text = NGramDrafter(draft_length, longest, shortest), []
    for piece in pieces:
        drafter.extend(piece)
        text += piece
        assert drafter.propose() == searched(text, draft_length, longest, shortest)
    assert drafter.tokens == text


@given(st.lists(st.integers(0, 2), max_size=40), st.integers(0, 8))
def test_no_more_than_asked(tokens, most):
    drafter = NGramDrafter(5)
    drafter.extend(tokens)
    assert drafter.propose(most) == drafter.propose()[:most]


def test_nothing_to_go_by():
    drafter = NGramDrafter(5)
    assert drafter.propose() == []
    drafter.extend([1])
    assert drafter.propose() == []
    drafter.extend([2, 3, 4])
    assert drafter.propose() == []


def test_the_longest_ending_counts_then_the_latest():
    drafter = NGramDrafter(1)
    drafter.extend([1, 2, 3, 10, 9, 2, 3, 11, 1, 2, 3])
    assert drafter.propose() == [10]  # "1 2 3" outweighs the later "2 3"
    drafter.extend([12, 8, 2, 3])
    assert drafter.propose() == [12]


@pytest.mark.parametrize(
    ("text", "length"), [("off", None), ("ngram", 5), ("ngram:1", 1), ("ngram:12", 12)]
)
def test_names(text, length):
    assert parse_drafter(text) == length


@pytest.mark.parametrize(
    "text", ["", "on", "ngram:", "ngram:0", "ngram:-1", "ngram:x", "ngram: 3", "ngrams", "off:1"]
)
def test_what_is_no_drafter(text):
    with pytest.raises(UsageError, match="use off, ngram or ngram:K"):
        parse_drafter(text)

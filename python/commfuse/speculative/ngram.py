"""Drafts from the text itself: what followed the last few tokens when they stood there before."""

from __future__ import annotations

from commfuse.errors import UsageError

DEFAULT_DRAFT_LENGTH = 5  # with the token before it, the six rows of one GEMM tile


class NGramDrafter:
    """Prompt lookup decoding (Saxena, 2023) for one sequence.

    It keeps, for every n-gram of the sequence with ``shortest`` to ``longest`` tokens, where it
    last ended. A draft is what followed the longest n-gram that ends the sequence and stood in it
    before. Proposing costs a few dictionary look-ups, whatever the length of the text.

    Args:
        draft_length: the most tokens to propose.
        longest, shortest: sizes of n-grams to look up.

    Example:
        >>> drafter = NGramDrafter(draft_length=2)
        >>> drafter.extend([7, 8, 9, 5, 7, 8])
        >>> drafter.propose()
        [9, 5]
    """

    def __init__(self, draft_length: int, longest: int = 4, shortest: int = 2):
        self.draft_length = draft_length
        self.sizes = range(longest, shortest - 1, -1)
        self.tokens: list[int] = []
        self._followers: dict[tuple[int, ...], int] = {}

    def extend(self, tokens: list[int]) -> None:
        """Appends tokens to the sequence."""
        for token in tokens:
            # Only now do the n-grams that end before this token have a follower.
            end = len(self.tokens)
            for size in self.sizes:
                if end >= size:
                    self._followers[tuple(self.tokens[end - size :])] = end
            self.tokens.append(token)

    def propose(self, most: int | None = None) -> list[int]:
        """At most ``draft_length`` (and ``most``) tokens that may come next; often none."""
        length = self.draft_length if most is None else min(self.draft_length, most)
        for size in self.sizes:
            begin = self._followers.get(tuple(self.tokens[-size:]))
            if begin is not None:
                return self.tokens[begin : begin + length]
        return []


def parse_drafter(text: str) -> int | None:
    """The draft length of ``off``, ``ngram`` or ``ngram:K``; None for off.

    Raises:
        UsageError: anything else.

    Example:
        >>> parse_drafter("ngram:8")
        8
    """
    if text == "off":
        return None
    kind, colon, length = text.partition(":")
    if kind == "ngram" and not colon:
        return DEFAULT_DRAFT_LENGTH
    if kind == "ngram" and length.isdecimal() and int(length) > 0:
        return int(length)
    raise UsageError(f"unknown speculation {text!r}: use off, ngram or ngram:K with K >= 1")

"""Drafting: guesses at the next tokens, which the model then verifies in one pass."""

from commfuse.speculative.ngram import NGramDrafter, parse_drafter

__all__ = ["NGramDrafter", "parse_drafter"]

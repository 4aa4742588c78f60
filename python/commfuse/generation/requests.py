"""Prompts on their way, and the passes in which their tokens go through the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from commfuse.speculative import NGramDrafter


@dataclass
class Request:
    """One prompt on its way.

    Attributes:
        index: its place in the batch, and its sequence in the cache.
        tokens: the prompt and what has been generated; all but the last are in the cache.
        limit: the most tokens that may be generated.
    """

    index: int
    tokens: list[int]
    limit: int
    drafter: NGramDrafter | None
    output: list[int] = field(default_factory=list)
    log_probabilities: list[float] = field(default_factory=list)
    done: bool = False

    def draft(self) -> list[int]:
        """Tokens to verify: no more than could still be output, less the one that comes anyway."""
        if self.drafter is None:
            return []
        return self.drafter.propose(self.limit - len(self.output) - 1)

    def accept(
        self, tokens: Sequence[int], logs: Sequence[float], stop_ids: frozenset[int]
    ) -> list[int]:
        """Takes tokens up to a stop token or the limit; returns those taken."""
        taken: list[int] = []
        for token in tokens:
            taken.append(token)
            if token in stop_ids or len(self.output) + len(taken) >= self.limit:
                self.done = True
                break
        self.tokens += taken
        self.output += taken
        self.log_probabilities += logs[: len(taken)]
        if self.drafter is not None:
            self.drafter.extend(taken)
        return taken


@dataclass(frozen=True)
class Pass:
    """Runs of tokens that go through the stages together, and whose tokens are drawn together.

    Attributes:
        runs: (sequence, first position, tokens) each.
        requests: that get new tokens from it: those whose last known token it contains.
        drafts: of each of them, the tokens to verify; None in the prefill, which has none.
    """

    runs: list[tuple[int, int, Sequence[int]]]
    requests: list[Request]
    drafts: list[list[int]] | None = None

    @property
    def rows(self) -> int:
        """Tokens in it."""
        return sum(len(run) for _, _, run in self.runs)

    @property
    def longest(self) -> int:
        """Tokens of its longest draft."""
        return max(map(len, self.drafts or []), default=0)

    @property
    def results(self) -> int:
        """Rows of results that it yields, as many for each request."""
        return len(self.requests) * (1 + self.longest)

"""What a generation cost, and where its time went."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from commfuse.runtime.communicator import Communicator, Statistics


@dataclass
class GenerationStatistics:
    """Counters of one call of :meth:`Generator.generate`, of one rank.

    "Token" means a token of the output. The prefill, which yields the first token of every
    request, is in ``ttft_seconds`` alone; everything else is about the decoding steps behind it.

    Attributes:
        ttft_seconds: from the call to the first token of every request.
        decode_seconds: from there to the last token.
        steps: decoding steps: forward passes, each over all unfinished requests.
        decode_tokens: tokens that these steps yielded.
        request_steps: requests served, summed over the steps.
        communication_seconds: time in communication during decoding.
        collective_calls: collective calls during decoding.
        bytes_sent: bytes that this rank sent during decoding.
    """

    ttft_seconds: float = 0.0
    decode_seconds: float = 0.0
    steps: int = 0
    decode_tokens: int = 0
    request_steps: int = 0
    communication_seconds: float = 0.0
    collective_calls: int = 0
    bytes_sent: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Output tokens of all requests per second of decoding."""
        return self.decode_tokens / self.decode_seconds if self.decode_tokens else 0.0

    @property
    def accepted_per_step(self) -> float:
        """Tokens that a request gains in a step: 1 without speculation, up to 1 + draft length."""
        return self.decode_tokens / self.request_steps if self.request_steps else 0.0

    def per_token(self, amount: float) -> float:
        """``amount`` over the decoded tokens."""
        return amount / self.decode_tokens if self.decode_tokens else 0.0

    @property
    def communication_ms_per_token(self) -> float:
        """Milliseconds of communication for each token."""
        return self.per_token(self.communication_seconds) * 1e3

    @property
    def compute_ms_per_token(self) -> float:
        """Milliseconds of everything else for each token."""
        return self.per_token(self.decode_seconds - self.communication_seconds) * 1e3


@dataclass
class Stopwatch:
    """Fills a :class:`GenerationStatistics` from the clock and a communicator's counters."""

    comm: Communicator
    statistics: GenerationStatistics = field(default_factory=GenerationStatistics)
    _begin: float = field(default_factory=time.perf_counter)
    _before: Statistics = field(default_factory=Statistics)

    def first_tokens(self) -> None:
        """The prefill is over."""
        now = time.perf_counter()
        self.statistics.ttft_seconds = now - self._begin
        self._begin, self._before = now, self.comm.statistics()

    def step(self, tokens: int, requests: int) -> None:
        """A decoding step has yielded ``tokens`` for ``requests`` requests."""
        self.statistics.steps += 1
        self.statistics.decode_tokens += tokens
        self.statistics.request_steps += requests

    def stop(self) -> GenerationStatistics:
        """The last token is there."""
        after, result = self.comm.statistics(), self.statistics
        result.decode_seconds = time.perf_counter() - self._begin
        result.communication_seconds = (
            after.communication_seconds - self._before.communication_seconds
        )
        result.collective_calls = after.calls - self._before.calls
        result.bytes_sent = after.bytes_sent - self._before.bytes_sent
        return result

"""What a generation cost, and where its time went."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from commfuse.generation.pipeline import Pipeline
from commfuse.runtime.communicator import Communicator, Statistics


@dataclass
class GenerationStatistics:
    """Counters of one call of :meth:`Generator.generate`, of one rank.

    "Token" means a token of the output. The prefill, which yields the first token of every
    request, is in ``ttft_seconds`` alone; everything else is about the decoding steps behind it.

    Attributes:
        ttft_seconds: from the call to the first token of every request.
        decode_seconds: from there to the last token.
        steps: decoding steps: forward passes, each over all unfinished requests of a group.
        decode_tokens: tokens that these steps yielded.
        request_steps: requests served, summed over the steps.
        groups: of requests, whose steps take turns; one without pipeline stages.
        prefill_passes: forward passes of the prefill.
        prefill_idle: part of the prefill that each stage has waited for others, or for its turn.
        decode_idle: the same of decoding.
        communication_seconds: time in communication during decoding, between stages too; None on a
            GPU, whose kernels communicate while they compute.
        collective_calls: collective calls during decoding; None on a GPU, where graphs make them.
        bytes_sent: bytes that this rank sent during decoding; None on a GPU.
    """

    ttft_seconds: float = 0.0
    decode_seconds: float = 0.0
    steps: int = 0
    decode_tokens: int = 0
    request_steps: int = 0
    groups: int = 1
    prefill_passes: int = 0
    prefill_idle: list[float] = field(default_factory=list)
    decode_idle: list[float] = field(default_factory=list)
    communication_seconds: float | None = 0.0
    collective_calls: int | None = 0
    bytes_sent: int | None = 0

    @property
    def tokens_per_second(self) -> float:
        """Output tokens of all requests per second of decoding."""
        return self.decode_tokens / self.decode_seconds if self.decode_tokens else 0.0

    @property
    def accepted_per_step(self) -> float:
        """Tokens that a request gains in a step: 1 without speculation, up to 1 + draft length."""
        return self.decode_tokens / self.request_steps if self.request_steps else 0.0

    def per_token(self, amount: float | None) -> float | None:
        """``amount`` over the decoded tokens; None for None."""
        if amount is None:
            return None
        return amount / self.decode_tokens if self.decode_tokens else 0.0

    @property
    def communication_ms_per_token(self) -> float | None:
        """Milliseconds of communication for each token; None on a GPU."""
        if self.communication_seconds is None:
            return None
        return self.per_token(self.communication_seconds) * 1e3

    @property
    def compute_ms_per_token(self) -> float | None:
        """Milliseconds of everything else for each token; None on a GPU."""
        if self.communication_seconds is None:
            return None
        return self.per_token(self.decode_seconds - self.communication_seconds) * 1e3


def bubble(stages: int, passes: int) -> float:
    """Part of the time that each of equal stages waits while ``passes`` go through all of them.

    Example:
        >>> bubble(stages=2, passes=1), bubble(stages=2, passes=4)
        (0.5, 0.2)
    """
    return (stages - 1) / (passes + stages - 1)


@dataclass
class Stopwatch:
    """Fills a :class:`GenerationStatistics` from the clock and the counters of communicators.

    Attributes:
        comm: of this stage.
        pipeline: between the stages.
    """

    comm: Communicator
    pipeline: Pipeline
    statistics: GenerationStatistics = field(default_factory=GenerationStatistics)
    _begin: float = field(default_factory=time.perf_counter)
    _before: list[Statistics] = field(default_factory=list)
    _idle: list[float] = field(default_factory=list)  # of the prefill and of decoding
    _waited: float = field(init=False)

    def __post_init__(self) -> None:
        self._waited = self.pipeline.idle_seconds()

    def _counters(self) -> list[Statistics]:
        comms = [self.comm, self.pipeline.comm]
        return [comm.statistics() for comm in comms if comm is not None]

    def _lap(self) -> float:
        """Seconds since the last one."""
        begin, self._begin = self._begin, time.perf_counter()
        waited, self._waited = self._waited, self.pipeline.idle_seconds()
        seconds = self._begin - begin
        self._idle.append((self._waited - waited) / seconds)
        return seconds

    def first_tokens(self) -> None:
        """The prefill is over."""
        self.statistics.ttft_seconds = self._lap()
        self._before = self._counters()

    def step(self, tokens: int, requests: int) -> None:
        """A decoding step has yielded ``tokens`` for ``requests`` requests."""
        self.statistics.steps += 1
        self.statistics.decode_tokens += tokens
        self.statistics.request_steps += requests

    def stop(self) -> GenerationStatistics:
        """The last token is there."""
        result = self.statistics
        result.decode_seconds = self._lap()
        result.prefill_idle, result.decode_idle = map(
            list, zip(*self.pipeline.gather(self._idle), strict=True)
        )
        if self.comm.device.type == "cuda":
            result.communication_seconds = result.collective_calls = result.bytes_sent = None
            return result
        pairs = list(zip(self._counters(), self._before, strict=True))
        result.communication_seconds = sum(
            after.communication_seconds - before.communication_seconds for after, before in pairs
        )
        result.collective_calls = pairs[0][0].calls - pairs[0][1].calls
        result.bytes_sent = sum(after.bytes_sent - before.bytes_sent for after, before in pairs)
        return result

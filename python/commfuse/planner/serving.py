"""From steps to what a user sees: time to the first token, time per token, tokens per second.

* TTFT: from a request's arrival to its first token, queueing included, on average.
* TPOT: (time of the last token - time of the first) / (output tokens - 1), on average over
  requests: prefills of other requests in between are included.
* Throughput: output tokens of all requests per second while there is always a next request.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from commfuse.planner import pipeline
from commfuse.planner.layout import Layout
from commfuse.planner.memory import Memory, memory_of
from commfuse.planner.speculation import Speculation, best_speculation
from commfuse.planner.step import Setting, Terms

MIXED, PREFILL_FIRST = "mixed", "prefill-first"
_PREFILL_BATCH = 16384  # tokens that an engine which prefills first takes at once


@dataclass(frozen=True)
class Work:
    """What is asked of the machine.

    Attributes:
        prompt, output: tokens of a request.
        policy: ``mixed``: prompts are computed in steps with decoding requests; ``prefill-first``:
            all waiting prompts first.
    """

    prompt: int
    output: int
    policy: str = MIXED

    @property
    def tokens(self) -> int:
        """Of a request at its end."""
        return self.prompt + self.output

    @property
    def context(self) -> float:
        """Tokens that a decoding request has in its cache, on average."""
        return self.prompt + self.output / 2


@dataclass(frozen=True)
class Service:
    """A layout at work.

    Attributes:
        requests: in flight.
        running: of them, those that the KV cache has room for; the others wait.
        ttft, tpot: seconds.
        throughput: output tokens/s of all requests.
        per_token: where TPOT goes; sums to it.
        first_token: where TTFT goes, but for waiting.
        memory: of the fullest device.
        groups, idle: of the stages in decoding, see :class:`commfuse.planner.pipeline.Pass`.
        speculation: None where it was not asked for or does not pay.
    """

    requests: int
    running: float
    ttft: float
    tpot: float
    throughput: float
    per_token: Terms
    first_token: Terms
    memory: Memory
    groups: int
    idle: float
    speculation: Speculation | None = None


def serve(
    setting: Setting,
    layout: Layout,
    work: Work,
    requests: int,
    chunk: int,
    acceptance: Speculation.Acceptance | None = None,
) -> Service:
    """What ``requests`` in flight on one replica see; it must have room for at least one.

    Args:
        setting, layout, work: what runs where; the layout's replicas do not matter.
        requests: in flight.
        chunk: tokens of a prompt that are computed at once, at most.
        acceptance: of speculation; None: plain decoding.
    """
    layout, device = layout.single, setting.cluster.device
    memory = memory_of(setting.model, device, layout, setting.precision, chunk)
    running = min(requests, max(1, memory.requests(work.tokens)))
    prompt = pipeline.prefill(setting, layout, work.prompt, chunk)
    step = pipeline.decode(setting, layout, running, work.context)
    terms, speculation = step.terms, None
    if acceptance is not None:
        speculation = best_speculation(setting, layout, running, work.context, acceptance)
        if speculation is not None:
            terms = speculation.per_token
    calibration = setting.calibration
    if work.policy == PREFILL_FIRST:
        batches = max(1, math.ceil(running * work.prompt / _PREFILL_BATCH))
        batch = running / batches * prompt.occupied
        interference = (batches - 1) / 2 * batch / work.output
        waiting = (batches + 1) / 2 * batch - prompt.seconds
    else:
        others = max(0.0, running - 1)
        interference = others * prompt.occupied / work.output
        waiting = min(1.0, others) * (step.seconds + prompt.occupied / 2)
        waiting += others * calibration.queue * prompt.occupied
    per_token = terms + Terms(prefill=interference)
    ttft = calibration.arrival + prompt.seconds + max(0.0, waiting)
    if requests > running:
        # They wait for a running request to end; half of them from the beginning on average.
        lifetime = ttft + work.output * per_token.total
        ttft += (requests - running) / running * lifetime / 2
    busy = calibration.arrival + work.output * terms.total + running * prompt.occupied
    return Service(
        requests=requests,
        running=running,
        ttft=ttft,
        tpot=per_token.total,
        throughput=running * work.output / busy * _load(running, calibration.load),
        per_token=per_token,
        first_token=prompt.terms,
        memory=memory,
        groups=step.groups,
        idle=step.idle,
        speculation=speculation,
    )


def _load(running: float, full: float) -> float:
    """Of the time, what is used: all of it by one request, ``full`` by many."""
    return full + (1 - full) / running

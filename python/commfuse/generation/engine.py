"""Generation for a ragged batch, greedy or sampled, with or without speculation or stages."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from commfuse.errors import UsageError
from commfuse.generation.pipeline import Pipeline
from commfuse.generation.requests import Pass, Request
from commfuse.generation.statistics import GenerationStatistics, Stopwatch
from commfuse.generation.steps import Steps, check_device
from commfuse.models.llama import Llama
from commfuse.nn.sharding import split
from commfuse.ops import Sampling
from commfuse.speculative import NGramDrafter

PREFILL_ROWS = 512  # the most tokens of prompts in one forward pass
# With stages, prompts are cut into as many passes a stage, unless they would become so small that
# the weights are read too often.
PASSES_PER_STAGE, FEWEST_ROWS = 4, 32


class Generation(NamedTuple):
    """The result of :meth:`Generator.generate`.

    Attributes:
        outputs: token ids of each prompt.
        statistics: of this rank.
        log_probabilities: of the output's tokens, natural logarithms under softmax(logits), before
            temperature, top-k and top-p; None where they were not asked for.
    """

    outputs: list[list[int]]
    statistics: GenerationStatistics
    log_probabilities: list[list[float]] | None


class Generator:
    """Generates text with one model on its ranks. Every rank makes the same calls.

    All decisions are taken from numbers that are bitwise equal on all ranks, so that the ranks
    cannot diverge. A request's tokens do not depend on what else is in the batch, nor on
    speculation: a row's bits do not depend on the rows beside it, and what is drawn is a function
    of the request's seed, the token's position and the row.

    With pipeline stages, the prompts' passes follow each other through the stages, and requests
    decode in groups that take turns, so that every stage has work while a group is elsewhere.

    On a GPU decoding steps are CUDA graphs, padded to a few numbers of requests; the cache stays
    between generations, and grows when a larger one is needed.

    Args:
        model: this rank's part.
        pipeline: between the stages; None: there is one.
        static: whether decoding steps are padded and the cache is kept, as on a GPU; None: there
            alone. Changes no token.
        graphs: whether decoding steps become CUDA graphs; None: on a GPU.

    Raises:
        UsageError: graphs on the CPU or between stages; a GPU that our kernels do not serve.

    Example:
        >>> result = Generator(model).generate([prompt_ids], max_new_tokens=64)
        >>> result.outputs, result.statistics.tokens_per_second
    """

    def __init__(
        self,
        model: Llama,
        pipeline: Pipeline | None = None,
        *,
        static: bool | None = None,
        graphs: bool | None = None,
    ):
        check_device(model)
        on_gpu = model.comm.device.type == "cuda"
        self.model = model
        self.comm = model.comm
        self.pipeline = pipeline or Pipeline(model, rows=PREFILL_ROWS)
        if graphs and not on_gpu:
            raise UsageError("graphs=True: CUDA graphs need a model on a GPU")
        if static is False and on_gpu:
            raise UsageError("static=False: on a GPU decoding steps are padded")
        if static and model.stage.count > 1:
            raise UsageError("static=True: between pipeline stages steps have their own sizes")
        self.steps = Steps(
            model,
            self.pipeline.source,
            self.pipeline.target,
            static=on_gpu if static is None else static,
            graphs=on_gpu if graphs is None else graphs,
        )

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        stop_ids: Sequence[int] = (),
        draft_length: int | None = None,
        sampling: Sampling | None = None,
        log_probabilities: bool = False,
        on_tokens: Callable[[int, list[int]], None] | None = None,
        on_span: Callable[[str, int, int], None] | None = None,
    ) -> Generation:
        """Continues every prompt.

        Args:
            prompts: token ids of each.
            max_new_tokens: per prompt, at least 1; less where the model's context ends.
            stop_ids: a request ends with the first of these, which is part of its output.
            draft_length: speculate with n-grams of the text, at most that many tokens at a time;
                None: do not.
            sampling: how to draw each prompt's tokens; None: take the most probable ones.
            log_probabilities: return those of the output too.
            on_tokens: called with (prompt, new tokens) as they come.
            on_span: called with (what, begin, end), ``time.monotonic_ns()``, of all that this rank
                does: ``prefill`` and ``decode`` are its parts of passes, ``tokens`` is the taking
                of new tokens, which it may have to wait for.

        Raises:
            UsageError: an empty prompt, or one that fills the context; options for another number
                of prompts; more drafts than fit a message between stages.
            CommunicatorError: a rank failed; see :mod:`commfuse.errors`.

        After an exception a model in one stage can generate again, if all its ranks raised it; one
        in several stages cannot, since messages between them are still under way.
        """
        requests = self._requests(prompts, max_new_tokens, draft_length)
        if sampling is None:
            sampling = Sampling.of(len(requests))
        if len(sampling) != len(requests):
            raise UsageError(
                f"sampling has options for {len(sampling)} requests, not {len(requests)}"
            )
        groups = self._groups(requests, draft_length or 0)
        longest = max(len(r.tokens) + r.limit for r in requests)
        with self.steps.stream():
            self.steps.begin(longest, sampling, draft_length or 0, log_probabilities)
            try:
                statistics = self._continue(groups, frozenset(stop_ids), on_tokens, on_span)
            except BaseException:
                self.pipeline.abandon()
                raise
        return Generation(
            [request.output for request in requests],
            statistics,
            [request.log_probabilities for request in requests] if log_probabilities else None,
        )

    def _continue(
        self,
        groups: list[list[Request]],
        stop_ids: frozenset[int],
        on_tokens: Callable[[int, list[int]], None] | None,
        on_span: Callable[[str, int, int], None] | None,
    ) -> GenerationStatistics:
        """Gives all requests their output."""
        watch = Stopwatch(self.comm, self.pipeline)
        passes = list(self._prefill_passes([request for group in groups for request in group]))
        watch.statistics.groups, watch.statistics.prefill_passes = len(groups), len(passes)

        def timed(what: str, call: Callable[..., Any], *arguments: Any) -> Any:
            begin = time.monotonic_ns()
            found = call(*arguments)
            if on_span is not None:
                on_span(what, begin, time.monotonic_ns())
            return found

        def finish(done: Pass) -> int:
            """Gives the requests of a pass their new tokens; how many."""
            count = 0
            for request, (tokens, logs) in zip(
                done.requests, timed("tokens", self._collect, done, bool(under_way)), strict=True
            ):
                taken = request.accept(tokens, logs, stop_ids)
                count += len(taken)
                if on_tokens is not None:
                    on_tokens(request.index, taken)
            return count

        under_way: deque[Pass] = deque()
        self.pipeline.expect(passes[0].rows)
        for next_pass, after in zip(passes, [*passes[1:], None], strict=True):
            if after is not None:
                self.pipeline.expect(after.rows)
            if len(under_way) == self.pipeline.passes:
                finish(under_way.popleft())
            timed("prefill", self._start, next_pass)
            under_way.append(next_pass)
        while under_way:
            finish(under_way.popleft())
        watch.first_tokens()

        ready = deque(groups)
        while ready or under_way:
            if ready and len(under_way) < self.pipeline.passes:
                active = [request for request in ready.popleft() if not request.done]
                if active:
                    under_way.append(self._decode_pass(active))
                    timed("decode", self._start, under_way[-1])
                continue
            done = under_way.popleft()
            watch.step(finish(done), len(done.requests))
            ready.append(done.requests)
        return watch.stop()

    def _groups(self, requests: list[Request], draft_length: int) -> list[list[Request]]:
        """One of all requests; with stages, as many, and none that outgrows a message."""
        stages = self.model.stage.count
        if stages == 1:
            return [requests]
        fit = self.pipeline.rows // (1 + draft_length)
        if not fit:
            raise UsageError(
                f"{draft_length} draft tokens a step: a pass between stages takes "
                f"{self.pipeline.rows} rows, so use at most {self.pipeline.rows - 1}"
            )
        count = max(min(stages, len(requests)), -(-len(requests) // fit))
        spans = [split(len(requests), count, index) for index in range(count)]
        return [requests[span.begin : span.end] for span in spans]

    def _requests(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, draft_length: int | None
    ) -> list[Request]:
        context, vocabulary = (
            self.model.config.max_position_embeddings,
            self.model.config.vocab_size,
        )
        if not prompts:
            raise UsageError("there is no prompt")
        if max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
        requests = []
        for index, prompt in enumerate(prompts):
            if not prompt:
                raise UsageError(f"prompt {index} is empty")
            if len(prompt) >= context:
                raise UsageError(
                    f"prompt {index} has {len(prompt)} tokens and the model's context {context}: "
                    f"use at most {context - 1}"
                )
            if not 0 <= min(prompt) <= max(prompt) < vocabulary:
                raise UsageError(
                    f"prompt {index} has token ids outside the vocabulary of {vocabulary}"
                )
            drafter = None
            if draft_length is not None:
                drafter = NGramDrafter(draft_length)
                drafter.extend(list(prompt))
            limit = min(max_new_tokens, context - len(prompt))
            requests.append(Request(index, list(prompt), limit, drafter))
        return requests

    def _start(self, next_pass: Pass) -> None:
        """This stage's part of a pass; the last stage draws its tokens."""
        self.comm.check_host()
        results = self.steps.start(next_pass)
        if results is not None:
            self.pipeline.publish(results.flatten(0, 1))

    def _collect(self, done: Pass, more: bool) -> list[tuple[list[int], list[float]]]:
        """(new tokens, their log-probabilities) of each request of a pass, one at least.

        Args:
            done: the oldest pass under way.
            more: whether others are, for whose end a GPU is not waited for.
        """
        if not done.results:
            return []
        results = self.pipeline.collect(done.results)
        self.steps.wait()
        # On a failure, what has come from a GPU is no token.
        self.comm.check_host()
        tokens, accepted = results[:, 0].tolist(), results[:, 1].tolist()
        # All ranks see that a row has no token, and must find it at the same pass.
        if not more or -1 in tokens:
            self.comm.check()
        logs = results[:, 2].contiguous().view(torch.float64).tolist()
        each = len(results) // len(done.requests)
        begins = range(0, len(results), each)
        ends = (begin + accepted[begin] + 1 for begin in begins)
        return [
            (tokens[begin:end], logs[begin:end]) for begin, end in zip(begins, ends, strict=True)
        ]

    def _prefill_passes(self, requests: Sequence[Request]) -> Iterator[Pass]:
        """All prompts, in passes of a bounded number of tokens."""
        most, stages = PREFILL_ROWS, self.model.stage.count
        if stages > 1:
            tokens = sum(len(request.tokens) for request in requests)
            even = -(-tokens // (PASSES_PER_STAGE * stages))
            most = min(most, self.pipeline.rows, max(FEWEST_ROWS, even))
        runs: list[tuple[int, int, Sequence[int]]] = []
        ends: list[Request] = []
        filled = 0
        for request in requests:
            first, length = 0, len(request.tokens)
            while first < length:
                count = min(most - filled, length - first)
                runs.append((request.index, first, request.tokens[first : first + count]))
                first, filled = first + count, filled + count
                if first == length:
                    ends.append(request)
                if filled == most:
                    yield Pass(runs, ends)
                    runs, ends, filled = [], [], 0
        if runs:
            yield Pass(runs, ends)

    def _decode_pass(self, active: list[Request]) -> Pass:
        """The last token of every active request, and its drafts."""
        drafts = [request.draft() for request in active]
        runs = [
            (request.index, len(request.tokens) - 1, [request.tokens[-1], *draft])
            for request, draft in zip(active, drafts, strict=True)
        ]
        return Pass(runs, active, drafts)

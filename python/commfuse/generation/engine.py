"""Generation for a ragged batch, greedy or sampled, with or without speculation or stages."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from commfuse import ops
from commfuse.errors import UsageError
from commfuse.generation.pipeline import Pipeline
from commfuse.generation.statistics import GenerationStatistics, Stopwatch
from commfuse.models.llama import Llama
from commfuse.nn import KVCache
from commfuse.nn.sharding import split
from commfuse.ops import Placement, Sampling
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


@dataclass
class _Request:
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
class _Options:
    """What holds for a whole generation.

    Attributes:
        cache, rotary: of this rank.
        sampling: how each request's tokens are drawn.
        log_probabilities: whether they are wanted.
    """

    cache: KVCache
    rotary: tuple[torch.Tensor, torch.Tensor]
    sampling: Sampling
    log_probabilities: bool


@dataclass(frozen=True)
class _Pass:
    """Runs of tokens that go through the stages together, and whose tokens are drawn together.

    Attributes:
        runs: (sequence, first position, tokens) each.
        requests: that get new tokens from it: those whose last known token it contains.
        drafts: of each of them, the tokens to verify; None in the prefill, which has none.
    """

    runs: list[tuple[int, int, Sequence[int]]]
    requests: list[_Request]
    drafts: list[list[int]] | None = None

    @property
    def rows(self) -> int:
        """Tokens in it."""
        return sum(len(run) for _, _, run in self.runs)

    @property
    def results(self) -> int:
        """Rows of logits that it yields."""
        return len(self.requests) + sum(map(len, self.drafts or []))


class Generator:
    """Generates text with one model on its ranks. Every rank makes the same calls.

    All decisions are taken from numbers that are bitwise equal on all ranks, so that the ranks
    cannot diverge. A request's tokens do not depend on what else is in the batch, nor on
    speculation: a row's bits do not depend on the rows beside it, and what is drawn is a function
    of the request's seed, the token's position and the row.

    With pipeline stages, the prompts' passes follow each other through the stages, and requests
    decode in groups that take turns, so that every stage has work while a group is elsewhere.

    Args:
        model: this rank's part.
        pipeline: between the stages; None: there is one.

    Example:
        >>> result = Generator(model).generate([prompt_ids], max_new_tokens=64)
        >>> result.outputs, result.statistics.tokens_per_second
    """

    def __init__(self, model: Llama, pipeline: Pipeline | None = None):
        self.model = model
        self.comm = model.comm
        self.pipeline = pipeline or Pipeline(model, rows=PREFILL_ROWS)

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
        """
        requests = self._requests(prompts, max_new_tokens, draft_length)
        if sampling is None:
            sampling = Sampling.of(len(requests))
        if len(sampling) != len(requests):
            raise UsageError(
                f"sampling has options for {len(sampling)} requests, not {len(requests)}"
            )
        groups = self._groups(requests, draft_length or 0)
        stop = frozenset(stop_ids)
        longest = max(len(r.tokens) + r.limit for r in requests)
        cache = self.model.new_cache(len(requests), longest)
        rotary = self.model.rotary(cache.max_length)
        options = _Options(cache, rotary, sampling, log_probabilities)
        watch = Stopwatch(self.comm, self.pipeline)
        passes = list(self._prefill_passes(requests))
        watch.statistics.groups, watch.statistics.prefill_passes = len(groups), len(passes)

        def timed(what: str, call: Callable[..., Any], *arguments: Any) -> Any:
            begin = time.monotonic_ns()
            found = call(*arguments)
            if on_span is not None:
                on_span(what, begin, time.monotonic_ns())
            return found

        def finish(done: _Pass) -> int:
            """Gives the requests of a pass their new tokens; how many."""
            count = 0
            for request, (tokens, logs) in zip(
                done.requests, timed("tokens", self._collect, done), strict=True
            ):
                taken = request.accept(tokens, logs if log_probabilities else [], stop)
                count += len(taken)
                if on_tokens is not None:
                    on_tokens(request.index, taken)
            return count

        under_way: deque[_Pass] = deque()
        self.pipeline.expect(passes[0].rows)
        for next_pass, after in zip(passes, [*passes[1:], None], strict=True):
            if after is not None:
                self.pipeline.expect(after.rows)
            if len(under_way) == self.pipeline.passes:
                finish(under_way.popleft())
            timed("prefill", self._start, next_pass, options)
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
                    timed("decode", self._start, under_way[-1], options)
                continue
            done = under_way.popleft()
            watch.step(finish(done), len(done.requests))
            ready.append(done.requests)
        return Generation(
            [request.output for request in requests],
            watch.stop(),
            [request.log_probabilities for request in requests] if log_probabilities else None,
        )

    def _groups(self, requests: list[_Request], draft_length: int) -> list[list[_Request]]:
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
    ) -> list[_Request]:
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
            requests.append(_Request(index, list(prompt), limit, drafter))
        return requests

    def _start(self, next_pass: _Pass, options: _Options) -> None:
        """This stage's part of a pass; the last stage draws its tokens."""
        self.comm.check()
        runs = next_pass.runs
        sequences = torch.tensor([sequence for sequence, _, run in runs for _ in run])
        positions = torch.tensor(
            [first + offset for _, first, run in runs for offset in range(len(run))]
        )
        placement = Placement(sequences, positions, options.rotary)
        tokens = torch.tensor([token for _, _, run in runs for token in run])
        ends = self._ends(next_pass) if next_pass.drafts is None else None
        logits = self.model(
            tokens,
            options.cache,
            placement,
            ends,
            source=self.pipeline.source,
            target=self.pipeline.target,
        )
        if logits is None:
            return
        draw = self._first_tokens if next_pass.drafts is None else self._verify
        results = draw(next_pass, logits, options)
        if next_pass.results:
            self.pipeline.publish(results)

    def _collect(self, done: _Pass) -> list[tuple[list[int], list[float]]]:
        """(new tokens, their log-probabilities) of each request of a pass, one at least."""
        if not done.results:
            return []
        results = self.pipeline.collect(done.results)
        tokens, accepted = results[:, 0].tolist(), results[:, 1].tolist()
        logs = results[:, 2].view(torch.float64).tolist()
        found, row = [], 0
        for draft in done.drafts or [[]] * len(done.requests):
            end = row + accepted[row] + 1
            found.append((tokens[row:end], logs[row:end]))
            row += len(draft) + 1
        return found

    def _prefill_passes(self, requests: Sequence[_Request]) -> Iterator[_Pass]:
        """All prompts, in passes of a bounded number of tokens."""
        most, stages = PREFILL_ROWS, self.model.stage.count
        if stages > 1:
            tokens = sum(len(request.tokens) for request in requests)
            even = -(-tokens // (PASSES_PER_STAGE * stages))
            most = min(most, self.pipeline.rows, max(FEWEST_ROWS, even))
        runs: list[tuple[int, int, Sequence[int]]] = []
        ends: list[_Request] = []
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
                    yield _Pass(runs, ends)
                    runs, ends, filled = [], [], 0
        if runs:
            yield _Pass(runs, ends)

    def _decode_pass(self, active: list[_Request]) -> _Pass:
        """The last token of every active request, and its drafts."""
        drafts = [request.draft() for request in active]
        runs = [
            (request.index, len(request.tokens) - 1, [request.tokens[-1], *draft])
            for request, draft in zip(active, drafts, strict=True)
        ]
        return _Pass(runs, active, drafts)

    def _ends(self, prefill: _Pass) -> torch.Tensor:
        """The rows of the prompts' last tokens."""
        finished = {request.index for request in prefill.requests}
        # A sequence has one run in a pass; that of a finished prompt ends with its last token.
        lengths = torch.tensor([len(run) for _, _, run in prefill.runs])
        is_end = torch.tensor([sequence in finished for sequence, _, _ in prefill.runs])
        return lengths.cumsum(0)[is_end] - 1

    def _first_tokens(
        self, prefill: _Pass, logits: torch.Tensor, options: _Options
    ) -> torch.Tensor:
        """The results of a pass of prompts: a token of every one that ends in it."""
        tokens, logs = ops.vocab_parallel_sample(
            logits,
            options.sampling.select([request.index for request in prefill.requests]),
            torch.tensor([len(request.tokens) for request in prefill.requests], dtype=torch.int64),
            self.model.vocabulary.begin,
            self.comm,
            log_probabilities=options.log_probabilities,
        )
        return _results(tokens, torch.zeros_like(tokens), logs)

    def _verify(self, step: _Pass, logits: torch.Tensor, options: _Options) -> torch.Tensor:
        """The results of a decoding step: of every request, its drafts as far as they hold."""
        lengths = torch.tensor([len(draft) for draft in step.drafts])
        longest = int(lengths.max())
        padded = torch.tensor(
            [draft + [-1] * (longest - len(draft)) for draft in step.drafts], dtype=torch.int64
        )
        tokens, accepted, logs = ops.verify_chain(
            logits,
            padded,
            lengths,
            options.sampling.select([request.index for request in step.requests]),
            torch.tensor([len(request.tokens) for request in step.requests]),
            self.model.vocabulary.begin,
            self.comm,
            log_probabilities=options.log_probabilities,
        )
        there = torch.arange(longest + 1) <= lengths[:, None]
        return _results(
            tokens[there],
            accepted[:, None].expand(-1, longest + 1)[there],
            logs[there] if logs is not None else None,
        )


def _results(
    tokens: torch.Tensor, accepted: torch.Tensor, logs: torch.Tensor | None
) -> torch.Tensor:
    """Rows of results as :mod:`commfuse.generation.pipeline` takes them."""
    logs = torch.zeros(len(tokens)) if logs is None else logs
    return torch.stack([tokens, accepted, logs.double().view(torch.int64)], dim=1)

"""Generation for a ragged batch, greedy or sampled, with or without speculation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from commfuse import ops
from commfuse.errors import UsageError
from commfuse.generation.statistics import GenerationStatistics, Stopwatch
from commfuse.models.llama import Llama
from commfuse.nn import KVCache
from commfuse.ops import Placement, Sampling
from commfuse.speculative import NGramDrafter

PREFILL_ROWS = 512  # tokens of prompts in one forward pass


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


class Generator:
    """Generates text with one model on its ranks. Every rank makes the same calls.

    All decisions are taken from numbers that are bitwise equal on all ranks, so that the ranks
    cannot diverge. A request's tokens do not depend on what else is in the batch, nor on
    speculation: a row's bits do not depend on the rows beside it, and what is drawn is a function
    of the request's seed, the token's position and the row.

    Args:
        model: this rank's part.

    Example:
        >>> result = Generator(model).generate([prompt_ids], max_new_tokens=64)
        >>> result.outputs, result.statistics.tokens_per_second
    """

    def __init__(self, model: Llama):
        self.model = model
        self.comm = model.comm

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

        Raises:
            UsageError: an empty prompt, or one that fills the context; options for another number
                of prompts.
            CommunicatorError: a rank failed; see :mod:`commfuse.errors`.
        """
        requests = self._requests(prompts, max_new_tokens, draft_length)
        if sampling is None:
            sampling = Sampling.of(len(requests))
        if len(sampling) != len(requests):
            raise UsageError(
                f"sampling has options for {len(sampling)} requests, not {len(requests)}"
            )
        stop = frozenset(stop_ids)
        longest = max(len(r.tokens) + r.limit for r in requests)
        cache = self.model.new_cache(len(requests), longest)
        rotary = self.model.rotary(cache.max_length)
        watch = Stopwatch(self.comm)

        def deliver(request: _Request, tokens: Sequence[int], logs: Sequence[float]) -> int:
            taken = request.accept(tokens, logs, stop)
            if on_tokens is not None:
                on_tokens(request.index, taken)
            return len(taken)

        options = (sampling, log_probabilities)
        first = self._prefill(requests, cache, rotary, *options)
        for request, (token, logs) in zip(requests, first, strict=True):
            deliver(request, [token], logs)
        watch.first_tokens()
        while active := [request for request in requests if not request.done]:
            self.comm.check()
            new = self._decode(active, cache, rotary, *options)
            taken = [deliver(request, *tokens) for request, tokens in zip(active, new, strict=True)]
            watch.step(sum(taken), len(active))
        return Generation(
            [request.output for request in requests],
            watch.stop(),
            [request.log_probabilities for request in requests] if log_probabilities else None,
        )

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

    def _forward(
        self,
        entries: Sequence[tuple[int, int, Sequence[int]]],
        cache: KVCache,
        rotary: tuple[torch.Tensor, torch.Tensor],
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits for runs of tokens, each (sequence, first position, tokens)."""
        tokens = torch.tensor([token for _, _, run in entries for token in run])
        sequences = torch.tensor([sequence for sequence, _, run in entries for _ in run])
        positions = torch.tensor(
            [first + offset for _, first, run in entries for offset in range(len(run))]
        )
        return self.model(tokens, cache, Placement(sequences, positions, rotary), rows)

    def _prefill(
        self,
        requests: Sequence[_Request],
        cache: KVCache,
        rotary: tuple[torch.Tensor, torch.Tensor],
        sampling: Sampling,
        log_probabilities: bool,
    ) -> list[tuple[int, list[float]]]:
        """Runs all prompts, in passes of a bounded number of tokens; each one's first token."""
        first_tokens: dict[int, tuple[int, list[float]]] = {}
        runs: list[tuple[int, int, Sequence[int]]] = []
        filled = 0

        def flush() -> None:
            nonlocal runs, filled
            ends, finished, row = [], [], 0
            for sequence, first, run in runs:
                row += len(run)
                if first + len(run) == len(requests[sequence].tokens):
                    ends.append(row - 1)
                    finished.append(sequence)
            logits = self._forward(runs, cache, rotary, torch.tensor(ends, dtype=torch.int64))
            tokens, logs = ops.vocab_parallel_sample(
                logits,
                sampling.select(finished),
                torch.tensor([len(requests[s].tokens) for s in finished], dtype=torch.int64),
                self.model.vocabulary.begin,
                self.comm,
                log_probabilities=log_probabilities,
            )
            each = [[log] for log in logs.tolist()] if logs is not None else [[]] * len(finished)
            first_tokens.update(zip(finished, zip(tokens.tolist(), each, strict=True), strict=True))
            runs, filled = [], 0

        for request in requests:
            first = 0
            while first < len(request.tokens):
                count = min(PREFILL_ROWS - filled, len(request.tokens) - first)
                runs.append((request.index, first, request.tokens[first : first + count]))
                first, filled = first + count, filled + count
                if filled == PREFILL_ROWS:
                    flush()
        if runs:
            flush()
        return [first_tokens[request.index] for request in requests]

    def _decode(
        self,
        active: Sequence[_Request],
        cache: KVCache,
        rotary: tuple[torch.Tensor, torch.Tensor],
        sampling: Sampling,
        log_probabilities: bool,
    ) -> list[tuple[list[int], list[float]]]:
        """One step: the next tokens of every active request, one at least."""
        drafts = [request.draft() for request in active]
        runs = [
            (request.index, len(request.tokens) - 1, [request.tokens[-1], *draft])
            for request, draft in zip(active, drafts, strict=True)
        ]
        logits = self._forward(runs, cache, rotary)
        longest = max(map(len, drafts))
        padded = torch.tensor(
            [draft + [-1] * (longest - len(draft)) for draft in drafts], dtype=torch.int64
        )
        tokens, accepted, logs = ops.verify_chain(
            logits,
            padded,
            torch.tensor([len(draft) for draft in drafts]),
            sampling.select([request.index for request in active]),
            torch.tensor([len(request.tokens) for request in active]),
            self.model.vocabulary.begin,
            self.comm,
            log_probabilities=log_probabilities,
        )
        all_logs = logs.tolist() if logs is not None else [[]] * len(active)
        return [
            (row[: count + 1], row_logs[: count + 1])
            for row, row_logs, count in zip(
                tokens.tolist(), all_logs, accepted.tolist(), strict=True
            )
        ]

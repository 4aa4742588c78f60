"""Passes through a model and its cache: tokens placed, the model run, new tokens drawn.

One implementation for all devices. On the CPU every pass has the sizes that it needs. On a GPU a
decoding step is a CUDA graph, whose shapes and addresses cannot change: requests and rows are
padded to a few sizes, the cache stays from one generation to the next, and how long each sequence
is stands in memory. Padding is a token of a sequence of its own, of which nothing is kept.
"""

from __future__ import annotations

import contextlib
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import torch

from commfuse import ops
from commfuse.errors import UsageError
from commfuse.generation.inputs import Inputs, Sizes, bucket, bucket_span, numbers_of
from commfuse.generation.pipeline import RESULT_COLUMNS
from commfuse.generation.requests import Pass
from commfuse.models.llama import Llama
from commfuse.nn import KVCache
from commfuse.ops import Placement, Sampling
from commfuse.runtime.channel import Channel

CACHE_GRANULE = 256  # positions: what a cache that is kept is rounded up to


class _Graph(NamedTuple):
    """A captured decoding step: what it reads, and where its results come to lie."""

    graph: torch.cuda.CUDAGraph
    data: torch.Tensor
    results: torch.Tensor


@dataclass
class _Generation:
    """What holds for one generation.

    Attributes:
        options: of each request, (temperature, top_k, top_p, seed) as :class:`Inputs` has them.
        draft_length: the most draft tokens of a step.
        log_probabilities: whether they are wanted.
    """

    options: list[tuple[int, ...]]
    draft_length: int
    log_probabilities: bool


class Steps:
    """The passes of a generation, each from token ids to new tokens.

    Args:
        model: this rank's part.
        source, target: from the stage before and to the next one.
        static: whether decoding steps are padded and the cache is kept, as CUDA graphs need it.
        graphs: whether they become CUDA graphs: those whose sizes come up a second time.
    """

    def __init__(
        self,
        model: Llama,
        source: Channel | None,
        target: Channel | None,
        *,
        static: bool,
        graphs: bool,
    ):
        self.model, self.comm = model, model.comm
        self.source, self.target = source, target
        self.static, self.graphs = static, graphs
        self.device = model.comm.device
        self._cache: KVCache | None = None
        self._sequences = 0  # of the cache
        self._rotary: tuple[torch.Tensor, torch.Tensor] | None = None
        self._generation: _Generation | None = None
        self._captured: dict[tuple[Sizes, bool], _Graph | None] = {}
        self._pool = None
        on_gpu = self.device.type == "cuda"
        # Not the default stream, which cannot be captured.
        self._stream = torch.cuda.Stream(self.device) if on_gpu else None
        self._copied: deque[torch.cuda.Event] = deque()  # behind each copy of results to the host

    @contextlib.contextmanager
    def stream(self):
        """Where passes must be made: on a GPU, on a stream of their own."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            yield

    def begin(
        self, length: int, sampling: Sampling, draft_length: int, log_probabilities: bool
    ) -> None:
        """Prepares for a generation.

        Args:
            length: the most tokens of a sequence.
            sampling: how each request's tokens are drawn; as many sequences are needed.
            draft_length: the most draft tokens of a step.
            log_probabilities: whether they are wanted.
        """
        self._copied.clear()
        options = (x.view(torch.int64).tolist() for x in sampling.tensors)
        self._generation = _Generation(
            list(zip(*options, strict=True)), draft_length, log_probabilities
        )
        sequences = len(sampling)
        if self.static:
            sequences += 1  # that of the padding
            kept = self._cache
            if kept is not None and sequences <= self._sequences and length <= kept.max_length:
                return
            sequences = max(sequences, self._sequences)
            length = max(length, kept.max_length if kept is not None else 0)
            length = -(-length // CACHE_GRANULE) * CACHE_GRANULE
            # Graphs hold addresses of the old one, which is let go before there is a new one.
            self._captured.clear()
            self._pool = self._cache = self._rotary = kept = None
        self._cache = self.model.new_cache(sequences, length)
        self._rotary = self.model.rotary(self._cache.max_length)
        self._sequences = sequences

    def start(self, next_pass: Pass) -> torch.Tensor | None:
        """This stage's part of a pass; the last stage draws its tokens.

        Returns:
            int64 [requests, 1 + draft tokens, RESULT_COLUMNS] in host memory, complete after
            :meth:`wait`; None before the last stage, and where no request gets one.
        """
        sizes = self._sizes(next_pass)
        # In pinned memory the copy to a GPU does not wait for what is under way there.
        pinned = self._stream is not None
        numbers = torch.tensor(
            numbers_of(next_pass, sizes, self._generation.options, self._sequences - 1),
            dtype=torch.int64,
            pin_memory=pinned,
        )
        if self.graphs and sizes.drafts is not None:
            results = self._replayed(numbers, sizes)
        else:
            results = self._run(numbers.to(self.device, non_blocking=True), sizes)
        if results is None:
            return None
        results = results[: len(next_pass.requests)]
        if self._stream is None:
            return results
        # The host must wait for this pass alone, not for the one that it has started behind it.
        on_host = torch.empty(results.shape, dtype=results.dtype, pin_memory=True)
        on_host.copy_(results, non_blocking=True)
        self._copied.append(self._stream.record_event())
        return on_host

    def wait(self) -> None:
        """Returns when the oldest results that were not waited for are in host memory."""
        if self._copied:
            self._copied.popleft().synchronize()

    def _sizes(self, next_pass: Pass) -> Sizes:
        rows, requests = next_pass.rows, len(next_pass.requests)
        if next_pass.drafts is None:
            return Sizes(rows, requests, None, None)
        if not self.static:
            return Sizes(rows, requests, next_pass.longest, self._cache.max_length)
        padded, drafts = bucket(requests), self._generation.draft_length
        # Every request of the padding has a row.
        rows = padded if drafts == 0 else bucket(rows + padded - requests)
        longest = max(first + len(run) for _, first, run in next_pass.runs)
        return Sizes(rows, padded, drafts, bucket_span(longest, self._cache.max_length))

    def _replayed(self, numbers: torch.Tensor, sizes: Sizes) -> torch.Tensor:
        """The results of a decoding step that is a graph, or becomes one if it comes up again.

        The first time it runs as it is: that also compiles and loads kernels, which a capture
        cannot. Nothing is captured that does not come up again.
        """
        key = (sizes, self._generation.log_probabilities)
        if key not in self._captured:
            self._captured[key] = None
            return self._run(numbers.to(self.device, non_blocking=True), sizes)
        captured = self._captured[key]
        if captured is None:
            captured = self._captured[key] = self._capture(sizes)
        captured.data.copy_(numbers, non_blocking=True)
        captured.graph.replay()
        return captured.results

    def _capture(self, sizes: Sizes) -> _Graph:
        data = torch.zeros(sum(sizes.widths), dtype=torch.int64, device=self.device)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=torch.cuda.current_stream()):
            results = self._run(data, sizes)
        return _Graph(graph, data, results)

    def _run(self, data: torch.Tensor, sizes: Sizes) -> torch.Tensor | None:
        """The pass itself: what is captured."""
        inputs = Inputs(*data.split(sizes.widths))
        placement = Placement(inputs.sequences, inputs.positions, self._rotary, sizes.span)
        logits = self.model(
            inputs.tokens,
            self._cache,
            placement,
            inputs.counts if sizes.drafts is None else None,
            source=self.source,
            target=self.target,
        )
        if logits is None or not sizes.requests:
            return None
        draw = self._first_tokens if sizes.drafts is None else self._verify
        return draw(logits, inputs, sizes)

    def _first_tokens(self, logits: torch.Tensor, inputs: Inputs, sizes: Sizes) -> torch.Tensor:
        """A token of every prompt that ends in the pass."""
        tokens, logs = ops.vocab_parallel_sample(
            logits,
            inputs.sampling,
            inputs.places,
            self.model.vocabulary.begin,
            self.comm,
            log_probabilities=self._generation.log_probabilities,
        )
        return _results(tokens[:, None], torch.zeros_like(tokens), logs)

    def _verify(self, logits: torch.Tensor, inputs: Inputs, sizes: Sizes) -> torch.Tensor:
        """Of every request its drafts as far as they hold, and the token behind them."""
        if logits.is_cpu:  # where no rows may follow; on a GPU their number is not known here
            logits = logits[: int(inputs.counts.sum()) + sizes.requests]
        tokens, accepted, logs = ops.verify_chain(
            logits,
            inputs.drafts.view(sizes.requests, sizes.drafts),
            inputs.counts,
            inputs.sampling,
            inputs.places,
            self.model.vocabulary.begin,
            self.comm,
            log_probabilities=self._generation.log_probabilities,
        )
        return _results(tokens, accepted, logs)


def _results(
    tokens: torch.Tensor, accepted: torch.Tensor, logs: torch.Tensor | None
) -> torch.Tensor:
    """[requests, tokens, RESULT_COLUMNS] as :mod:`commfuse.generation.pipeline` takes them."""
    bits = torch.zeros_like(tokens)
    if logs is not None:
        bits = logs.double().view(torch.int64).view(tokens.shape)
    results = torch.stack([tokens, accepted[:, None].expand_as(tokens), bits], dim=2)
    assert results.shape[2] == RESULT_COLUMNS
    return results


def check_device(model: Llama) -> None:
    """Refuses a model on a GPU that cannot generate there.

    Raises:
        UsageError: the message says why, and what would work.
    """
    comm = model.comm
    if comm.device.type != "cuda":
        return
    if model.stage.count > 1:
        raise UsageError("pipeline stages run on the CPU in this version; on a GPU use pp=1")
    if not comm.serves_gpu:
        because = f": {comm.transport_reason}" if comm.transport_reason else ""
        raise UsageError(
            "generation on a GPU needs commfuse's CUDA kernels and GPUs that map each other's "
            f"memory; the transport here is {comm.transport}{because}"
        )

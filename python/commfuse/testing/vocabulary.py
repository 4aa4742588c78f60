"""Adapters of the ops on vocabulary shards; see :mod:`commfuse.testing.adapters`."""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.nn.functional as F

from commfuse import ops
from commfuse.nn.sharding import Span, shard_vocabulary
from commfuse.ops.verify_chain import reference as verify_chain_reference
from commfuse.ops.vocab_parallel_argmax import reference as argmax_reference
from commfuse.ops.vocab_parallel_embedding import reference as embedding_reference
from commfuse.ops.vocab_parallel_sample import reference as sample_reference
from commfuse.testing.adapter import EPS, Adapter, Inputs, Outputs


class _Vocabulary(Adapter):
    """Ops on vocabulary shards."""

    def spans(self) -> list[Span]:
        """The entries of each rank."""
        size, world = self.case["vocabulary"], self.world_size
        return [shard_vocabulary(size, world, rank) for rank in range(world)]

    def shards(self, logits: torch.Tensor) -> list[Inputs]:
        """Each rank's columns of the logits, and where they begin."""
        return [
            {"logits": logits[:, s.begin : s.end].contiguous(), "vocab_begin": s.begin}
            for s in self.spans()
        ]


class VocabParallelArgmax(_Vocabulary):
    """Inputs: logits [m, shard], vocab_begin; two-byte logits have ties."""

    op = "vocab_parallel_argmax"

    def make(self, random):
        return self.shards(random(self.case["m"], self.case["vocabulary"]))

    def call(self, inputs, comm, backend):
        logits, begin = inputs["logits"], inputs["vocab_begin"]
        return (ops.vocab_parallel_argmax(logits, begin, comm, backend),)

    def reference(self, inputs):
        return (argmax_reference([rank["logits"] for rank in inputs]),)

    composition = reference

    def message_bytes(self):
        return 16 * self.case["m"]


class VocabParallelEmbedding(_Vocabulary):
    """Inputs: tokens int64 [m], w [shard, n], vocab_begin, norm_weight [n] or None."""

    op = "vocab_parallel_embedding"
    packs_weight = True

    def make(self, random):
        size, n = self.case["vocabulary"], self.case["n"]
        table = random(size, n)
        norm = random(n) if "norm" in self.case.options else None
        tokens = torch.arange(self.case["m"], device=self.device) * 7919 % size
        return [
            {"tokens": tokens, "w": table[s.begin : s.end], "vocab_begin": s.begin, "norm": norm}
            for s in self.spans()
        ]

    def call(self, inputs, comm, backend):
        out = ops.vocab_parallel_embedding(
            inputs["tokens"],
            inputs["w"],
            inputs["vocab_begin"],
            comm,
            norm_weight=inputs["norm"],
            eps=EPS,
            backend=backend,
        )
        return out if isinstance(out, tuple) else (out,)

    def reference(self, inputs):
        rows = embedding_reference(inputs[0]["tokens"], [rank["w"] for rank in inputs])
        return self._with_norm(rows, inputs[0]["norm"])

    def composition(self, inputs):
        rows = torch.cat([rank["w"] for rank in inputs])[inputs[0]["tokens"]]
        return self._with_norm(rows, inputs[0]["norm"])

    def _with_norm(self, rows: torch.Tensor, norm: torch.Tensor | None) -> Outputs:
        if norm is None:
            return (rows,)
        return F.rms_norm(rows, norm.shape, norm.to(rows.dtype), EPS), rows

    def message_bytes(self):
        return self.case["m"] * self.case["n"] * self.dtype.itemsize


class _Sampled(_Vocabulary):
    """Ops that draw: options ``sampled``, ``truncated`` (top-k and top-p too), ``logs``.

    Logits have the spread of a language model's; one in 16 is -inf. float16 logits have ties.
    """

    _inputs: list[Inputs] | None = None

    def sampling(self, batch: int) -> ops.Sampling:
        """Every third request of ``sampled`` ones is greedy, but not the first."""
        options = {}
        if "sampled" in self.case.options:
            options["temperature"] = [(0.7, 1.0, 0.0)[b % 3] for b in range(batch)]
            options["seed"] = range(batch)
        if "truncated" in self.case.options:
            options["top_k"] = [(50, 0, 5, 1)[b % 4] for b in range(batch)]
            options["top_p"] = [(0.9, 0.5, 1.0, 0.99, 1e-6)[b % 5] for b in range(batch)]
        return ops.Sampling.of(batch, **options).to(self.device)

    def logits(self, random, rows: int) -> torch.Tensor:
        logits = random(rows, self.case["vocabulary"], scale=4.0)
        if logits.shape[1] > 16:
            logits[:, 3::16] = -torch.inf
        return logits

    def results(self, outputs: Outputs) -> Outputs:
        """The log-probabilities come last; integers are compared before them."""
        return tuple(x for x in outputs if x is not None)

    def reference(self, inputs):
        return self.results(self.truth(inputs))

    def composition(self, inputs):
        tokens, *others = self.results(self.truth(inputs))
        return tokens, *(x.float() if x.is_floating_point() else x for x in others)

    def truth(self, inputs: list[Inputs]) -> tuple[torch.Tensor | None, ...]:
        """The op's results in float64; found once for the inputs that were asked for last."""
        if self._inputs is not inputs:
            self._inputs, self._truth = inputs, self.expected(inputs)
        return self._truth

    @abstractmethod
    def expected(self, inputs: list[Inputs]) -> tuple[torch.Tensor | None, ...]:
        """The op's results in float64."""

    def winner_bytes(self, rows: int) -> int:
        return rows * (32 if "logs" in self.case.options else 16)


class VocabParallelSample(_Sampled):
    """Inputs: logits [m, shard], vocab_begin, sampling and positions of m requests."""

    op = "vocab_parallel_sample"

    def make(self, random):
        m = self.case["m"]
        positions = torch.arange(m, device=self.device) + 5
        shared = {"sampling": self.sampling(m), "positions": positions}
        return [{**shard, **shared} for shard in self.shards(self.logits(random, m))]

    def call(self, inputs, comm, backend):
        names = ("logits", "sampling", "positions", "vocab_begin")
        logs = "logs" in self.case.options
        return self.results(
            ops.vocab_parallel_sample(
                *(inputs[name] for name in names), comm, log_probabilities=logs, backend=backend
            )
        )

    def expected(self, inputs):
        shards, first = [rank["logits"] for rank in inputs], inputs[0]
        tokens, logs = sample_reference(shards, first["sampling"], first["positions"])
        return tokens, logs if "logs" in self.case.options else None

    def message_bytes(self):
        return self.winner_bytes(self.case["m"])


class VerifyChain(_Sampled):
    """Inputs: logits [rows, shard], drafts [batch, longest], draft_lengths, vocab_begin, sampling.

    Request b has b % (longest + 1) right drafts and, where there is room, a wrong one behind them.
    With ``distributions`` also draft_probabilities [drafts, shard], in which drafts are likely.
    """

    op = "verify_chain"

    def make(self, random):
        batch, longest, size = (self.case[d] for d in ("batch", "drafts", "vocabulary"))
        logits = self.logits(random, batch * (longest + 1))
        requests, places = (torch.arange(n, device=self.device) for n in (batch, longest))
        shared = {
            "draft_lengths": torch.full_like(requests, longest),
            "sampling": self.sampling(batch),
            "positions": requests + 5,
        }
        winners = self._winners(logits, shared)
        right = requests[:, None] % (longest + 1) > places[None]
        shared["drafts"] = torch.where(right, winners[:, :-1], (winners[:, :-1] + 1) % size)
        inputs = [{**shard, **shared} for shard in self.shards(logits)]
        if "distributions" in self.case.options:
            near = logits.view(batch, longest + 1, size)[:, :-1].flatten(0, 1).float()
            likely = F.one_hot(shared["drafts"].flatten(), size)
            q = (0.9 * near.softmax(dim=1) + 0.1 * likely).float()
            for rank, span in zip(inputs, self.spans(), strict=True):
                rank["draft_probabilities"] = q[:, span.begin : span.end].contiguous()
        return inputs

    def _winners(self, logits: torch.Tensor, shared: Inputs) -> torch.Tensor:
        """Every row's token without a draft, int64 [batch, longest + 1]."""
        rows = self.case["drafts"] + 1
        every = torch.arange(self.case["batch"] * rows, device=self.device)
        requests = every // rows
        positions = shared["positions"][requests] + every % rows
        sampling = shared["sampling"].select(requests.tolist())
        return sample_reference([logits], sampling, positions)[0].view(-1, rows)

    def call(self, inputs, comm, backend):
        names = ("logits", "drafts", "draft_lengths", "sampling", "positions", "vocab_begin")
        return self.results(
            ops.verify_chain(
                *(inputs[name] for name in names),
                comm,
                draft_probabilities=inputs.get("draft_probabilities"),
                log_probabilities="logs" in self.case.options,
                backend=backend,
            )
        )

    def expected(self, inputs):
        shards, first = [rank["logits"] for rank in inputs], inputs[0]
        q = None
        if "draft_probabilities" in first:
            q = [rank["draft_probabilities"] for rank in inputs]
        names = ("drafts", "draft_lengths", "sampling", "positions")
        tokens, accepted, logs = verify_chain_reference(shards, *(first[n] for n in names), q)
        return tokens, accepted, logs if "logs" in self.case.options else None

    def message_bytes(self):
        return self.winner_bytes(self.case["batch"] * (self.case["drafts"] + 1))

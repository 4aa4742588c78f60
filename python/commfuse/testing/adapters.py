"""One adapter an op: its inputs, how it is called, its reference and plain torch's composition.

Inputs of all ranks are made from one seed, so that every rank can make them all
and compute the reference of the whole by itself.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.nn.functional as F

from commfuse import ops
from commfuse.errors import UsageError
from commfuse.nn.sharding import Span, shard_vocabulary
from commfuse.ops.all_gather import reference as all_gather_reference
from commfuse.ops.all_reduce import reference as all_reduce_reference
from commfuse.ops.all_reduce_rms_norm import reference as all_reduce_rms_norm_reference
from commfuse.ops.attention import reference as attention_reference
from commfuse.ops.matmul import reference as matmul_reference
from commfuse.ops.matmul_all_reduce import reference as matmul_all_reduce_reference
from commfuse.ops.reduce_scatter import reference as reduce_scatter_reference
from commfuse.ops.verify_chain import reference as verify_chain_reference
from commfuse.ops.vocab_parallel_argmax import reference as argmax_reference
from commfuse.ops.vocab_parallel_embedding import reference as embedding_reference
from commfuse.ops.vocab_parallel_sample import reference as sample_reference
from commfuse.testing.adapter import Adapter, Inputs, Outputs
from commfuse.testing.block import TransformerBlocks
from commfuse.testing.cases import Case

EPS = 1e-5


class AllReduce(Adapter):
    """Inputs: x [m, n]; with ``in_place`` it is overwritten, and grows from call to call."""

    op = "all_reduce"
    exact = True
    one_message = True

    def make(self, random):
        return [{"x": random(self.case["m"], self.case["n"])} for _ in range(self.world_size)]

    def prepare(self, inputs, backend):
        in_place = "in_place" in self.case.options
        return {"x": inputs["x"].clone()} if in_place else inputs

    def call(self, inputs, comm, backend):
        in_place = "in_place" in self.case.options
        run = ops.all_reduce_ if in_place else ops.all_reduce
        return (run(inputs["x"], comm, backend),)

    def reference(self, inputs):
        return (all_reduce_reference([rank["x"] for rank in inputs]),)

    def composition(self, inputs):
        return (self.sum_in_order([rank["x"] for rank in inputs]),)

    def message_bytes(self):
        return self.case["m"] * self.case["n"] * self.dtype.itemsize


class ReduceScatter(Adapter):
    """Inputs: x [W·m, n]."""

    op = "reduce_scatter"
    exact = True
    scattered = True

    def make(self, random):
        rows = self.world_size * self.case["m"]
        return [{"x": random(rows, self.case["n"])} for _ in range(self.world_size)]

    def call(self, inputs, comm, backend):
        return (ops.reduce_scatter(inputs["x"], comm, backend),)

    def reference(self, inputs):
        return (reduce_scatter_reference([rank["x"] for rank in inputs]),)

    def composition(self, inputs):
        return (self.sum_in_order([rank["x"] for rank in inputs]),)

    def message_bytes(self):
        return self.world_size * self.case["m"] * self.case["n"] * self.dtype.itemsize


class AllGather(Adapter):
    """Inputs: x [m, n]."""

    op = "all_gather"
    exact = True

    def make(self, random):
        return [{"x": random(self.case["m"], self.case["n"])} for _ in range(self.world_size)]

    def call(self, inputs, comm, backend):
        return (ops.all_gather(inputs["x"], comm, backend),)

    def reference(self, inputs):
        return (all_gather_reference([rank["x"] for rank in inputs]),)

    def composition(self, inputs):
        return (torch.cat([rank["x"] for rank in inputs]),)

    message_bytes = AllReduce.message_bytes


class AllReduceRMSNorm(Adapter):
    """Inputs: x, residual [m, n] (or None), weight [n]."""

    op = "all_reduce_rms_norm"
    one_message = True

    def make(self, random):
        m, n = self.case["m"], self.case["n"]
        residual = random(m, n) if "residual" in self.case.options else None
        shared = {"residual": residual, "weight": random(n)}
        return [{"x": random(m, n), **shared} for _ in range(self.world_size)]

    def call(self, inputs, comm, backend):
        return ops.all_reduce_rms_norm(
            inputs["x"], inputs["residual"], inputs["weight"], EPS, comm, backend
        )

    def reference(self, inputs):
        first = inputs[0]
        return all_reduce_rms_norm_reference(
            [rank["x"] for rank in inputs], first["residual"], first["weight"], EPS
        )

    def composition(self, inputs):
        total, first = self.sum_in_order([rank["x"] for rank in inputs]), inputs[0]
        if first["residual"] is not None:
            total += first["residual"]
        return F.rms_norm(total, first["weight"].shape, first["weight"], EPS), total

    message_bytes = AllReduce.message_bytes


class Matmul(Adapter):
    """Inputs: x [m, k], w [n, k], bias [n] or None; with ``gate_up`` also up [n, k]."""

    op = "matmul"
    packs_weight = True

    def make(self, random):
        m, k, n = self.case["m"], self.case["k"], self.case["n"]
        made = []
        for _ in range(self.world_size):
            rank = {"x": random(m, k), "w": random(n, k, scale=k**-0.5), "bias": None}
            if "bias" in self.case.options:
                rank["bias"] = random(n)
            if "gate_up" in self.case.options:
                rank["up"] = random(n, k, scale=k**-0.5)
            made.append(rank)
        # No communication: every rank works on its own, here all on the same.
        return [made[0]] * self.world_size

    def prepare(self, inputs, backend):
        if "up" in inputs and backend == "cpu":
            return {**inputs, "w": ops.pack_gate_up(inputs["w"], inputs["up"])}
        return super().prepare(inputs, backend)

    def call(self, inputs, comm, backend):
        if backend == "torch" and "up" in inputs:
            return self.composition([inputs])
        return (ops.matmul(inputs["x"], inputs["w"], inputs["bias"], backend=backend),)

    def reference(self, inputs):
        x, w, bias = (inputs[0][name] for name in ("x", "w", "bias"))
        if "up" in inputs[0]:
            gate = matmul_reference(x, w)
            return (gate * gate.sigmoid() * matmul_reference(x, inputs[0]["up"]),)
        return (matmul_reference(x, w, bias),)

    def composition(self, inputs):
        x, w, bias = (inputs[0][name] for name in ("x", "w", "bias"))
        if "up" in inputs[0]:
            return (F.silu(F.linear(x, w)) * F.linear(x, inputs[0]["up"]),)
        return (F.linear(x, w, bias),)

    def streamed_bytes(self):
        halves = 2 if "gate_up" in self.case.options else 1
        return halves * self.case["n"] * self.case["k"] * self.dtype.itemsize


class MatmulAllReduce(Adapter):
    """Inputs: x [m, k], w [n, k]; bias [n], residual [m, n], norm_weight [n], or None each."""

    op = "matmul_all_reduce"
    packs_weight = True
    one_message = True
    shared = ("bias", "residual", "norm_weight")

    def make(self, random):
        m, k, n = self.case["m"], self.case["k"], self.case["n"]
        options = self.case.options
        shared = {
            "bias": random(n) if "bias" in options else None,
            "residual": random(m, n) if "residual" in options else None,
            "norm_weight": random(n) if "norm" in options else None,
        }
        scale = (k * self.world_size) ** -0.5
        return [
            {"x": random(m, k), "w": random(n, k, scale=scale), **shared}
            for _ in range(self.world_size)
        ]

    def call(self, inputs, comm, backend):
        shared = {name: inputs[name] for name in self.shared}
        out = ops.matmul_all_reduce(
            inputs["x"], inputs["w"], comm, **shared, eps=EPS, backend=backend
        )
        return out if isinstance(out, tuple) else (out,)

    def reference(self, inputs):
        out = matmul_all_reduce_reference(
            [rank["x"] for rank in inputs],
            [rank["w"] for rank in inputs],
            *(inputs[0][name] for name in self.shared),
            EPS,
        )
        return out if isinstance(out, tuple) else (out,)

    def composition(self, inputs):
        total = self.sum_in_order([F.linear(rank["x"], rank["w"]) for rank in inputs])
        bias, residual, norm_weight = (inputs[0][name] for name in self.shared)
        for addend in (bias, residual):
            if addend is not None:
                total += addend
        if norm_weight is None:
            return (total,)
        return F.rms_norm(total, norm_weight.shape, norm_weight, EPS), total

    message_bytes = AllReduce.message_bytes
    streamed_bytes = Matmul.streamed_bytes


class Attention(Adapter):
    """Inputs: qkv of ``context`` + m tokens of one sequence, cos and sin, and a cache.

    A call appends and attends the last m tokens; :meth:`prepare` has appended those before.
    """

    op = "attention"

    def make(self, random):
        case = self.case
        length = case["context"] + case["m"]
        columns = (case["heads"] + 2 * case["kv_heads"]) * case["head_dim"]
        half = case["head_dim"] // 2
        angles = torch.outer(torch.arange(length).float(), 10000 ** (-torch.arange(half) / half))
        qkv = random(length, columns)
        return [{"qkv": qkv, "cos": angles.cos(), "sin": angles.sin()}] * self.world_size

    def prepare(self, inputs, backend):
        case, length = self.case, len(inputs["qkv"])
        padded = -(-length // 16) * 16
        shape = (1, case["kv_heads"], padded, case["head_dim"])
        prepared = {
            **inputs,
            "caches": (torch.zeros(shape, dtype=self.dtype), torch.zeros(shape, dtype=self.dtype)),
            "positions": torch.arange(length),
            "sequences": torch.zeros(length, dtype=torch.int64),
        }
        if case["context"]:
            self._attend(prepared, slice(0, case["context"]), backend)
        return prepared

    def _attend(self, inputs: Inputs, tokens: slice, backend: str) -> torch.Tensor:
        return ops.attention(
            inputs["qkv"][tokens],
            inputs["caches"],
            (inputs["cos"], inputs["sin"]),
            inputs["sequences"][tokens],
            inputs["positions"][tokens],
            (self.case["heads"], 0, self.case["heads"] // self.case["kv_heads"]),
            backend=backend,
        )

    def duplicate(self, inputs, backend):
        return self.prepare(inputs, backend)  # makes a cache in any case

    def streamed_bytes(self):
        case = self.case
        entries = (case["context"] + case["m"]) * case["kv_heads"] * case["head_dim"]
        return 2 * entries * self.dtype.itemsize

    def call(self, inputs, comm, backend):
        return (self._attend(inputs, slice(self.case["context"], None), backend),)

    def heads(self, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        case = self.case
        sizes = [case[name] * case["head_dim"] for name in ("heads", "kv_heads", "kv_heads")]
        q, k, v = inputs["qkv"].split(sizes, dim=1)
        return tuple(x.unflatten(1, (-1, case["head_dim"])) for x in (q, k, v))

    def reference(self, inputs):
        group = self.case["heads"] // self.case["kv_heads"]
        kv_head_of = [head // group for head in range(self.case["heads"])]
        rotary = (inputs[0]["cos"], inputs[0]["sin"])
        out = attention_reference(*self.heads(inputs[0]), *rotary, kv_head_of)
        return (out[self.case["context"] :],)

    def composition(self, inputs):
        q, k, v = (x.transpose(0, 1) for x in self.heads(inputs[0]))  # [heads, length, dim]
        cos, sin = (inputs[0][name].to(self.dtype) for name in ("cos", "sin"))

        def rotate(x: torch.Tensor) -> torch.Tensor:
            first, second = x.chunk(2, dim=-1)
            return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

        out = F.scaled_dot_product_attention(
            rotate(q)[None], rotate(k)[None], v[None], is_causal=True, enable_gqa=True
        )
        return (out[0].transpose(0, 1).flatten(1)[self.case["context"] :],)


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
        tokens = torch.arange(self.case["m"]) * 7919 % size
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

    message_bytes = AllReduce.message_bytes


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


ADAPTERS: dict[str, type[Adapter]] = {
    adapter.op: adapter
    for adapter in (
        AllReduce,
        AllReduceRMSNorm,
        ReduceScatter,
        AllGather,
        Matmul,
        MatmulAllReduce,
        Attention,
        TransformerBlocks,
        VocabParallelArgmax,
        VocabParallelEmbedding,
        VocabParallelSample,
        VerifyChain,
    )
}


def adapter_of(case: Case, dtype: torch.dtype, world_size: int, device: str = "cpu") -> Adapter:
    """The adapter that knows a case's op; its inputs are made on ``device``.

    Raises:
        UsageError: there is none; the message lists those that there are.

    Example:
        >>> adapter = adapter_of(cases_of("all_reduce")[0], torch.bfloat16, 2)
        >>> mine = adapter.prepare(adapter.inputs()[comm.rank], "cpu")
        >>> (y,) = adapter.call(mine, comm, "cpu")
    """
    if case.op not in ADAPTERS:
        raise UsageError(f"unknown op {case.op!r}: use one of {', '.join(ADAPTERS)}")
    return ADAPTERS[case.op](case, dtype, world_size, device)

"""One adapter an op: its inputs, how it is called, its reference and plain torch's composition.

Inputs of all ranks are made from one seed, so that every rank can make them all
and compute the reference of the whole by itself.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from commfuse import ops
from commfuse.errors import UsageError
from commfuse.ops.all_gather import reference as all_gather_reference
from commfuse.ops.all_reduce import reference as all_reduce_reference
from commfuse.ops.all_reduce_rms_norm import reference as all_reduce_rms_norm_reference
from commfuse.ops.attention import reference as attention_reference
from commfuse.ops.matmul import reference as matmul_reference
from commfuse.ops.matmul_all_reduce import reference as matmul_all_reduce_reference
from commfuse.ops.reduce_scatter import reference as reduce_scatter_reference
from commfuse.testing.adapter import EPS, Adapter, Inputs
from commfuse.testing.block import TransformerBlocks
from commfuse.testing.cases import Case
from commfuse.testing.vocabulary import (
    VerifyChain,
    VocabParallelArgmax,
    VocabParallelEmbedding,
    VocabParallelSample,
)


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

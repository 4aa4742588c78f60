"""The adapter of ``transformer_blocks``: a layer of a Llama-family model, cut over the ranks."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from commfuse import ops
from commfuse.nn.sharding import shard_heads, split
from commfuse.ops.attention import reference as attention_reference
from commfuse.testing.adapter import Adapter, Inputs

EPS = 1e-5


class TransformerBlocks(Adapter):
    """Inputs: x and residual [m, hidden], tokens 0 to m - 1 of one sequence, and weight shards."""

    op = "transformer_blocks"

    def make(self, random):
        c, world = self.case, self.world_size
        m, hidden, features = c["m"], c["hidden"], c["features"]
        width, kv_width = c["heads"] * c["head_dim"], c["kv_heads"] * c["head_dim"]
        half = c["head_dim"] // 2
        angles = torch.outer(torch.arange(max(m, 1)).float(), 100 ** (-torch.arange(half) / half))
        shared = {
            "x": random(m, hidden),
            "residual": random(m, hidden),
            "middle_norm": random(hidden, scale=0.1) + 1,
            "next_norm": random(hidden, scale=0.1) + 1,
            "cos": angles.cos(),
            "sin": angles.sin(),
        }
        q = random(width, hidden, scale=hidden**-0.5)
        k, v = (random(kv_width, hidden, scale=hidden**-0.5) for _ in range(2))
        output = random(hidden, width, scale=width**-0.5)
        gate, up = (random(features, hidden, scale=hidden**-0.5) for _ in range(2))
        down = random(hidden, features, scale=features**-0.5)
        ranks = []
        for rank in range(world):
            heads = shard_heads(c["heads"], c["kv_heads"], world, rank)
            query, kv = heads.query.scaled(c["head_dim"]), heads.kv.scaled(c["head_dim"])
            mine = split(features, world, rank).scaled(1)
            weights = {
                "qkv": torch.cat((q[query], k[kv], v[kv])),
                "output": output[:, query].contiguous(),
                "gate": gate[mine],
                "up": up[mine],
                "down": down[:, mine].contiguous(),
            }
            ranks.append({**shared, **weights, "heads": heads})
        return ranks

    def prepare(self, inputs, backend):
        c, heads = self.case, inputs["heads"]
        shape = (1, len(heads.kv), -(-max(c["m"], 1) // 16) * 16, c["head_dim"])
        keep = ops.pack_weight if backend == "cpu" else (lambda weight: weight)
        weights = ops.BlockWeights(
            qkv=keep(inputs["qkv"]),
            output=keep(inputs["output"]),
            gate_up=ops.pack_gate_up(inputs["gate"], inputs["up"]),
            down=keep(inputs["down"]),
            middle_norm=inputs["middle_norm"],
            next_norm=inputs["next_norm"],
            heads=(len(heads.query), heads.query.begin, heads.group),
            eps=EPS,
        )
        placement = ops.Placement(
            torch.zeros(c["m"], dtype=torch.int64),
            torch.arange(c["m"]),
            (inputs["cos"], inputs["sin"]),
        )
        caches = (torch.zeros(shape, dtype=self.dtype), torch.zeros(shape, dtype=self.dtype))
        return {**inputs, "weights": weights, "placement": placement, "caches": caches}

    def duplicate(self, inputs, backend):
        own = {name: inputs[name].clone() for name in ("qkv", "output", "down")}
        return self.prepare({**inputs, **own}, backend)  # gate and up are packed anew in any case

    def call(self, inputs, comm, backend):
        return ops.transformer_blocks(
            inputs["x"],
            inputs["residual"],
            [inputs["weights"]],
            [inputs["caches"]],
            inputs["placement"],
            comm,
            backend=backend,
        )

    def message_bytes(self):
        return 2 * self.case["m"] * self.case["hidden"] * self.dtype.itemsize

    def streamed_bytes(self):
        c, heads = self.case, shard_heads(self.case["heads"], self.case["kv_heads"],
                                          self.world_size, 0)  # fmt: skip
        rows = 2 * len(heads.query) + 2 * len(heads.kv)
        features = 3 * len(split(c["features"], self.world_size, 0))
        return (rows * c["head_dim"] + features) * c["hidden"] * self.dtype.itemsize

    def _attended(self, inputs: Inputs, dtype: torch.dtype) -> torch.Tensor:
        """Attention over a rank's heads, computed in float64 or in the inputs' own dtype."""
        heads, dim, m = inputs["heads"], self.case["head_dim"], self.case["m"]
        if m == 0:
            return inputs["x"].new_zeros((0, len(heads.query) * dim), dtype=dtype)
        rows = F.linear(inputs["x"].to(dtype), inputs["qkv"].to(dtype))
        sizes = [len(span) * dim for span in (heads.query, heads.kv, heads.kv)]
        q, k, v = (part.unflatten(1, (-1, dim)) for part in rows.split(sizes, dim=1))
        kv_head_of = [
            (heads.query.begin + head) // heads.group - heads.kv.begin
            for head in range(len(heads.query))
        ]
        return attention_reference(q, k, v, inputs["cos"], inputs["sin"], kv_head_of).to(dtype)

    def _block(self, inputs: list[Inputs], dtype: torch.dtype):
        first = inputs[0]

        def half(parts: list[torch.Tensor], residual: torch.Tensor, norm: torch.Tensor):
            total = self.sum_in_order(parts) + residual
            return F.rms_norm(total, norm.shape, norm.to(dtype), EPS), total

        attended = [
            F.linear(self._attended(rank, dtype), rank["output"].to(dtype)) for rank in inputs
        ]
        x, residual = half(attended, first["residual"].to(dtype), first["middle_norm"])
        gated = [
            F.silu(F.linear(x, rank["gate"].to(dtype))) * F.linear(x, rank["up"].to(dtype))
            for rank in inputs
        ]
        down = [F.linear(g, rank["down"].to(dtype)) for g, rank in zip(gated, inputs, strict=True)]
        return half(down, residual, first["next_norm"])

    def reference(self, inputs):
        return self._block(inputs, torch.float64)

    def composition(self, inputs):
        return self._block(inputs, self.dtype)

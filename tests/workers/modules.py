"""On every rank: modules made from slices of whole layers, against the layers in float64."""

import torch
import torch.distributed as dist
import torch.nn.functional as F

from commfuse.nn import (
    ColumnParallelLinear,
    GatedColumnParallelLinear,
    ParallelMLP,
    RowParallelLinear,
    VocabParallelEmbedding,
    shard_vocabulary,
    split,
)
from commfuse.runtime.communicator import Communicator

HIDDEN, FEATURES, VOCABULARY, ROWS, EPS = 48, 77, 300, 5, 1e-5


def run() -> list[str]:
    """What is wrong."""
    failures = []
    with Communicator(dist.group.WORLD) as comm:
        for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 3e-2)):
            generator = torch.Generator().manual_seed(4)

            def random(*shape, scale=1.0, generator=generator, dtype=dtype):
                return (torch.randn(shape, generator=generator) * scale).to(dtype)

            for name, ours, exact in _modules(comm, random):
                error = (ours.double() - exact).abs().max() / exact.abs().max()
                if ours.dtype != dtype and name != "tied head":
                    failures.append(f"{name} {dtype}: returns {ours.dtype}")
                if not error <= tolerance:
                    failures.append(f"{name} {dtype}: error {error:.2g}")
    return failures


def _modules(comm, random):
    """(name, this rank's output, what it should be in float64)."""
    mine = split(FEATURES, comm.world_size, comm.rank)
    rows = slice(mine.begin, mine.end)
    x, residual = random(ROWS, HIDDEN), random(ROWS, HIDDEN)
    gate, up = (random(FEATURES, HIDDEN, scale=HIDDEN**-0.5) for _ in range(2))
    gate_bias, up_bias = random(FEATURES), random(FEATURES)
    down, down_bias = random(HIDDEN, FEATURES, scale=FEATURES**-0.5), random(HIDDEN)
    norm = random(HIDDEN)

    column = ColumnParallelLinear(gate[rows], gate_bias[rows])
    exact_gate = F.linear(x.double(), gate.double(), gate_bias.double())
    yield "column", column(x), exact_gate[:, rows]

    plain = GatedColumnParallelLinear(gate[rows], up[rows])
    exact_plain = F.silu(x.double() @ gate.double().T) * (x.double() @ up.double().T)
    yield "gate and up", plain(x), exact_plain[:, rows]
    gated = GatedColumnParallelLinear(gate[rows], up[rows], gate_bias[rows], up_bias[rows])
    exact = F.silu(exact_gate) * F.linear(x.double(), up.double(), up_bias.double())
    yield "gate and up with biases", gated(x), exact[:, rows]

    down_part = RowParallelLinear(down[:, rows], comm, down_bias)
    mlp = ParallelMLP(gated, down_part, EPS)
    y, summed = mlp(x, residual, norm)
    exact = residual.double() + F.linear(exact, down.double(), down_bias.double())
    yield "MLP", summed, exact
    scale = torch.rsqrt(exact.square().mean(-1, keepdim=True) + EPS)
    yield "MLP, normalised", y, exact * scale * norm.double()
    h = gated(x)
    both = F.linear(x.double(), up.double(), up_bias.double())
    both = F.silu(exact_gate) * both @ down.double().T + down_bias.double()
    yield "row", down_part(h), both

    table, tokens = random(VOCABULARY, HIDDEN), torch.tensor([0, 127, 128, 299, 255, 256])
    shard = shard_vocabulary(VOCABULARY, comm.world_size, comm.rank)
    embedding = VocabParallelEmbedding(table[shard.begin : shard.end], shard.begin, comm)
    yield "embedding", embedding(tokens), table[tokens].double()
    yield "tied head", embedding.logits(x), (x.double() @ table.double().T)[
        :, shard.begin : shard.end
    ]  # fmt: skip

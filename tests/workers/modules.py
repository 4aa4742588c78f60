"""On every rank: modules made from slices of whole layers, against the layers in float64."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from commfuse import ops
from commfuse.errors import UsageError
from commfuse.nn import (
    ColumnParallelLinear,
    GatedColumnParallelLinear,
    KVCache,
    MergedColumnParallelLinear,
    ParallelAttention,
    ParallelBlock,
    ParallelMLP,
    RMSNorm,
    RowParallelLinear,
    VocabParallelEmbedding,
    VocabParallelHead,
    shard_heads,
    shard_vocabulary,
    split,
)
from commfuse.ops import Placement
from commfuse.runtime.communicator import Communicator
from commfuse.testing.numerics import digest

HIDDEN, FEATURES, VOCABULARY, ROWS, EPS = 48, 77, 300, 5, 1e-5


def run() -> list[str]:
    """What is wrong, of everything here."""
    return parts() + state_dicts() + blocks()


def parts() -> list[str]:
    """Linear layers, the MLP and the embedding."""
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


def state_dicts() -> list[str]:
    """Modules made from whole layers: their state dicts have the layers' keys, take the layers'
    tensors and this rank's, and refuse others.
    """
    failures = []
    with Communicator(dist.group.WORLD) as comm:
        torch.manual_seed(5)
        kinds = (
            (ColumnParallelLinear.from_linear, lambda: nn.Linear(HIDDEN, FEATURES)),
            (RowParallelLinear.from_linear, lambda: nn.Linear(FEATURES, HIDDEN)),
            (VocabParallelHead.from_linear, lambda: nn.Linear(HIDDEN, VOCABULARY, bias=False)),
            (VocabParallelEmbedding.from_embedding, lambda: nn.Embedding(VOCABULARY, HIDDEN)),
        )
        for make, layer in kinds:
            whole, name = layer(), make.__qualname__
            ours = make(whole, comm)
            state = ours.state_dict()
            for key, tensor in whole.state_dict().items():
                if not torch.equal(state.pop(key), ours.slices[key].of(tensor)):
                    failures.append(f"{name}: {key} is not this rank's part")
            if state:
                failures.append(f"{name}: more keys {list(state)}")
            with torch.device("meta"):
                empty = make(layer(), comm)
            try:
                empty(torch.zeros(1, 1, dtype=torch.int64))
                failures.append(f"{name}: runs without weights")
            except UsageError:
                pass
            # Whole tensors of another layer, into a loaded module and an empty one; then its own.
            other = layer().state_dict()
            for module in (ours, empty):
                module.load_state_dict(other)
                module.load_state_dict(module.state_dict())
                for key, part in module.state_dict().items():
                    if not torch.equal(part, module.slices[key].of(other[key])):
                        failures.append(f"{name}: {key} was not loaded")
            wrong = [{}, {**other, "more": torch.zeros(1)}, {**other, "weight": torch.zeros(7, 7)}]
            for state in wrong:
                try:
                    ours.load_state_dict(state)
                    failures.append(f"{name}: takes {list(state)}")
                except RuntimeError:
                    pass
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
    head, exact = VocabParallelHead(embedding, VOCABULARY, comm), x.double() @ table.double().T
    yield "tied head", head.local(x), exact[:, shard.begin : shard.end]
    yield "tied head, whole", head(x), exact


def _block(comm, dtype, optional: bool) -> ParallelBlock:
    """A block of 6 query heads that share 3 KV heads; weights in proportion, as a model's are."""
    generator = torch.Generator().manual_seed(8)
    dim, heads, kv_heads = 16, 6, 3

    def random(*shape):
        return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).to(dtype)

    q, k, v = (random(count * dim, HIDDEN) for count in (heads, kv_heads, kv_heads))
    output, gate, up = random(HIDDEN, heads * dim), random(FEATURES, HIDDEN), random(77, HIDDEN)
    down = random(HIDDEN, FEATURES)
    before, between = RMSNorm(random(HIDDEN), EPS), RMSNorm(random(HIDDEN), EPS)
    biases = [random(count) for count in (heads * dim, kv_heads * dim, kv_heads * dim)]
    output_bias, gate_bias, up_bias, down_bias = (
        random(count) for count in (HIDDEN, FEATURES, FEATURES, HIDDEN)
    )
    norms = (RMSNorm(random(dim), EPS), RMSNorm(random(dim), EPS))

    shard = shard_heads(heads, kv_heads, comm.world_size, comm.rank)
    query, kv = shard.query.scaled(dim), shard.kv.scaled(dim)
    rows = split(FEATURES, comm.world_size, comm.rank).scaled(1)
    qkv_bias = torch.cat((biases[0][query], biases[1][kv], biases[2][kv])) if optional else None
    attention = ParallelAttention(
        MergedColumnParallelLinear(torch.cat((q[query], k[kv], v[kv])), qkv_bias),
        RowParallelLinear(output[:, query], comm, output_bias if optional else None),
        shard,
        norms=norms if optional else None,
        eps=EPS,
    )
    gated = GatedColumnParallelLinear(
        gate[rows], up[rows], *((gate_bias[rows], up_bias[rows]) if optional else ())
    )
    mlp = ParallelMLP(
        gated, RowParallelLinear(down[:, rows], comm, down_bias if optional else None), EPS
    )
    return ParallelBlock(attention, mlp, before, between)


def blocks() -> list[str]:
    """A block in one call equals its halves one after the other, and a stack its blocks, bit for
    bit; and nearly gloo.
    """
    failures = []
    with (
        Communicator(dist.group.WORLD) as comm,
        Communicator(dist.group.WORLD, transport="torch.distributed") as gloo,
    ):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for optional in (False, True):
                name = f"block {dtype} {optional}"
                block, slow = _block(comm, dtype, optional), _block(gloo, dtype, optional)
                generator = torch.Generator().manual_seed(9)
                x, residual = (
                    torch.randn(7, HIDDEN, generator=generator).to(dtype) for _ in range(2)
                )
                angles = torch.randn(16, 8, generator=generator)
                placement = Placement(
                    torch.tensor([0, 0, 0, 1, 1, 1, 1]),
                    torch.tensor([0, 1, 2, 0, 1, 2, 3]),
                    (angles.cos(), angles.sin()),
                )
                heads = shard_heads(6, 3, comm.world_size, comm.rank)
                caches = KVCache(8, 2, len(heads.kv), 16, 16, dtype).layers
                following = torch.randn(HIDDEN, generator=generator).to(dtype)
                weights = block.weights(following)
                one = block(x, residual, caches[0], placement, following)
                again = block(x, residual, caches[1], placement, following, read_next=weights.qkv)
                middle = block.self_attn(x, caches[2], placement, residual, weights.middle_norm)
                two = block.mlp(*middle, following)
                if not digest(*one) == digest(*again) == digest(*two):
                    failures.append(f"{name}: differs from its halves")
                stack = ops.transformer_blocks(
                    x, residual, [weights] * 2, caches[4:6], placement, comm
                )
                if digest(*stack) != digest(*block(*one, caches[6], placement, following)):
                    failures.append(f"{name}: a stack differs from its blocks")
                other = slow(x, residual, caches[3], placement, following)
                for ours, theirs in zip(one, other, strict=True):
                    distance = (ours.double() - theirs.double()).abs().max()
                    if not distance <= 8 * torch.finfo(dtype).eps * theirs.double().abs().max():
                        failures.append(f"{name}: {distance:.2g} from torch.distributed")
    return failures

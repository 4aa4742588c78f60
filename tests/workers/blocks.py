"""On every rank: parallel blocks made from whole ones in plain torch, and what they refuse."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from commfuse import ops
from commfuse.errors import UsageError
from commfuse.nn import KVCache, MergedColumnParallelLinear, ParallelBlock, gather_state_dict
from commfuse.ops import Placement
from commfuse.runtime.communicator import Communicator
from commfuse.testing.numerics import digest

HIDDEN, FEATURES, DIM, LENGTH, EPS = 48, 77, 16, 7, 1e-5
# (query heads, KV heads, biases and norms of heads); the cut goes through groups and KV heads.
SHAPES = ((6, 3, True), (8, 1, False), (3, 3, False), (8, 8, True))


class Attention(nn.Module):
    """Causal attention as models are written, one sequence [length, hidden]."""

    def __init__(self, heads: int, kv_heads: int, optional: bool):
        super().__init__()
        self.head_dim, self.group = DIM, heads // kv_heads
        self.q_proj = nn.Linear(HIDDEN, heads * DIM, bias=optional)
        self.k_proj = nn.Linear(HIDDEN, kv_heads * DIM, bias=optional)
        self.v_proj = nn.Linear(HIDDEN, kv_heads * DIM, bias=optional)
        self.o_proj = nn.Linear(heads * DIM, HIDDEN, bias=optional)
        self.q_norm = nn.RMSNorm(DIM, eps=EPS) if optional else None
        self.k_norm = nn.RMSNorm(DIM, eps=EPS) if optional else None

    def forward(self, x, cos, sin):
        q, k, v = (
            layer(x).unflatten(1, (-1, DIM)).transpose(0, 1)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)

        def rotate(heads):
            a, b = heads.chunk(2, dim=-1)
            return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

        k, v = (kv.repeat_interleave(self.group, dim=0) for kv in (rotate(k), v))
        y = F.scaled_dot_product_attention(rotate(q), k, v, is_causal=True)
        return self.o_proj(y.transpose(0, 1).flatten(1))


class MLP(nn.Module):
    def __init__(self, bias: bool):
        super().__init__()
        self.gate_proj = nn.Linear(HIDDEN, FEATURES, bias=bias)
        self.up_proj = nn.Linear(HIDDEN, FEATURES, bias=bias)
        self.down_proj = nn.Linear(FEATURES, HIDDEN, bias=bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, heads: int, kv_heads: int, optional: bool):
        super().__init__()
        self.self_attn = Attention(heads, kv_heads, optional)
        self.mlp = MLP(optional)
        self.input_layernorm = nn.RMSNorm(HIDDEN, eps=EPS)
        self.post_attention_layernorm = nn.RMSNorm(HIDDEN, eps=EPS)

    def forward(self, x, cos, sin):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


def randomised(*shape) -> Block:
    block = Block(*shape).requires_grad_(False)
    for name, parameter in block.named_parameters():
        if "norm" in name:
            parameter.uniform_(0.5, 1.5)
    return block


def call(block, x, placement, cache, next_norm):
    """The block as one follows an embedding: its own norm first."""
    return block(
        F.rms_norm(x, (HIDDEN,), block.input_layernorm.weight, EPS), x, cache, placement, next_norm
    )


def prepare():
    angles = torch.randn(16, DIM // 2)
    placement = Placement(
        torch.zeros(LENGTH, dtype=torch.int64), torch.arange(LENGTH), (angles.cos(), angles.sin())
    )
    return torch.randn(LENGTH, HIDDEN), torch.rand(HIDDEN) + 0.5, placement


def new_cache(block, dtype=torch.float32):
    return KVCache(1, 1, len(block.self_attn.shard.kv), LENGTH, DIM, dtype).layers[0]


def relative(ours, exact) -> float:
    return ((ours.double() - exact).abs().max() / exact.abs().max()).item()


def run() -> list[str]:
    """What is wrong, of everything here."""
    failures = []
    torch.manual_seed(11)
    with Communicator(dist.group.WORLD) as comm:
        for shape in SHAPES:
            if comm.world_size <= shape[0]:
                failures += [f"{shape}: {failure}" for failure in one(comm, *shape)]
        failures += refusals(comm)
    return failures


def one(comm, heads, kv_heads, optional):
    """A block against plain torch in float64, made in three ways, and its state dict."""
    whole = randomised(heads, kv_heads, optional)
    x, next_norm, placement = prepare()
    cos, sin = (t[:LENGTH].double() for t in placement.rotary)
    live = ParallelBlock.from_block(whole, comm)
    with torch.device("meta"):
        empty = ParallelBlock.from_block(Block(heads, kv_heads, optional), comm)
    try:
        empty.weights(next_norm)
        yield "runs without weights"
    except UsageError:
        pass
    empty.load_state_dict(whole.state_dict())
    outputs = [call(b, x, placement, new_cache(b), next_norm) for b in (live, empty)]
    if digest(*outputs[0]) != digest(*outputs[1]):
        yield "loaded from a state dict, it differs"
    if any(other != digest(*outputs[0]) for other in gathered(comm, digest(*outputs[0]))):
        yield "ranks differ"

    exact = whole.double()(x.double(), cos, sin)
    whole.float()
    following = F.rms_norm(exact, (HIDDEN,), next_norm.double(), EPS)
    plain = whole(x, cos.float(), sin.float())
    limit = max(2 * relative(plain, exact), 1e-6)
    for ours, reference in zip(outputs[0], (following, exact), strict=True):
        if not relative(ours, reference) <= limit:
            yield f"error {relative(ours, reference):.2g}, plain torch's {limit / 2:.2g}"
    shaped = x.view(1, LENGTH, HIDDEN)
    if not relative(live.mlp(shaped), whole.mlp.double()(shaped.double())) <= 1e-6:
        yield "the MLP alone differs"
    whole.float()

    # The keys of the whole block; its tensors back; another's into weights that are in use.
    if list(live.state_dict()) != list(whole.state_dict()):
        yield f"keys {list(live.state_dict())}"
    other = randomised(heads, kv_heads, optional).state_dict()
    weights = live.weights(next_norm)
    for state in (whole.state_dict(), other):
        live.load_state_dict(state)
        for _ in range(2):
            back = gather_state_dict(live, comm)
            if list(back) != list(state) or not all(torch.equal(back[k], state[k]) for k in state):
                yield "another state dict comes back"
            live.load_state_dict(live.state_dict())
    empty.load_state_dict(other)
    again = [call(b, x, placement, new_cache(b), next_norm) for b in (live, empty)]
    x_in = F.rms_norm(x, (HIDDEN,), other["input_layernorm.weight"], EPS)
    again.append(ops.transformer_blocks(x_in, x, [weights], [new_cache(live)], placement, comm))
    if len({digest(*y) for y in again}) > 1 or digest(*again[0]) == digest(*outputs[0]):
        yield "weights in use were not replaced"
    for wrong in (
        {k: v for k, v in other.items() if "k_proj" not in k},
        {**other, "self_attn.qkv.weight": x},
        {**other, "mlp.up_proj.weight": x},
    ):
        try:
            live.load_state_dict(wrong)
            yield "takes a wrong state dict"
        except RuntimeError:
            pass


def gathered(comm, value):
    """Of all ranks."""
    values = [None] * comm.world_size
    dist.all_gather_object(values, value)
    return values


def refusals(comm):
    """What a block does not stand for is named."""

    def change(path, value):
        block = randomised(6, 3, False)
        parent, _, name = path.rpartition(".")
        setattr(block.get_submodule(parent), name, value)
        return block

    heads = {"q_proj": nn.Linear(8, 4), "k_proj": nn.Linear(8, 4, bias=False)}
    for make, words in (
        (lambda: change("self_attn.head_dim", 24), "multiples of 16"),
        (lambda: change("self_attn.sliding_window", 5), "sliding window"),
        (lambda: change("self_attn.scaling", 1.0), "supported is head_dim"),
        (lambda: change("self_attn.sinks", nn.Parameter(torch.zeros(6))), "has sinks as well"),
        (lambda: change("self_attn.k_proj", nn.Linear(HIDDEN, 5 * DIM)), "not heads of 16"),
        (lambda: change("self_attn.q_norm", nn.RMSNorm(DIM)), "with eps None"),
        (lambda: change("mlp.act_fn", F.gelu), "not SiLU"),
        (lambda: change("mlp.gate_proj", None), "has no gate_proj"),
        (lambda: change("input_layernorm", nn.RMSNorm(HIDDEN, eps=1e-3)), "of one eps"),
        (lambda: change("input_layernorm", nn.LayerNorm(HIDDEN)), "an RMSNorm"),
        (lambda: change("pre_norm", nn.RMSNorm(HIDDEN)), "has pre_norm.weight as well"),
    ):
        try:
            ParallelBlock.from_block(make(), comm)
            yield f"takes what should be refused: {words}"
        except UsageError as error:
            if words not in str(error):
                yield f"{words!r} is not in {error}"
    try:
        MergedColumnParallelLinear.from_linears(heads, comm)
        yield "takes layers with and without bias"
    except UsageError:
        pass


def compiled() -> list[str]:
    """torch.compile of a block in one graph gives its bits, for one shape and then for any."""
    failures = []
    torch.manual_seed(12)
    with Communicator(dist.group.WORLD) as comm:
        block = ParallelBlock.from_block(randomised(6, 3, True), comm)
        fast = torch.compile(block, fullgraph=True, backend="aot_eager")
        x, next_norm, placement = prepare()
        caches = [new_cache(block), new_cache(block)]
        for begin, end in ((0, 4), (4, 5), (5, 7)):  # a prompt, a token, a draft
            here = Placement(
                placement.sequences[begin:end], placement.positions[begin:end], placement.rotary
            )
            plain, ours = (
                call_(x[begin:end], x[begin:end], cache, here, next_norm)
                for call_, cache in zip((block, fast), caches, strict=True)
            )
            if digest(*plain) != digest(*ours):
                failures.append(f"rows {begin} to {end} differ")
    return failures

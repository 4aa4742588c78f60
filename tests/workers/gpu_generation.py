"""On every rank, with a GPU: generation against that on the CPU; graphs against none; a recipe."""

import time
import traceback
from itertools import chain

import torch
import torch.distributed as dist

from commfuse.generation import Generator
from commfuse.models.config import ModelConfig
from commfuse.models.llama import Llama
from commfuse.models.random_weights import RandomCheckpoint
from commfuse.nn import KVCache, ParallelBlock
from commfuse.ops import Placement, Sampling
from commfuse.runtime import launch
from commfuse.runtime.communicator import Communicator

# Heads and features that two and three ranks cannot share evenly; vocabulary shards of 128.
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 300,
    "hidden_size": 96,
    "intermediate_size": 104,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
}
# Together fewer tokens than the decoding kernels' 64 rows: rows then do not know their company.
PROMPTS = [list(range(1, 20)), [5], [7, 8] * 8, [9, 3, 9, 3, 9, 3], [100, 200, 299]]
NEW_TOKENS = 12
OPTIONS = {"temperature": [0.0, 0.8, 1.0, 0.0, 1.3], "top_k": [0, 20, 0, 5, 0], "seed": 3}
Found = list[str]


def make_model(comm, dtype) -> Llama:
    """The same weights on every device: they are made on the CPU."""
    return Llama(RandomCheckpoint(ModelConfig.from_hf(CONFIG), scale=0.15, seed=4), comm, dtype)


def generations(generator: Generator) -> dict:
    """(outputs, log-probabilities), by the way of generating."""
    sampling = Sampling.of(len(PROMPTS), **OPTIONS)
    ways = {
        "greedy": {},
        "drafted": {"draft_length": 3},
        "sampled": {"sampling": sampling},
        "sampled and drafted": {"sampling": sampling, "draft_length": 4},
        "greedy again": {},
    }
    found = {}
    for name, options in ways.items():
        outputs, _, logs = generator.generate(
            PROMPTS, NEW_TOKENS, log_probabilities=True, **options
        )
        found[name] = outputs, logs
    stop = found["greedy"][0][0][4]
    found["one stops"] = generator.generate(PROMPTS, NEW_TOKENS, stop_ids=[stop])[::2]
    found["longer"] = generator.generate(PROMPTS[:2], 300)[::2]  # than the cache that was kept
    return found


def differing(ours: dict, due: dict, label: str) -> Found:
    return [f"{label}: {name}" for name in due if ours[name] != due[name]]


def tokens(comm) -> Found:
    """In float32 the CPU's tokens; log-probabilities up to rounding."""
    with Communicator() as alone:
        due = generations(Generator(make_model(alone, torch.float32)))
    ours = generations(Generator(make_model(comm, torch.float32)))
    found = [f"tokens: {name}" for name in due if ours[name][0] != due[name][0]]
    for name, (_, logs) in due.items():
        pairs = zip(chain(*(ours[name][1] or [])), chain(*(logs or [])), strict=False)
        if any(abs(a - b) > 1e-3 for a, b in pairs):
            found.append(f"log-probabilities: {name}")
    return found


def graphs(comm) -> Found:
    """With graphs and without, every bit; also by torch's ops, whose sums are others."""
    model, found = make_model(comm, torch.bfloat16), []
    for backend in ("auto", "torch"):
        model.backend = backend
        with_graphs = Generator(model)
        ours = generations(with_graphs)
        found += differing(ours, generations(Generator(model, graphs=False)), backend)
        if not any(with_graphs.steps._captured.values()):
            found.append(f"{backend}: nothing was captured")
    return found


def company(comm) -> Found:
    """In bfloat16 neither batch, nor drafts, nor padding change a token."""
    generator = Generator(make_model(comm, torch.bfloat16))
    ours = generations(generator)
    found = []
    for plain, drafted in (("greedy", "drafted"), ("sampled", "sampled and drafted")):
        if ours[plain][0] != ours[drafted][0]:
            found.append(f"{drafted}: other tokens than {plain}")
    alone = [generator.generate([prompt], NEW_TOKENS)[0][0] for prompt in PROMPTS]
    if alone != ours["greedy"][0]:
        found.append("alone: other tokens than in a batch")
    return found


def attention(comm) -> Found:
    """Rows over long caches and of long prompts, against float32 by torch."""
    from commfuse import ops

    found, (heads, kv_heads, dim) = [], (8, 2, 128)
    generator = torch.Generator(str(comm.device)).manual_seed(1)
    length = 3000
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        columns = (heads + 2 * kv_heads) * dim
        qkv = torch.randn(length, columns, generator=generator, device=comm.device).to(dtype)
        shape = (1, kv_heads, 3008, dim)
        caches = tuple(torch.full(shape, torch.nan, dtype=dtype, device=comm.device) for _ in "kv")
        angles = torch.randn(length, dim // 2, generator=generator, device=comm.device)
        positions = torch.arange(length, device=comm.device)
        rotary = angles.cos(), angles.sin()

        def attend(rows, span, caches=caches, qkv=qkv, positions=positions, rotary=rotary):
            own = positions[rows]
            return ops.attention(
                qkv[rows], caches, rotary, own * 0, own, (heads, 0, heads // kv_heads), span=span
            )

        whole = torch.cat([attend(slice(0, 700), None), attend(slice(700, length), None)])
        last = attend(slice(length - 5, length), length)
        q, k, v = (
            x.unflatten(1, (-1, dim)).float().transpose(0, 1)
            for x in qkv.split([heads * dim, kv_heads * dim, kv_heads * dim], dim=1)
        )
        cos, sin = (table[None] for table in rotary)
        q, k = (
            torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
            for a, b in (x.chunk(2, dim=-1) for x in (q, k))
        )
        due = torch.nn.functional.scaled_dot_product_attention(
            q[None], k[None], v[None], is_causal=True, enable_gqa=True
        )[0].transpose(0, 1).flatten(1)  # fmt: skip
        allowed = 8 * torch.finfo(dtype).eps * due.abs().max()
        for name, out, expected in (("prefill", whole, due), ("decoding", last, due[-5:])):
            error = (out.float() - expected).abs().max()
            if not error <= allowed:
                found.append(f"{name} in {dtype} errs by {error:.2g}")
    return found


class Norm(torch.nn.RMSNorm):
    def __init__(self):
        super().__init__(96, eps=1e-5)


class Attention(torch.nn.Module):
    """As the Llama family names its layers; computed by ParallelBlock alone."""

    def __init__(self):
        super().__init__()
        self.head_dim = 16
        self.q_proj = torch.nn.Linear(96, 96, bias=False)
        self.k_proj = torch.nn.Linear(96, 48, bias=False)
        self.v_proj = torch.nn.Linear(96, 48, bias=False)
        self.o_proj = torch.nn.Linear(96, 96, bias=False)


class MLP(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj = torch.nn.Linear(96, 160, bias=False)
        self.up_proj = torch.nn.Linear(96, 160, bias=False)
        self.down_proj = torch.nn.Linear(160, 96, bias=False)


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn, self.mlp = Attention(), MLP()
        self.input_layernorm, self.post_attention_layernorm = Norm(), Norm()


def recipe(comm) -> Found:
    """That of docs/modules.md: a block of one's own in a graph, against the CPU's, step by step."""
    torch.manual_seed(0)
    whole, found, steps = Layer().requires_grad_(False), [], 6
    inputs, angles = torch.randn(steps, 1, 96), torch.randn(16, 8)

    def block_on(comm, device):
        with torch.device("meta"):
            empty = Layer()
        made = ParallelBlock.from_block(empty, comm)
        made.load_state_dict({name: x.to(device) for name, x in whole.state_dict().items()})
        heads = len(made.self_attn.shard.kv)
        return made, KVCache(1, 1, heads, 16, 16, torch.float32, device).layers[0]

    with Communicator() as alone:
        block, cache = block_on(alone, "cpu")
        due = []
        for number in range(steps):
            places = torch.tensor([number])
            placement = Placement(places * 0, places, (angles.cos(), angles.sin()))
            due.append(block(inputs[number], inputs[number], cache, placement, torch.ones(96))[1])

    block, cache = block_on(comm, comm.device)
    x = torch.zeros(1, 96, device=comm.device)
    position = torch.zeros(1, dtype=torch.int64, device=comm.device)
    rotary = angles.cos().to(comm.device), angles.sin().to(comm.device)
    norm = torch.ones(96, device=comm.device)
    placement = Placement(torch.zeros_like(position), position, rotary, span=16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):

        def step():
            return block(x, x, cache, placement, norm)

        step()
        comm.check()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            _, residual = step()
        for number in range(steps):
            x.copy_(inputs[number])
            position.fill_(number)
            graph.replay()
            comm.check()
            if not torch.allclose(residual.cpu(), due[number], rtol=1e-4, atol=1e-4):
                found.append(f"step {number}")
    return found


def memory(comm) -> Found:
    """What a captured GEMM needs besides its tensors goes with its graph."""
    from commfuse import ops

    x = torch.zeros(1, 4096, device=comm.device, dtype=torch.bfloat16)
    w = torch.zeros(40 * 64, 4096, device=comm.device, dtype=torch.bfloat16)
    held = []
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(4):
            graph = torch.cuda.CUDAGraph()
            ops.matmul(x, w, backend="cuda")
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                ops.matmul(x, w, backend="cuda")
            graph.replay()
            ops.matmul(x, w, backend="cuda")
            del graph
            held.append(torch.cuda.memory_allocated(comm.device))
    return [] if len(set(held)) == 1 else [f"bytes held after each capture: {held}"]


CHECKS = (attention, tokens, graphs, company, recipe, memory)


def run() -> dict[str, Found]:
    device, found = launch.use_gpu(), {}
    with torch.inference_mode():
        for check in CHECKS:
            begin = time.monotonic()
            group = dist.group.WORLD if dist.get_world_size() > 1 else None
            comm = Communicator(group, device=device)
            try:
                found[check.__name__] = check(comm)
            except Exception:
                found[check.__name__] = [traceback.format_exc()]
            finally:
                dist.barrier()
                comm.close()
                dist.barrier()
            if dist.get_rank() == 0:
                print(f"{check.__name__}: {time.monotonic() - begin:.1f} s", flush=True)
    return found

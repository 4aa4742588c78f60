"""On every rank: generation with static shapes and with the ops that GPUs run, on the CPU."""

import importlib
import os

import torch
import torch.distributed as dist

from commfuse.generation import Generator, inputs, steps
from commfuse.models.config import ModelConfig
from commfuse.models.llama import Llama
from commfuse.models.random_weights import RandomCheckpoint
from commfuse.nn import linear
from commfuse.ops import Sampling
from commfuse.ops._registry import Op
from commfuse.runtime.communicator import Communicator

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 300,
    "hidden_size": 72,
    "intermediate_size": 101,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "float32",
}
PROMPTS = [list(range(1, 20)), [5], [7, 8] * 11, [9, 3, 9, 3, 9, 3], [100, 200, 299]]
NEW_TOKENS = 12
OPTIONS = {"temperature": [0.0, 0.8, 1.0, 0.0, 1.3], "top_k": [0, 20, 0, 5, 0], "seed": 3}


def make_model(comm, packed: bool = True) -> Llama:
    """A small model whose sizes nothing divides evenly; unpacked, as on a GPU."""
    checkpoint = RandomCheckpoint(ModelConfig.from_hf(CONFIG), scale=0.15, seed=4)
    whole, gated = linear._prepare, linear._prepare_gated
    if not packed:
        linear._prepare, linear._prepare_gated = lambda w: w, lambda *both: torch.cat(both)
    try:
        return Llama(checkpoint, comm)
    finally:
        linear._prepare, linear._prepare_gated = whole, gated


def generations(generator: Generator) -> dict:
    """Outputs, log-probabilities and the tokens a step yields, by the way of generating."""
    found = {}

    def generate(name, prompts=PROMPTS, new_tokens=NEW_TOKENS, **options):
        outputs, statistics, logs = generator.generate(prompts, new_tokens, **options)
        found[name] = outputs, logs, (statistics.steps, statistics.request_steps)

    sampling = Sampling.of(len(PROMPTS), **OPTIONS)
    generate("greedy")
    generate("drafted", draft_length=3)
    generate("sampled", sampling=sampling, log_probabilities=True)
    generate("sampled and drafted", sampling=sampling, draft_length=4, log_probabilities=True)
    stop = found["greedy"][0][0][4]
    generate("one stops", stop_ids=[stop])
    generate("one stops, drafted", stop_ids=[stop], draft_length=3)
    generate("fewer requests", PROMPTS[2:4])
    generate("more requests", PROMPTS * 4, 3)
    generate("longer ones", PROMPTS[1:2], 60)  # than the cache that was kept
    generate("greedy again")
    return found


class _Call:
    """What stands for a CUDA graph on the CPU: the pass again, over the same memory."""

    def __init__(self, made, data, sizes):
        self.made, self.data, self.sizes = made, data, sizes
        self.results = made._run(data, sizes)

    def replay(self):
        self.results.copy_(self.made._run(self.data, self.sizes))


_CAPTURED: list[tuple] = []


def _capture(self, sizes):
    _CAPTURED.append(tuple(sizes))
    data = torch.empty(sum(sizes.widths), dtype=torch.int64)
    # Of padding alone: a graph only records the pass.
    values = zip(inputs.padding(self._sequences - 1), sizes.widths, strict=True)
    numbers = [value for value, width in values for _ in range(width)]
    call = _Call(self, data.copy_(torch.tensor(numbers)), sizes)
    return steps._Graph(call, data, call.results)


def run() -> dict:
    """By kind of engine: what it generated; and the sizes of steps that were captured."""
    with Communicator(dist.group.WORLD) as comm:
        model = make_model(comm)
        found = {"exact": generations(Generator(model))}
        steps.CACHE_GRANULE, inputs.LEAST_SPAN = 16, 32
        graphs = Generator(model, static=True)
        graphs.steps.graphs, steps.Steps._capture = True, _capture
        found["graphs"] = generations(graphs)
        found["captured"] = _CAPTURED
        # transformer_blocks as the ops of a GPU in turn, over plain weights.
        found["in turn"] = generations(Generator(make_model(comm, packed=False), static=True))
        return found


def interpreted() -> dict:
    """With attention as on a GPU, in Triton's interpreter: alone and in a batch, with drafts."""
    assert os.environ["TRITON_INTERPRET"] == "1"
    with Communicator(dist.group.WORLD) as comm:
        prompts, found = [[7, 8, 7], [5]], {}
        for name, packed in (("cpu", True), ("triton", False)):
            generator = Generator(make_model(comm, packed), static=True)
            if name == "triton":
                module = importlib.import_module("commfuse.ops.attention")
                kernels = tuple(b for b in module.OP.backends if b.name == "triton")
                module.OP = Op("attention", kernels)
            found[name] = generator.generate(prompts, 3, draft_length=1)[0]
        return found

"""What the layers and the steps of ``commfuse generate`` cost on the CPU beside their bytes."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from commfuse import ops
from commfuse.bench.timing import gather
from commfuse.runtime.communicator import Communicator

TINY = {"hidden": 128, "features": 256, "heads": 4, "head_dim": 32}  # a layer that is all overhead
TINY_LAYERS, TINY_VOCABULARY, STEPS = 32, 512, 32
KERNELS = 10  # that the planner counts in a layer
REPEATS, CALLS = 25, 10


def seconds(call: Callable[[], object], comm: Communicator | None) -> float:
    """On the CPU, the median of some calls, which all ranks of a communicator begin together."""
    times = []
    for _ in range(REPEATS):
        if comm is not None:
            comm.barrier()
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def random_tensor(comm: Communicator, *shape: int) -> torch.Tensor:
    """bfloat16, where the communicator's tensors are."""
    return torch.randn(*shape, device=comm.device).to(torch.bfloat16)


def overheads(comm: Communicator, all_reduce: float) -> dict[str, float]:
    """Seconds of a layer, an all-reduce and a step beyond what the planner counts by bytes."""
    with Communicator() as single:
        layer = _tiny_layer_seconds(single)
    kernel = layer / KERNELS
    tiny = _tiny_layer_seconds(comm)
    waiting = (tiny - layer) / 2 - all_reduce * 1e-6
    slowest = max(gather(waiting, comm))
    return {
        "kernel": max(gather(kernel, comm)),
        "sync": max(slowest, 1e-8),
        "step": max(gather(_step_seconds(comm, tiny), comm)),
        "attention_memory": 0.5,
        "arrival": 1e-3,
        "load": 1.0,
    }


def _tiny_layer_seconds(comm: Communicator) -> float:
    """A layer whose weights take no time to read, its all-reduces included."""
    layers = layers_of(comm, TINY, TINY_LAYERS)

    def run() -> None:
        for _ in range(CALLS):
            layers()

    return seconds(run, comm) / CALLS / TINY_LAYERS


def layers_of(comm: Communicator, sizes: dict[str, int], count: int) -> Callable[[], object]:
    """A decoding step of one request through so many layers; called once."""
    hidden, features = sizes["hidden"], sizes["features"]
    heads, head_dim = sizes["heads"], sizes["head_dim"]
    width = heads * head_dim
    blocks = [
        ops.BlockWeights(
            qkv=ops.pack_weight(random_tensor(comm, 3 * width, hidden)),
            output=ops.pack_weight(random_tensor(comm, hidden, width)),
            gate_up=ops.pack_gate_up(*(random_tensor(comm, features, hidden) for _ in range(2))),
            down=ops.pack_weight(random_tensor(comm, hidden, features)),
            middle_norm=random_tensor(comm, hidden),
            next_norm=random_tensor(comm, hidden),
            heads=(heads, 0, 1),
            eps=1e-5,
        )
        for _ in range(count)
    ]
    shape = (1, heads, 16, head_dim)
    caches = [tuple(torch.zeros(shape, dtype=torch.bfloat16) for _ in "kv") for _ in blocks]
    rotary = (torch.ones(16, head_dim // 2), torch.zeros(16, head_dim // 2))
    placement = ops.Placement(torch.tensor([0]), torch.tensor([1]), rotary)
    x = random_tensor(comm, 1, hidden) * 0.01

    def run() -> object:
        return ops.transformer_blocks(x, x.clone(), blocks, caches, placement, comm)

    run()
    return run


def _step_seconds(comm: Communicator, layer: float) -> float:
    """What a decoding step of the engine does outside its layers, but for the head's GEMM.

    Args:
        comm: of all ranks.
        layer: seconds of the only layer of the tiny model that is run.
    """
    from commfuse.generation import Generator
    from commfuse.models.checkpoint import open_checkpoint
    from commfuse.models.llama import Llama

    with tempfile.TemporaryDirectory(prefix="commfuse-profile-") as folder:
        _write_tiny_model(Path(folder))
        with open_checkpoint(Path(folder)) as checkpoint:
            generator = Generator(Llama(checkpoint, comm, torch.bfloat16))
        steps = []
        for _ in range(REPEATS):
            comm.barrier()
            done = generator.generate([[1]], STEPS + 1, stop_ids=()).statistics
            steps.append(done.decode_seconds / done.steps)
    return max(0.0, statistics.median(steps) - layer)


def _write_tiny_model(folder: Path) -> None:
    """A Llama of one layer that is all overhead."""
    from safetensors.torch import save_file

    hidden, features = TINY["hidden"], TINY["features"]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": features,
        "num_hidden_layers": 1,
        "num_attention_heads": TINY["heads"],
        "head_dim": TINY["head_dim"],
        "vocab_size": TINY_VOCABULARY,
        "max_position_embeddings": 2 * STEPS,
        "rms_norm_eps": 1e-5,
    }
    layer, table = "model.layers.0", (TINY_VOCABULARY, hidden)
    shapes = {"model.embed_tokens": table, "lm_head": table, "model.norm": (hidden,)}
    shapes |= {f"{layer}.self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
    shapes |= {f"{layer}.mlp.{name}_proj": (features, hidden) for name in ("gate", "up")}
    shapes[f"{layer}.mlp.down_proj"] = (hidden, features)
    for name in ("input_layernorm", "post_attention_layernorm"):
        shapes[f"{layer}.{name}"] = (hidden,)
    tensors = {f"{n}.weight": torch.ones(s, dtype=torch.bfloat16) for n, s in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))

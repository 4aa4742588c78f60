"""What the parts of a model cost in a decoding pass, measured: by what stages are cut."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable

import torch

from commfuse import ops
from commfuse.models.config import ModelConfig
from commfuse.models.llama import Llama
from commfuse.models.stages import StageCosts, layer_weights
from commfuse.ops import Placement, Sampling
from commfuse.runtime.mesh import Mesh

PASSES = 8  # the fastest counts: whoever else is at work only adds time
POSITIONS = 128  # that a token looks back at
# As many layers are computed as have this size together: a cache that keeps one of them between two
# passes does not keep a model.
LAYERS_BYTES = 64 << 20
WEIGHT = 2.0**-6  # of no meaning, but no zero: pages of zeros may all be one page


class _BlankCheckpoint:
    """Looks like a checkpoint of a model, and has one number everywhere."""

    def __init__(self, config: ModelConfig):
        self.config = config
        hidden, features = config.hidden_size, config.intermediate_size
        query, kv = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
        self._shapes = {
            "embed_tokens": (config.vocab_size, hidden),
            "lm_head": (config.vocab_size, hidden),
            "q_proj": (query, hidden),
            "k_proj": (kv, hidden),
            "v_proj": (kv, hidden),
            "o_proj": (hidden, query),
            "gate_proj": (features, hidden),
            "up_proj": (features, hidden),
            "down_proj": (hidden, features),
            "q_norm": (config.head_dim,),
            "k_norm": (config.head_dim,),
        }

    def read(
        self,
        name: str,
        *,
        rows: slice | None = None,
        columns: slice | None = None,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """As :meth:`Checkpoint.read`."""
        *_, module, kind = name.split(".")
        shape = self._shapes.get(module, (self.config.hidden_size,))  # else a norm
        if kind == "bias":
            shape = shape[:1]
        cuts = [rows or slice(None), columns or slice(None)][: len(shape)]
        sizes = [len(range(size)[cut]) for size, cut in zip(shape, cuts, strict=True)]
        return torch.full(sizes, WEIGHT, dtype=dtype)


@torch.inference_mode()
def measure_costs(
    config: ModelConfig, mesh: Mesh, dtype: torch.dtype | None = None, rows: int = 1
) -> StageCosts:
    """Measures a layer, the embedding and the head, on all ranks at once; rank 0's figures count.

    Nothing is read: weights of the same shapes do. It takes memory and time for a few layers and
    the head (SmolLM2-135M: half a second; of a model of 8 billion parameters they have 1.5 GB).

    Args:
        config: of the model.
        mesh: its ranks; all must call.
        dtype: of weights and activations; None: the checkpoint's.
        rows: tokens of a decoding pass.

    Returns:
        The same on every rank.

    Raises:
        UsageError: the model cannot be split over the ranks of a stage.
        CommunicatorError: a rank failed; see :mod:`commfuse.errors`.

    Example:
        >>> costs = measure_costs(checkpoint.config, mesh)
        >>> stage = cut_stages(checkpoint.config, 2, costs=costs)[mesh.pp.rank]
    """
    layer_bytes = layer_weights(config) * (dtype or config.dtype).itemsize / mesh.tp.world_size
    layers = min(config.num_layers, math.ceil(LAYERS_BYTES / layer_bytes))
    model = Llama(_BlankCheckpoint(dataclasses.replace(config, num_layers=layers)), mesh.tp, dtype)
    times = _times(model, rows)
    mine = StageCosts(
        embedding_ns=times["embedding"], layer_ns=times["layers"] // layers, head_ns=times["head"]
    )
    return mesh.pp.gather(mesh.tp.gather(mine)[0])[0]


def _times(model: Llama, rows: int) -> dict[str, int]:
    """Nanoseconds of each part of a pass."""
    config, comm = model.config, model.comm
    length = min(POSITIONS, config.max_position_embeddings)
    cache = model.new_cache(rows, length)
    for part in (part for layer in cache.layers for part in layer):
        part.zero_()
    positions = torch.full((rows,), length - 1)
    placement = Placement(torch.arange(rows), positions, model.rotary(length))
    tokens = torch.arange(rows) % config.vocab_size
    sampling = Sampling.of(rows)
    stack = [block.weights(model.first_norm) for block in model.blocks]
    found: dict[str, list[int]] = {"embedding": [], "layers": [], "head": []}

    def timed(what: str, call: Callable[[], object]) -> object:
        begin = time.perf_counter_ns()
        result = call()
        found[what].append(time.perf_counter_ns() - begin)
        return result

    def head(x: torch.Tensor) -> object:
        logits = model.head.local(x)
        begin = model.vocabulary.begin
        return ops.vocab_parallel_sample(logits, sampling, positions, begin, comm)

    for _ in range(PASSES):
        comm.barrier()
        x, residual = timed(
            "embedding", lambda: model.embedding(tokens, model.first_norm, config.rms_norm_eps)
        )
        blocks = (x, residual, stack, cache.layers, placement, comm)
        x, _ = timed("layers", lambda blocks=blocks: ops.transformer_blocks(*blocks))
        timed("head", lambda x=x: head(x))
    return {what: min(taken) for what, taken in found.items()}

"""A layout: how many ranks split a layer, how many stages the layers, and where they lie."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from commfuse.planner.cluster import Cluster
from commfuse.planner.model import WEIGHT_BYTES, Model


@dataclass(frozen=True, order=True)
class Layout:
    """One way to spread a model.

    Attributes:
        tp: ranks that split each layer.
        pp: stages.
        replicas: copies of the whole, which share nothing.

    Example:
        >>> str(Layout(4, 3, 1)), Layout(4, 3, 1).devices
        ('TP4 x PP3', 12)
    """

    tp: int
    pp: int = 1
    replicas: int = 1

    @property
    def devices(self) -> int:
        """How many it takes."""
        return self.tp * self.pp * self.replicas

    @property
    def single(self) -> Layout:
        """One of its replicas."""
        return Layout(self.tp, self.pp)

    def __str__(self) -> str:
        parts = [f"TP{self.tp}"] if self.tp > 1 else []
        parts += [f"PP{self.pp}"] if self.pp > 1 else []
        text = " x ".join(parts) or "one device"
        return f"{self.replicas} x ({text})" if self.replicas > 1 else text


@dataclass(frozen=True)
class Stage:
    """Stages that cost the same.

    Attributes:
        tp: ranks of each.
        layers: of each.
        last: whether it computes the head, and the host's work is counted with it.
        begin: where its first device lies, in the domain that holds all of them.
        count: how many there are.
    """

    tp: int
    layers: int
    last: bool
    begin: int
    count: int


@functools.lru_cache(maxsize=4096)
def stages(
    model: Model, cluster: Cluster, layout: Layout, dtype: str = "bf16"
) -> tuple[Stage, ...]:
    """The stages of a replica, alike ones together."""
    found: dict[tuple, int] = {}
    for stage, layers in enumerate(stage_layers(model, layout.pp, dtype)):
        # Two groups that lie alike in their domains cost the same.
        begin = cluster.canonical_begin(stage * layout.tp, layout.tp)
        key = (layers, stage == layout.pp - 1, begin)
        found[key] = found.get(key, 0) + 1
    return tuple(Stage(layout.tp, *key, count) for key, count in found.items())


@functools.lru_cache(maxsize=4096)
def stage_layers(model: Model, pp: int, dtype: str = "bf16") -> tuple[int, ...]:
    """Layers of each stage, as the engine cuts them: by what a step reads, the head included.

    The embedding counts nothing: a step reads a row of it for each token. Where it lies it takes
    memory, see :func:`commfuse.planner.memory.memory_of`.

    Args:
        model: to be cut.
        pp: stages.
        dtype: of the layers' weights; the head has 16 bits.

    Example:
        >>> stage_layers(load_model("llama-3.1-405b"), 4)
        (32, 32, 31, 31)
    """
    counts, loads = [1] * pp, [1.0] * pp
    loads[-1] += model.embedding_parameters * 2.0 / model.layer_parameters / WEIGHT_BYTES[dtype]
    for _ in range(model.num_layers - pp):
        least = min(range(pp), key=lambda stage: loads[stage])
        counts[least] += 1
        loads[least] += 1
    return tuple(counts)

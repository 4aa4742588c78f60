"""Ranks as a mesh: pipeline stages by tensor-parallel ranks."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from commfuse.errors import UsageError
from commfuse.runtime import agreement
from commfuse.runtime.communicator import Communicator
from commfuse.runtime.link import Link


@dataclass
class Mesh:
    """A pp x tp mesh of ranks, and this rank's communicators in it.

    Attributes:
        device_mesh: torch's mesh, dimensions ``("pp", "tp")``; None for a single process that was
            started without a launcher, and once it is closed.
        tp: over the ranks that split each layer.
        pp: over the ranks that split the layers.
    """

    device_mesh: DeviceMesh | None
    tp: Communicator
    pp: Communicator

    def close(self) -> None:
        """Closes both communicators, and lets go of torch's process groups."""
        self.tp.close()
        self.pp.close()
        self.device_mesh = None

    def __enter__(self) -> Mesh:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def init_mesh(
    tp: int = 1,
    pp: int = 1,
    *,
    device: torch.device | str = "cpu",
    links: dict[str, Link] | None = None,
    **communicator_options,
) -> Mesh:
    """Builds the mesh of this job from torchrun's environment, with one communicator a dimension.

    Args:
        tp: ranks that split each layer (tensor parallelism), neighbours in rank order.
        pp: ranks that split the layers (pipeline parallelism).
        device: of the communicators: ``"cpu"``, or ``"cuda"`` for this rank's current GPU.
        links: an emulated link by dimension, ``"tp"`` or ``"pp"``.
        communicator_options: passed to every :class:`Communicator`.

    Raises:
        UsageError: tp x pp is not the number of ranks that were started.

    Example:
        >>> with init_mesh(tp=2) as mesh:      # under torchrun --nproc-per-node 2
        ...     y = commfuse.ops.all_reduce(x, mesh.tp)
    """
    if tp < 1 or pp < 1:
        raise UsageError(f"tp={tp}, pp={pp}: both must be at least 1")
    world = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))
    if tp * pp != world:
        raise UsageError(
            f"tp={tp} x pp={pp} needs {tp * pp} ranks, and {world} were started: use "
            f"torchrun --nproc-per-node {tp * pp}, or other sizes"
        )
    links = links or {}
    names = {"tp": "ranks of a stage" if pp > 1 else None, "pp": "stages"}
    options = {
        dimension: {
            "device": device,
            "link": links.get(dimension),
            "name": name,
            **communicator_options,
        }
        for dimension, name in names.items()
    }
    if world == 1 and not dist.is_initialized():
        return Mesh(None, Communicator(None, **options["tp"]), Communicator(None, **options["pp"]))
    # Ranks agree with each other on the CPU (gloo), whatever the communicators are for.
    device_mesh = init_device_mesh("cpu", (pp, tp), mesh_dim_names=("pp", "tp"))
    # Where one of them cannot be had, ranks that have no part in it must not go on, either.
    world = dist.group.WORLD
    tp_ranks = agreement.attempt(world, lambda: Communicator(device_mesh["tp"], **options["tp"]))
    try:
        stages = agreement.attempt(world, lambda: Communicator(device_mesh["pp"], **options["pp"]))
    except Exception:
        tp_ranks.close()
        raise
    return Mesh(device_mesh, tp_ranks, stages)

"""The ranks' tensors, put together."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from commfuse import _extension
from commfuse.errors import UsageError
from commfuse.ops._registry import (
    Backend,
    Op,
    cpu_obstacle,
    cuda_obstacle,
    define,
    torch_obstacle,
)
from commfuse.runtime import torch_collectives
from commfuse.runtime.communicator import Communicator


def _check_dimensions(x: torch.Tensor) -> None:
    if x.dim() == 0:
        raise UsageError("x has 0 dimensions; the ranks' are joined along the first one")


def _fake(x: torch.Tensor, communicator: int) -> torch.Tensor:
    _check_dimensions(x)
    world_size = _extension.require().world_size(communicator)
    return x.new_empty((world_size * x.shape[0], *x.shape[1:]))


_all_gather = define("all_gather(Tensor x, int communicator) -> Tensor", _fake)


def reference(xs: Sequence[torch.Tensor]) -> torch.Tensor:
    """All ranks' ``x`` in rank order, in float64."""
    return torch.cat([x.double() for x in xs])


def _native(x: torch.Tensor, comm: Communicator) -> torch.Tensor:
    return _all_gather(x, comm.handle)


def _torch(x: torch.Tensor, comm: Communicator) -> torch.Tensor:
    _check_dimensions(x)
    gathered = torch_collectives.all_gather(comm, x).flatten(0, 1)
    return gathered.clone() if comm.world_size == 1 else gathered  # of one rank it is x itself


OP = Op(
    "all_gather",
    (
        Backend("cpu", _native, cpu_obstacle),
        Backend("cuda", _native, cuda_obstacle),
        Backend("torch", _torch, torch_obstacle),
    ),
)


def all_gather(x: torch.Tensor, comm: Communicator, backend: str = "auto") -> torch.Tensor:
    """Puts the ranks' ``x`` together along the first dimension, in rank order.

    Bits are copied as they are, those of NaN too.

    Args:
        x: [m, …], contiguous; bfloat16, float16 or float32. Equal shape and dtype on all ranks.
        comm: of W ranks; every rank must call.
        backend: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"torch"`` (torch.distributed).

    Returns:
        A new tensor [W·m, …], the same on every rank.

    Raises:
        ValueError: x has no dimension.
        CommunicatorError, BackendUnavailable: as :func:`~commfuse.ops.all_reduce`.

    Example:
        >>> all_gather(torch.full((2,), float(comm.rank)), comm)  # on each of two ranks
        tensor([0., 0., 1., 1.])
    """
    return OP.select(backend, comm, x)(x, comm)

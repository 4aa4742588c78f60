"""Sum over ranks, of which every rank keeps its part."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from commfuse import _extension
from commfuse.errors import UsageError
from commfuse.ops._hierarchical import SUMS, hierarchical_obstacle
from commfuse.ops._registry import (
    Backend,
    Op,
    cpu_obstacle,
    cuda_obstacle,
    define,
    torch_obstacle,
)
from commfuse.runtime.communicator import Communicator


def _rows_of_a_rank(x: torch.Tensor, world_size: int) -> int:
    if x.dim() == 0:
        raise UsageError("x has 0 dimensions; the ranks share its first one")
    rows = x.shape[0] // world_size
    if rows * world_size != x.shape[0]:
        raise UsageError(
            f"x has {x.shape[0]} rows, which {world_size} ranks cannot share evenly; use "
            f"{rows * world_size} or {(rows + 1) * world_size}"
        )
    return rows


def _fake(x: torch.Tensor, communicator: int, part_of: list[int] | None = None) -> torch.Tensor:
    world_size = _extension.require().world_size(communicator)
    return x.new_empty((_rows_of_a_rank(x, world_size), *x.shape[1:]))


# part_of: the shape of the message that x is made of, which ranks must then agree on in its place.
_reduce_scatter = define(
    "reduce_scatter(Tensor x, int communicator, int[]? part_of=None) -> Tensor", _fake
)


def reference(xs: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of all ranks' ``x`` in float64; rank r's part is the r-th of W equal ones."""
    return torch.stack([x.double() for x in xs]).sum(0)


def _native(x: torch.Tensor, comm: Communicator) -> torch.Tensor:
    return _reduce_scatter(x, comm.handle)


def _by(name: str):
    def run(x: torch.Tensor, comm: Communicator) -> torch.Tensor:
        rows = _rows_of_a_rank(x, comm.world_size)
        # Not every process group can reduce and scatter: gloo sums up everything in any case.
        return SUMS[name](comm, x.clone()).narrow(0, comm.rank * rows, rows)

    return run


OP = Op(
    "reduce_scatter",
    (
        Backend("cpu", _native, cpu_obstacle),
        Backend("cuda", _native, cuda_obstacle),
        Backend("hierarchical", _by("hierarchical"), hierarchical_obstacle),
        Backend("torch", _by("torch"), torch_obstacle),
    ),
)


def reduce_scatter(x: torch.Tensor, comm: Communicator, backend: str = "auto") -> torch.Tensor:
    """Sums ``x`` over the ranks of ``comm`` and leaves each rank the rows that are its own.

    The ranks' values are added in float32 in rank order and rounded once: the rows of all ranks,
    put together, have the bits of :func:`~commfuse.ops.all_reduce`.

    Args:
        x: [W·m, …], contiguous; bfloat16, float16 or float32. Equal shape and dtype on all ranks.
        comm: of W ranks; every rank must call.
        backend: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"hierarchical"`` or ``"torch"`` (the last two:
            their all-reduce, of which the rank's rows are kept).

    Returns:
        [m, …]: rows rank·m to (rank + 1)·m of the sum.

    Raises:
        ValueError: x has no dimension, or a number of rows that W does not divide; the message says
            which numbers would do. Nothing has been exchanged then.
        CommunicatorError, BackendUnavailable: as :func:`~commfuse.ops.all_reduce`.

    Example:
        >>> reduce_scatter(torch.arange(4.0), comm)      # on each of two ranks; here on rank 1
        tensor([4., 6.])
    """
    return OP.select(backend, comm, x)(x, comm)

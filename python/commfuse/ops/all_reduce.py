"""Sum over ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from commfuse.ops._cuda_ways import all_reduce_way
from commfuse.ops._hierarchical import SUMS, hierarchical_obstacle
from commfuse.ops._registry import (
    Backend,
    Op,
    cpu_obstacle,
    cuda_obstacle,
    define,
    torch_obstacle,
)
from commfuse.ops._triton import all_reduce_triton, triton_obstacle
from commfuse.runtime.communicator import Communicator


def _fake(x: torch.Tensor, communicator: int) -> torch.Tensor:
    return torch.empty_like(x)


def _fake_in_place(x: torch.Tensor, communicator: int) -> None:
    return None


_all_reduce = define("all_reduce(Tensor x, int communicator) -> Tensor", _fake)
_all_reduce_in_place = define("all_reduce_(Tensor(a!) x, int communicator) -> ()", _fake_in_place)


def reference(xs: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of all ranks' ``x`` in float64."""
    return torch.stack([x.double() for x in xs]).sum(0)


def _native(x: torch.Tensor, comm: Communicator, in_place: bool) -> torch.Tensor:
    if not in_place:
        return _all_reduce(x, comm.handle)
    _all_reduce_in_place(x, comm.handle)
    return x


def _by(name: str):
    def run(x: torch.Tensor, comm: Communicator, in_place: bool) -> torch.Tensor:
        total = SUMS[name](comm, x if in_place else x.clone())
        return total if total is x or not in_place else x.copy_(total)

    return run


# Of both all_reduce and all_reduce_.
OP = Op(
    "all_reduce",
    (
        Backend("cpu", _native, cpu_obstacle),
        Backend("cuda", _native, cuda_obstacle, way=all_reduce_way),
        Backend("triton", all_reduce_triton, triton_obstacle, automatic=False),
        Backend("hierarchical", _by("hierarchical"), hierarchical_obstacle),
        Backend("torch", _by("torch"), torch_obstacle),
    ),
)


def all_reduce(x: torch.Tensor, comm: Communicator, backend: str = "auto") -> torch.Tensor:
    """Sums ``x`` over the ranks of ``comm``.

    The ranks' values are added in float32 in rank order and rounded once, so that every rank gets
    the same bits, on every run. Small messages are exchanged in one shot, large ones among three
    ranks or more in two (reduce-scatter, then all-gather).

    Args:
        x: any shape, contiguous; bfloat16, float16 or float32. Equal shape and dtype on all ranks.
        comm: every rank must call.
        backend: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"triton"``, ``"hierarchical"`` (ranks on
            several hosts: within each, across, within each) or ``"torch"`` (torch.distributed:
            equality across ranks only).

    Returns:
        A new tensor like ``x``.

    Raises:
        CommunicatorError: a rank called something else, was late, or is gone. On a GPU a later call
            or ``comm.check()`` raises it.
        BackendUnavailable: ``backend`` cannot serve this call; the message says why.

    Example:
        >>> all_reduce(torch.ones(4), comm)      # on each of two ranks
        tensor([2., 2., 2., 2.])
    """
    return OP.select(backend, comm, x)(x, comm, False)


def all_reduce_(x: torch.Tensor, comm: Communicator, backend: str = "auto") -> torch.Tensor:
    """Sums ``x`` over the ranks of ``comm``, in place: the bits of :func:`all_reduce`.

    Works on any tensor. On a GPU it is fastest on one from ``comm.empty(shape, dtype)``, which lies
    in memory that the GPUs map of each other.

    Args:
        x: as for :func:`all_reduce`; overwritten with the sum.
        comm: every rank must call.
        backend: as for :func:`all_reduce`, whose backends it has.

    Returns:
        ``x`` itself.

    Raises:
        CommunicatorError, BackendUnavailable: as :func:`all_reduce`. What ``x`` holds after a
            CommunicatorError is undefined.

    Example:
        >>> x = torch.ones(4)                    # on each of two ranks
        >>> all_reduce_(x, comm) is x, x
        (True, tensor([2., 2., 2., 2.]))
    """
    return OP.select(backend, comm, x)(x, comm, True)

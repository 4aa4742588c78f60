"""Collectives by torch.distributed: what commfuse competes with, and uses where nothing else can.

All ranks call them together. They count in the communicator's statistics, and its emulated link is
charged for what they send.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from commfuse.runtime.transports import SYMMETRIC_MEMORY

if TYPE_CHECKING:
    from commfuse.runtime.communicator import Communicator


def uses_symmetric_memory(comm: Communicator) -> bool:
    """Whether :func:`all_reduce` sums GPU tensors by torch's symmetric-memory ops."""
    return comm.transport == SYMMETRIC_MEMORY and "nccl" not in dist.get_backend(comm.group)


def all_reduce(comm: Communicator, x: torch.Tensor) -> torch.Tensor:
    """Sums ``x`` over the ranks, in place.

    An emulated link is charged for a ring: 2 (W - 1) messages of a W-th of the bytes. GPU
    tensors go through torch's symmetric memory where the process group has no NCCL.
    """
    comm.check_host()
    if comm.world_size == 1:
        comm.count_message(0, 0.0)
        return x
    begin = time.perf_counter()
    if x.is_cuda and uses_symmetric_memory(comm):
        comm.torch_symmetric(x)
    else:
        dist.all_reduce(x, group=comm.group)
    steps = 2 * (comm.world_size - 1)
    _count(comm, begin, x.nbytes * steps // comm.world_size, steps)
    return x


def all_gather(comm: Communicator, x: torch.Tensor) -> torch.Tensor:
    """Stacks every rank's ``x``: [...] to [W, ...]."""
    comm.check_host()
    if comm.world_size == 1:
        comm.count_message(0, 0.0)
        return x.unsqueeze(0)
    begin = time.perf_counter()
    # gloo gathers in CPU memory only.
    here = x.contiguous() if "nccl" in dist.get_backend(comm.group) else x.cpu().contiguous()
    if comm.hierarchy is not None:
        what = f"all_gather {str(x.dtype).removeprefix('torch.')}{list(x.shape)}"
        with comm.hierarchy.call(what):
            gathered = comm.hierarchy.gather(here, what)
    else:
        gathered = [torch.empty_like(here) for _ in range(comm.world_size)]
        dist.all_gather(gathered, here, group=comm.group)
    steps = comm.world_size - 1
    _count(comm, begin, x.nbytes * steps, steps)
    return torch.stack(gathered).to(x.device)


def sum_across_hosts(comm: Communicator, mine: torch.Tensor, what: str) -> None:
    """Adds up, in place, what all hosts have of this rank's slice: see Hierarchy.

    An emulated link is charged for one message, of all that the rank sends.
    """
    begin = time.perf_counter()
    sent = comm.hierarchy.sum_across(mine, what)
    _count(comm, begin, sent, 1)


def _count(comm: Communicator, begin: float, transferred: int, messages: int) -> None:
    end = time.perf_counter()
    if comm.link is not None:
        end += comm.link.seconds(messages, transferred)
        while time.perf_counter() < end:
            pass
    comm.count_message(transferred, end - begin)

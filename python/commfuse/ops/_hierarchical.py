"""Sums over ranks by other means than one of our kernels: across hosts, or by torch alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from commfuse.ops._registry import DTYPES, Query
from commfuse.runtime import torch_collectives
from commfuse.runtime.communicator import Communicator
from commfuse.runtime.transports import HIERARCHICAL


def hierarchical_obstacle(comm: Communicator | None, query: Query) -> str | None:
    """Why a sum within hosts and then across them cannot serve a query, or None."""
    if query.device != "cpu":
        return f"runs on the CPU, not on {query.device}"
    if query.dtype not in DTYPES:
        return f"takes bfloat16, float16 and float32, not {query.dtype}"
    if comm is None or comm.transport != HIERARCHICAL:
        where = "one process" if comm is None else f"transport {comm.transport}"
        return f"is for ranks on several hosts, some of which share one; here it is {where}"
    return None


def hierarchical_all_reduce(comm: Communicator, x: torch.Tensor) -> torch.Tensor:
    """The sum of ``x`` over the ranks: within hosts by shared memory, across by slices.

    Each addition is in float32, in the order of the ranks of a host and then of the hosts, and is
    rounded once: twice in all.
    """
    hierarchy, handle = comm.hierarchy, comm.hierarchy.inside.handle
    count = x.numel()
    padding = max(1, -(-count // hierarchy.parts)) * hierarchy.parts - count
    flat = F.pad(x.view(-1), (0, padding)) if padding else x.view(-1)
    what = f"all_reduce {str(x.dtype).removeprefix('torch.')}{list(x.shape)}"
    with hierarchy.call(what):
        mine = torch.ops.commfuse.reduce_scatter(flat, handle, x.shape)
        torch_collectives.sum_across_hosts(comm, mine, what)
        whole = torch.ops.commfuse.all_gather(mine, handle)
    return whole[:count].view(x.shape)


# By backend: (communicator, x) to the sum over ranks; x may be overwritten, and be the result.
SUMS = {"hierarchical": hierarchical_all_reduce, "torch": torch_collectives.all_reduce}

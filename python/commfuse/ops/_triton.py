"""The triton backend: kernels of ``commfuse.triton_kernels`` on a communicator's workspaces."""

from __future__ import annotations

import os

import torch

from commfuse.ops._registry import DTYPES, Query
from commfuse.runtime.communicator import Communicator


def triton_obstacle(comm: Communicator | None, query: Query) -> str | None:
    """Why Triton kernels cannot serve a query, or None."""
    try:
        import commfuse.triton_kernels  # noqa: F401
    except ImportError as error:
        return f"Triton cannot be imported: {error}"
    if query.dtype not in DTYPES:
        return f"takes bfloat16, float16 and float32, not {query.dtype}"
    if comm is None or comm.world_size < 2:
        return "needs two ranks or more"
    if query.device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "runs on CPU tensors only in Triton's interpreter; start with TRITON_INTERPRET=1"
    if comm.device.type != query.device:
        return f"the communicator's workspaces are in {comm.device.type} memory"
    if comm.workspace_bytes == 0:
        return f"needs memory that all ranks map; the transport is {comm.transport}"
    return None


def _workspace(comm: Communicator):
    from commfuse.triton_kernels.workspace import Workspace

    workspace = comm.backends.get("triton workspace")
    if workspace is None:
        buffers = [comm.workspace(rank) for rank in range(comm.world_size)]
        workspace = Workspace.create(comm.rank, buffers, timeout=comm.timeout)
        comm.backends["triton workspace"] = workspace
        comm.further_checks.append(workspace.check)
    return workspace


def all_reduce_triton(x: torch.Tensor, comm: Communicator) -> torch.Tensor:
    """The one-shot all-reduce kernel."""
    from commfuse.triton_kernels.all_reduce import all_reduce

    comm.check_host()
    out = torch.empty_like(x)
    all_reduce(x, out, _workspace(comm))
    return out

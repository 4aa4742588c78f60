"""The triton backend: kernels of ``commfuse.triton_kernels`` on a communicator's workspaces."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

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
    if query.packed:
        return "takes plain weights [n, k]; this one is packed for the CPU"
    if comm is None or comm.world_size < 2:
        return "needs two ranks or more"
    if query.device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "runs on CPU tensors only in Triton's interpreter; start with TRITON_INTERPRET=1"
    if comm.device.type != query.device:
        return f"the communicator's workspaces are in {comm.device.type} memory"
    if comm.workspace_bytes == 0:
        return f"needs memory that all ranks map; the transport is {comm.transport}"
    return None


def _most_blocks(comm: Communicator) -> int:
    """The largest grid whose blocks run together on every rank's GPU: one on a multiprocessor.

    A power of two, as layouts want it. Collective, and the same on all ranks.
    """
    mine = torch.cuda.get_device_properties(comm.device).multi_processor_count
    counts = [None] * comm.world_size
    dist.all_gather_object(counts, mine, group=comm.group)
    return 1 << (min(counts).bit_length() - 1)


def _workspace(comm: Communicator):
    from commfuse.triton_kernels.workspace import Workspace

    workspace = comm.backends.get("triton workspace")
    if workspace is None:
        buffers = [comm.workspace(rank) for rank in range(comm.world_size)]
        grid = {"max_blocks": _most_blocks(comm)} if comm.device.type == "cuda" else {}
        workspace = Workspace.create(comm.rank, buffers, timeout=comm.timeout, **grid)
        comm.backends["triton workspace"] = workspace
        comm.further_checks.append(workspace.check)
    return workspace


def all_reduce_triton(x: torch.Tensor, comm: Communicator, in_place: bool) -> torch.Tensor:
    """The one-shot all-reduce kernel; the result is ``x`` itself or a new tensor."""
    from commfuse.triton_kernels.all_reduce import all_reduce

    comm.check_host()
    out = x if in_place else torch.empty_like(x)
    all_reduce(x, out, _workspace(comm))
    return out


def all_reduce_rms_norm_triton(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    comm: Communicator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The one-shot all-reduce kernel with its tail: (normalised, residual')."""
    from commfuse.triton_kernels.all_reduce_rms_norm import all_reduce_rms_norm

    comm.check_host()
    normalised, summed = torch.empty_like(x), torch.empty_like(x)
    all_reduce_rms_norm(x, residual, weight, eps, summed, normalised, _workspace(comm))
    return normalised, summed


def matmul_all_reduce_triton(
    x: torch.Tensor,
    w: torch.Tensor,
    comm: Communicator,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    eps: float,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The decode GEMM with its all-reduce; with ``norm_weight`` (normalised, residual')."""
    from commfuse.triton_kernels.matmul_all_reduce import matmul_all_reduce

    comm.check_host()
    summed = x.new_empty((x.shape[0], w.shape[0]))
    normalised = None if norm_weight is None else torch.empty_like(summed)
    matmul_all_reduce(
        x,
        w,
        summed,
        _workspace(comm),
        bias=bias,
        residual=residual,
        norm_weight=norm_weight,
        eps=eps,
        normalised=normalised,
    )
    return summed if normalised is None else (normalised, summed)

"""Which algorithm our CUDA kernels take for a shape, in words; the extension chooses."""

from __future__ import annotations

import math

import torch

from commfuse.errors import UsageError
from commfuse.ops._registry import Query
from commfuse.runtime.communicator import Communicator

_ALGORITHMS = {
    "one_shot": "one shot, flags among the data",
    "two_shot": "two shots, flags among the data",
    "bulk": "two shots in bulk",
}


def _all_reduce(comm: Communicator, nbytes: int) -> str:
    algorithm = _ALGORITHMS[comm._native.all_reduce_algorithm(nbytes)]
    return (
        f"{algorithm}, for {nbytes} bytes (one shot up to {comm.table.one_shot_bytes}, flags up to "
        f"{comm.table.lines_bytes}: {comm.table_source})"
    )


def all_reduce_way(comm: Communicator, query: Query) -> str:
    """For x [...]."""
    return _all_reduce(comm, math.prod(query.shape) * query.dtype.itemsize)


def all_reduce_rms_norm_way(comm: Communicator, query: Query) -> str:
    """For x [m, n]."""
    return f"{all_reduce_way(comm, query)}, then a kernel that normalises"


def matmul_all_reduce_way(comm: Communicator, query: Query) -> str:
    """For (m, k, n).

    Raises:
        UsageError: the shape has other than three dimensions.
    """
    if len(query.shape) != 3:
        raise UsageError(f"the shape of matmul_all_reduce is (m, k, n), not {query.shape}")
    m, _, n = query.shape
    table = comm.table
    rows = f"fused from {table.fused_from_rows} to {table.fused_to_rows} rows"
    if table.fused_from_rows > table.fused_to_rows:
        rows = "never fused"
    if table.claimed_percent:
        rows += f", {table.claimed_percent}% of its tiles claimed"
    if comm._native.sends_tiles(query.dtype == torch.float32, m, n):
        return f"fused, tiles sent while the GEMM computes ({rows}: {comm.table_source})"
    reason = "float32 is not fused" if query.dtype == torch.float32 else rows
    return f"a GEMM ({reason}), then {_all_reduce(comm, m * n * query.dtype.itemsize)}"

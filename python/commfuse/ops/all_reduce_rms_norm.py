"""Sum over ranks, residual addition and RMSNorm in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from commfuse.ops._cuda_ways import all_reduce_rms_norm_way
from commfuse.ops._hierarchical import SUMS, hierarchical_obstacle
from commfuse.ops._registry import (
    Backend,
    Op,
    cpu_obstacle,
    cuda_obstacle,
    define,
    torch_obstacle,
)
from commfuse.ops._triton import all_reduce_rms_norm_triton, triton_obstacle
from commfuse.runtime.communicator import Communicator


def _fake(x, residual, weight, eps, communicator):
    return torch.empty_like(x), torch.empty_like(x)


_all_reduce_rms_norm = define(
    "all_reduce_rms_norm(Tensor x, Tensor? residual, Tensor weight, float eps, int communicator)"
    " -> (Tensor, Tensor)",
    _fake,
)


def reference(
    xs: Sequence[torch.Tensor], residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, residual') of all ranks' ``x`` in float64."""
    total = torch.stack([x.double() for x in xs]).sum(0)
    if residual is not None:
        total = total + residual.double()
    scale = torch.rsqrt(total.square().mean(-1, keepdim=True) + eps)
    return total * scale * weight.double(), total


def _native(x, residual, weight, eps, comm):
    return _all_reduce_rms_norm(x, residual, weight, eps, comm.handle)


def _by(name: str):
    def run(x, residual, weight, eps, comm):
        total = SUMS[name](comm, x.clone())
        if residual is not None:
            total += residual
        return F.rms_norm(total, weight.shape, weight, eps), total

    return run


OP = Op(
    "all_reduce_rms_norm",
    (
        Backend("cpu", _native, cpu_obstacle),
        Backend("cuda", _native, cuda_obstacle, way=all_reduce_rms_norm_way),
        Backend("triton", all_reduce_rms_norm_triton, triton_obstacle, automatic=False),
        Backend("hierarchical", _by("hierarchical"), hierarchical_obstacle),
        Backend("torch", _by("torch"), torch_obstacle),
    ),
)


def all_reduce_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    comm: Communicator,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """residual' = residual + sum of ``x`` over ranks; y = RMSNorm(residual') · weight.

    The tail of a tensor-parallel half-block whose GEMM is somewhere else. RMSNorm: Zhang and
    Sennrich, "Root Mean Square Layer Normalization", 2019.

    Args:
        x: [rows, hidden], contiguous; bfloat16, float16 or float32.
        residual: [rows, hidden], equal on all ranks, or None for zero.
        weight: [hidden].
        eps: added to the mean square.
        comm: every rank must call.
        backend: as for :func:`~commfuse.ops.all_reduce`.

    Returns:
        (y, residual'), both [rows, hidden], the same bits on every rank.

    Raises:
        CommunicatorError, BackendUnavailable: as :func:`~commfuse.ops.all_reduce`.

    Example:
        >>> y, residual = all_reduce_rms_norm(x, residual, weight, 1e-5, comm)
    """
    run = OP.select(backend, comm, x)
    return run(x, residual, weight, eps, comm)

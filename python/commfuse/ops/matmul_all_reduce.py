"""Row-parallel layer with its all-reduce, and the tail of a transformer half-block behind it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from commfuse.ops._cuda_ways import matmul_all_reduce_way
from commfuse.ops._hierarchical import SUMS, hierarchical_obstacle
from commfuse.ops._registry import (
    Backend,
    Op,
    cpu_obstacle,
    cuda_obstacle,
    define,
    torch_obstacle,
)
from commfuse.ops._triton import matmul_all_reduce_triton, triton_obstacle
from commfuse.ops.matmul import PackedWeight, Weight, matmul
from commfuse.ops.matmul import reference as matmul_reference
from commfuse.runtime.communicator import Communicator


def _fake(x, weight, n, communicator, bias, residual):
    return x.new_empty((x.shape[0], n))


def _fake_rms_norm(x, weight, n, communicator, bias, residual, norm_weight, eps):
    return x.new_empty((x.shape[0], n)), x.new_empty((x.shape[0], n))


_matmul_all_reduce = define(
    "matmul_all_reduce(Tensor x, Tensor weight, int n, int communicator, Tensor? bias,"
    " Tensor? residual) -> Tensor",
    _fake,
)
_matmul_all_reduce_rms_norm = define(
    "matmul_all_reduce.rms_norm(Tensor x, Tensor weight, int n, int communicator, Tensor? bias,"
    " Tensor? residual, Tensor norm_weight, float eps) -> (Tensor, Tensor)",
    _fake_rms_norm,
)


def reference(
    xs: Sequence[torch.Tensor],
    ws: Sequence[torch.Tensor],
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    eps: float = 0.0,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The op on all ranks' ``x`` and ``w`` in float64."""
    total = sum(matmul_reference(x, w) for x, w in zip(xs, ws, strict=True))
    for addend in (bias, residual):
        if addend is not None:
            total = total + addend.double()
    if norm_weight is None:
        return total
    scale = torch.rsqrt(total.square().mean(-1, keepdim=True) + eps)
    return total * scale * norm_weight.double(), total


def _native(x, data, n, comm, bias, residual, norm_weight, eps):
    if norm_weight is None:
        return _matmul_all_reduce(x, data, n, comm.handle, bias, residual)
    return _matmul_all_reduce_rms_norm(x, data, n, comm.handle, bias, residual, norm_weight, eps)


def _cpu(x, w, *rest):
    return _native(x, w.data, w.n, *rest)


def _cuda(x, w, *rest):
    return _native(x, w, w.shape[0], *rest)


def _by(name: str, gemm: str):
    def run(x, w, comm, bias, residual, norm_weight, eps):
        total = SUMS[name](comm, matmul(x, w, backend=gemm))
        for addend in (bias, residual):
            if addend is not None:
                total += addend
        if norm_weight is None:
            return total
        return F.rms_norm(total, norm_weight.shape, norm_weight, eps), total

    return run


OP = Op(
    "matmul_all_reduce",
    (
        Backend("cpu", _cpu, cpu_obstacle),
        Backend("cuda", _cuda, cuda_obstacle, way=matmul_all_reduce_way),
        Backend("triton", matmul_all_reduce_triton, triton_obstacle, automatic=False),
        Backend("hierarchical", _by("hierarchical", "auto"), hierarchical_obstacle),
        Backend("torch", _by("torch", "torch"), torch_obstacle),
    ),
)


def matmul_all_reduce(
    x: torch.Tensor,
    w: Weight,
    comm: Communicator,
    *,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Sum over ranks of x wᵀ (+ bias) (+ residual), then RMSNorm where ``norm_weight`` is given.

    The output is computed in slices of columns; a slice is published while the next is computed,
    so that the exchange hides behind the streaming of the weights. Partial products are rounded to
    ``x``'s dtype, added in float32 in rank order and rounded once: the same bits on every rank.

    Args:
        x: [rows, k of this rank], contiguous; bfloat16, float16 or float32. Ranks may differ in k.
        w: this rank's columns of the weight, [n, k]: a tensor on a GPU; on the CPU a
            :class:`~commfuse.ops.PackedWeight` (a tensor: torch's GEMM, then torch.distributed).
            On a GPU it may be read early, as :func:`~commfuse.ops.matmul` says.
        comm: every rank must call.
        bias: [n], the whole bias, equal on all ranks; added once.
        residual: [rows, n], equal on all ranks.
        norm_weight: [n].
        eps: of RMSNorm.
        backend: as for :func:`~commfuse.ops.all_reduce`.

    Returns:
        [rows, n]; with ``norm_weight`` the pair (normalised, residual'), [rows, n] each.

    Raises:
        CommunicatorError, BackendUnavailable: as :func:`~commfuse.ops.all_reduce`.

    Example:
        >>> y, residual = matmul_all_reduce(x, w, comm, residual=residual, norm_weight=g, eps=1e-5)
    """
    run = OP.select(backend, comm, x, isinstance(w, PackedWeight))
    return run(x, w, comm, bias, residual, norm_weight, eps)

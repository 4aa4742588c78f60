"""The first GEMM of a pipeline stage, on rows as they arrive."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from commfuse import _extension
from commfuse.ops._registry import (
    Backend,
    Op,
    cpu_obstacle,
    cuda_obstacle,
    define,
    torch_obstacle,
)
from commfuse.ops.matmul import PackedWeight, Weight, matmul
from commfuse.ops.matmul import reference as matmul_reference
from commfuse.ops.recv import reference as recv_reference
from commfuse.runtime.channel import Channel


def _fake(rows, channel, w, n, bias=None, norm_weight=None, eps=1e-6):
    columns = _extension.require().channel_shape(channel).columns
    return w.new_empty(rows, n), w.new_empty(rows, columns)


_recv_matmul = define(
    "recv_matmul(int rows, int channel, Tensor w, int n, Tensor? bias=None,"
    " Tensor? norm_weight=None, float eps=1e-6) -> (Tensor, Tensor)",
    _fake,
)


def reference(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What :func:`recv_matmul` returns when ``x`` was sent, in float64."""
    rows = x if norm_weight is None else recv_reference(x, norm_weight, eps)[0]
    return matmul_reference(rows, w, bias), x


def _cpu(rows, channel, w, bias, norm_weight, eps):
    return _recv_matmul(rows, channel.handle, w.data, w.n, bias, norm_weight, eps)


def _cuda(rows, channel, w, bias, norm_weight, eps):
    return _recv_matmul(rows, channel.handle, w, w.shape[0], bias, norm_weight, eps)


def _torch(rows, channel, w, bias, norm_weight, eps):
    x = channel.torch_recv(rows)
    normalised = x
    if norm_weight is not None:
        normalised = F.rms_norm(x, norm_weight.shape, norm_weight, eps)
    return matmul(normalised, w, bias), x


OP = Op(
    "recv_matmul",
    (
        Backend("cpu", _cpu, cpu_obstacle),
        Backend("cuda", _cuda, cuda_obstacle),
        Backend("torch", _torch, torch_obstacle),
    ),
)


def recv_matmul(
    rows: int,
    channel: Channel,
    w: Weight,
    *,
    bias: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(RMSNorm of) the next message times wᵀ (+ bias), begun on the rows that have arrived.

    On the CPU, and on GPUs for up to 64 rows of bfloat16 or float16, the bits are those of
    :func:`~commfuse.ops.recv` and :func:`~commfuse.ops.matmul`. More rows on GPUs go by torch's
    GEMM in up to eight parts, each of which is multiplied while the next arrives.

    Args:
        rows: of the message: both ends know it, no shapes travel.
        channel: that ends at this rank.
        w: [n, columns of the channel]; a :class:`PackedWeight` over shared memory. On GPUs it
            may be read early, as by :func:`~commfuse.ops.matmul`.
        bias: [n] or None.
        norm_weight: [columns], of an RMSNorm of the rows, or None.
        eps: of the norm.

    Returns:
        (product [rows, n], the message [rows, columns]).

    Raises:
        ValueError: shapes or dtypes do not fit, or the channel ends elsewhere.
        CommunicatorError, BackendUnavailable: as :func:`~commfuse.ops.recv`.

    Example:
        >>> qkv, residual = recv_matmul(8, channel, qkv_weight, norm_weight=norm_weight)
    """
    run = OP.select(channel.backend, channel.comm, channel.no_rows, isinstance(w, PackedWeight))
    return run(rows, channel, w, bias, norm_weight, eps)

"""The last GEMM of a pipeline stage, fused with the sending of its rows."""

from __future__ import annotations

import torch

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
from commfuse.runtime.channel import Channel

_matmul_send = define(
    "matmul_send(Tensor x, Tensor w, int n, int channel, Tensor? bias=None,"
    " Tensor? residual=None) -> ()",
    lambda *_: None,
)


def reference(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """What arrives, in float64."""
    product = matmul_reference(x, w, bias)
    return product if residual is None else product + residual.double()


def _cpu(x, w, channel, bias, residual):
    _matmul_send(x, w.data, w.n, channel.handle, bias, residual)


def _cuda(x, w, channel, bias, residual):
    _matmul_send(x, w, w.shape[0], channel.handle, bias, residual)


def _torch(x, w, channel, bias, residual):
    y = matmul(x, w)
    for addend in (bias, residual):
        y = y if addend is None else y + addend
    channel.torch_send(y)


OP = Op(
    "matmul_send",
    (
        Backend("cpu", _cpu, cpu_obstacle),
        Backend("cuda", _cuda, cuda_obstacle),
        Backend("torch", _torch, torch_obstacle),
    ),
)


def matmul_send(
    x: torch.Tensor,
    w: Weight,
    channel: Channel,
    *,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> None:
    """Sends x wᵀ (+ bias) (+ residual) into a channel, rows as they are finished.

    On the CPU, and on GPUs for up to 64 rows of bfloat16 or float16, the product is computed
    straight into the receiver's slot. Its bits are those of
    :func:`~commfuse.ops.matmul_all_reduce` on one rank (CPU), or of :func:`~commfuse.ops.matmul`
    and an addition of the residual (GPU). More rows on GPUs go by torch's GEMM in up to eight
    parts, one of which is sent while the next is computed.

    Args:
        x: [rows, k], contiguous; of the channel's dtype.
        w: [columns of the channel, k]; a :class:`PackedWeight` over shared memory. On GPUs it
            may be read early, as by :func:`~commfuse.ops.matmul`.
        channel: that begins at this rank.
        bias: [columns] or None.
        residual: [rows, columns] or None.

    Raises:
        ValueError: shapes or dtypes do not fit, or the channel begins elsewhere.
        CommunicatorError, BackendUnavailable: as :func:`~commfuse.ops.send`.

    Example:
        >>> matmul_send(features, down, channel, residual=residual)
    """
    run = OP.select(channel.backend, channel.comm, x, isinstance(w, PackedWeight))
    run(x, w, channel, bias, residual)

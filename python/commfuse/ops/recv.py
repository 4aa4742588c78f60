"""The next message of a channel."""

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
from commfuse.runtime.channel import Channel


def _fake(rows: int, channel: int, like: torch.Tensor) -> torch.Tensor:
    return like.new_empty(rows, _extension.require().channel_shape(channel).columns)


# `like`, of the channel's dtype on its device, is what torch knows the device from.
_recv = define("recv(int rows, int channel, Tensor like) -> Tensor", _fake)
_recv_rms_norm = define(
    "recv.rms_norm(int rows, int channel, Tensor norm_weight, float eps) -> (Tensor, Tensor)",
    lambda rows, channel, norm, eps: (_fake(rows, channel, norm), _fake(rows, channel, norm)),
)


def reference(
    x: torch.Tensor, norm_weight: torch.Tensor | None = None, eps: float = 1e-6
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """What :func:`recv` returns when ``x`` was sent; the norm in float64."""
    if norm_weight is None:
        return x
    scale = torch.rsqrt(x.double().square().mean(-1, keepdim=True) + eps)
    return x.double() * scale * norm_weight.double(), x


def _native(rows, channel, norm_weight, eps):
    if norm_weight is None:
        return _recv(rows, channel.handle, channel.no_rows)
    return _recv_rms_norm(rows, channel.handle, norm_weight, eps)


def _torch(rows, channel, norm_weight, eps):
    x = channel.torch_recv(rows)
    if norm_weight is None:
        return x
    return F.rms_norm(x, norm_weight.shape, norm_weight, eps), x


OP = Op(
    "recv",
    (
        Backend("cpu", _native, cpu_obstacle),
        Backend("cuda", _native, cuda_obstacle),
        Backend("torch", _torch, torch_obstacle),
    ),
)


def recv(
    rows: int,
    channel: Channel,
    *,
    norm_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Waits for the next message of a channel, and frees its slot.

    Between GPUs this happens on the current stream, and the call returns at once; what fails there
    is raised by a later call or by ``comm.check()``. With a norm, each block of rows is normalised
    when it has arrived, while the next travels.

    Args:
        rows: of the message: both ends know it, no shapes travel.
        channel: that ends at this rank.
        norm_weight: [columns], of an RMSNorm of the rows, or None.
        eps: of the norm.

    Returns:
        A new tensor [rows, columns], the bits that were sent; with a norm (RMSNorm(x) ·
        norm_weight, x).

    Raises:
        ValueError: more rows than the channel's, or the channel ends elsewhere.
        PeerTimeout: nothing came until the deadline.
        PeerMismatch: the message has another number of rows.
        CommunicatorError, BackendUnavailable: as :func:`~commfuse.ops.all_reduce`.

    Example:
        >>> recv(8, channel).shape
        torch.Size([8, 4096])
    """
    run = OP.select(channel.backend, channel.comm, channel.no_rows)
    return run(rows, channel, norm_weight, eps)

"""The next message of a channel."""

from __future__ import annotations

import torch

from commfuse import _extension
from commfuse.ops._registry import Backend, Op, cpu_obstacle, define, torch_obstacle
from commfuse.runtime.channel import Channel


def _fake(rows: int, channel: int) -> torch.Tensor:
    shape = _extension.require().channel_shape(channel)
    return torch.empty(rows, shape.columns, dtype=getattr(torch, shape.dtype.name))


_recv = define("recv(int rows, int channel) -> Tensor", _fake)


def reference(x: torch.Tensor) -> torch.Tensor:
    """What was given to :func:`~commfuse.ops.send` at the other end."""
    return x


def _native(rows: int, channel: Channel) -> torch.Tensor:
    return _recv(rows, channel.handle)


def _torch(rows: int, channel: Channel) -> torch.Tensor:
    return channel.torch_recv(rows)


OP = Op("recv", (Backend("cpu", _native, cpu_obstacle), Backend("torch", _torch, torch_obstacle)))


def recv(rows: int, channel: Channel) -> torch.Tensor:
    """Waits for the next message of a channel, and frees its slot.

    Args:
        rows: of the message: both ends know it, no shapes travel.
        channel: that ends at this rank.

    Returns:
        A new tensor [rows, columns], the bits that were sent.

    Raises:
        ValueError: more rows than the channel's, or the channel ends elsewhere.
        PeerTimeout: nothing came until the deadline.
        PeerMismatch: the message has another number of rows.
        CommunicatorError, BackendUnavailable: as :func:`~commfuse.ops.all_reduce`.

    Example:
        >>> recv(8, channel).shape
        torch.Size([8, 4096])
    """
    return OP.select(channel.backend, channel.comm, channel.no_rows)(rows, channel)

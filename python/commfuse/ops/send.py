"""A message to the rank at the other end of a channel."""

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
from commfuse.runtime.channel import Channel


def _fake(x: torch.Tensor, channel: int) -> None:
    return None


_send = define("send(Tensor x, int channel) -> ()", _fake)


def reference(x: torch.Tensor) -> torch.Tensor:
    """What :func:`~commfuse.ops.recv` returns at the other end."""
    return x


def _native(x: torch.Tensor, channel: Channel) -> None:
    _send(x, channel.handle)


def _torch(x: torch.Tensor, channel: Channel) -> None:
    channel.torch_send(x)


OP = Op(
    "send",
    (
        Backend("cpu", _native, cpu_obstacle),
        Backend("cuda", _native, cuda_obstacle),
        Backend("torch", _torch, torch_obstacle),
    ),
)


def send(x: torch.Tensor, channel: Channel) -> None:
    """Sends a message into a channel.

    Returns when the message lies in a slot; waits only while every slot holds a message that was
    not received. Between GPUs all of this happens on the current stream, and the call returns at
    once; what fails there is raised by a later call or by ``comm.check()``. Over torch.distributed
    ``x`` itself is sent, and must not be changed until it has been received.

    Args:
        x: [rows, columns], contiguous; the channel's columns and dtype, no more than its rows.
        channel: that begins at this rank.

    Raises:
        ValueError: x does not fit the channel, or the channel begins elsewhere.
        PeerTimeout: every slot stayed full until the deadline.
        PeerMismatch: the receiver expects another number of rows; it raises too.
        CommunicatorError, BackendUnavailable: as :func:`~commfuse.ops.all_reduce`.

    Example:
        >>> send(torch.ones(8, channel.columns, dtype=channel.dtype), channel)
    """
    OP.select(channel.backend, channel.comm, x)(x, channel)

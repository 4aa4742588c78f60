"""The extension's communicators, over memory that the ranks of one host share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from commfuse import _extension
from commfuse.errors import UsageError
from commfuse.runtime import agreement
from commfuse.runtime.link import Link


def connect(
    group: dist.ProcessGroup,
    members: Sequence[int],
    *,
    payload_bytes: int,
    workspace_bytes: int,
    timeout: float,
    link: Link | None,
) -> Any:
    """The extension's communicator among ``members``, of which this rank is one.

    Collective over the whole group: its ranks may be members of different communicators.

    Args:
        group: of all ranks.
        members: ranks of the group; the first one makes the memory.
        payload_bytes: the largest message of a call, bytes.
        workspace_bytes: of each member.
        timeout: seconds that a rank waits for another.
        link: an emulated link between the members.

    Raises:
        UsageError: too little shared memory. All ranks of the group raise it.
        CommunicatorError: a rank could not connect, or has ended. All other ranks raise it.
    """
    native, rank = _extension.require(), dist.get_rank(group)
    servers = []  # one, on the first member

    def offer() -> str | None:
        if rank != members[0] or len(members) == 1:
            return None
        try:
            servers.append(native.SegmentServer(len(members), payload_bytes, workspace_bytes))
        except RuntimeError as error:
            raise UsageError(str(error)) from None
        return servers[0].address

    addresses = agreement.collect(group, offer)
    latency_ns = link.latency_us * 1e3 if link else 0.0
    bytes_per_ns = link.gigabytes_per_second if link else 0.0
    options = (timeout, latency_ns, bytes_per_ns)

    def meet() -> Any:
        if len(members) == 1:
            return native.Communicator()
        if servers:
            return native.Communicator.serve(servers[0], *options)
        place = members.index(rank)
        return native.Communicator.connect(addresses[members[0]], place, *options)

    return agreement.attempt(group, meet)

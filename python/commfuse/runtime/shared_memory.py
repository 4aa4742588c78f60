"""The extension's communicators, over memory that the ranks of one host share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from commfuse import _extension
from commfuse.errors import UsageError
from commfuse.runtime.link import Link


def connect(
    rank: int,
    members: Sequence[int],
    gather: Callable[[Any], list[Any]],
    *,
    payload_bytes: int,
    workspace_bytes: int,
    timeout: float,
    link: Link | None,
) -> Any:
    """The extension's communicator among ``members``, of which this rank is one.

    Collective over the whole group: its ranks may be members of different communicators.

    Args:
        rank: in the group.
        members: ranks of the group; the first one makes the memory.
        gather: brings together the values of all ranks of the group.
        payload_bytes: the largest message of a call, bytes.
        workspace_bytes: of each member.
        timeout: seconds that a rank waits for another.
        link: an emulated link between the members.

    Raises:
        UsageError: too little shared memory. All ranks of the group raise it.
    """
    native = _extension.require()
    server, offer = None, (None, None)
    if rank == members[0] and len(members) > 1:
        try:
            server = native.SegmentServer(len(members), payload_bytes, workspace_bytes)
            offer = server.address, None
        except RuntimeError as error:
            offer = None, str(error)
    addresses, problems = zip(*gather(offer), strict=True)
    if problem := next((problem for problem in problems if problem is not None), None):
        raise UsageError(problem)
    if len(members) == 1:
        return native.Communicator()
    latency_ns = link.latency_us * 1e3 if link else 0.0
    bytes_per_ns = link.gigabytes_per_second if link else 0.0
    if server is not None:
        return native.Communicator.serve(server, timeout, latency_ns, bytes_per_ns)
    address, place = addresses[members[0]], members.index(rank)
    return native.Communicator.connect(address, place, timeout, latency_ns, bytes_per_ns)

"""What carries data between the ranks of a communicator, and how it is chosen."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from commfuse import _extension
from commfuse.errors import BackendUnavailable, UsageError
from commfuse.runtime import symmetric

SHARED_MEMORY = "shared memory"
SYMMETRIC_MEMORY = "symmetric memory"
TORCH_DISTRIBUTED = "torch.distributed"
HIERARCHICAL = "hierarchical"
LOCAL = "local"


@dataclass(frozen=True)
class Place:
    """Where a rank runs: what the others must know of it to choose a transport.

    Attributes:
        host: equal for ranks of one host.
        missing: why this rank cannot run our kernels, or None.
        gpu: see :func:`~commfuse.runtime.symmetric.device_identity`; empty on the CPU.
    """

    host: tuple[str | None, ...]
    missing: str | None
    gpu: tuple[str, str]


@dataclass(frozen=True)
class Choice:
    """What all ranks have chosen.

    Attributes:
        transport: see :class:`~commfuse.runtime.communicator.Communicator`.
        hosts: the ranks of each host, in order.
        reason: why it is neither shared nor symmetric memory though nobody asked for that, or None.
    """

    transport: str
    hosts: list[list[int]]
    reason: str | None = None


def own_transport(device: torch.device) -> str:
    """The one that our kernels need where all ranks run on one host."""
    return SYMMETRIC_MEMORY if device.type == "cuda" else SHARED_MEMORY


def check_name(asked: str, device: torch.device) -> None:
    """Raises UsageError where tensors on ``device`` have no transport of this name."""
    own = own_transport(device)
    known = ["auto", own, *([HIERARCHICAL] if own == SHARED_MEMORY else []), TORCH_DISTRIBUTED]
    if asked not in known:
        raise UsageError(
            f"unknown transport {asked!r} on {device.type}: use one of "
            f"{', '.join(map(repr, known))}"
        )


def locate(device: torch.device, host: str | None) -> Place:
    """This rank's place.

    Args:
        device: of its tensors.
        host: a name for its host, or None: see Communicator.
    """
    if device.type == "cuda":
        identity = symmetric.device_identity(device)
        return Place((host, *_host()), _extension.why_no_cuda(), identity)
    return Place((host, *_host()), _extension.reason, ("", ""))


def choose(
    asked: str, device: torch.device, places: Sequence[Place], gather: Callable[[Any], list[Any]]
) -> Choice:
    """The transport of two ranks or more; all of them call this together.

    Args:
        asked: a transport by name, or ``"auto"``.
        device: of this rank's tensors.
        places: of all ranks, in order.
        gather: brings together every rank's value.

    Raises:
        BackendUnavailable: what was asked for cannot be had.
        UsageError: ranks are on one GPU without the set-up that this takes.
    """
    on_gpu = device.type == "cuda"
    by_host: dict[tuple, list[int]] = {}
    for rank, place in enumerate(places):
        by_host.setdefault(place.host, []).append(rank)
    hosts = list(by_host.values())
    if asked == TORCH_DISTRIBUTED:
        return Choice(TORCH_DISTRIBUTED, hosts)
    own = own_transport(device)
    problem = next((place.missing for place in places if place.missing is not None), None)
    some_together = 1 < len(hosts) < len(places) and not on_gpu
    if asked == HIERARCHICAL and not some_together:
        problem = "no two ranks share a host" if len(hosts) > 1 else "all ranks share one host"
    elif some_together and problem is None and asked != own:
        return Choice(HIERARCHICAL, hosts, f"the ranks run on {len(hosts)} hosts")
    elif len(hosts) > 1:
        instead = HIERARCHICAL if some_together and problem is None else TORCH_DISTRIBUTED
        problem = (
            f"the ranks run on {len(hosts)} hosts and cannot share memory; use "
            f"transport={instead!r}"
        )
    elif on_gpu and problem is None:
        if conflict := symmetric.placement_problem([place.gpu for place in places]):
            raise UsageError(conflict)
        unreachable = gather(symmetric.unreachable(device, [place.gpu[0] for place in places]))
        problem = next((reason for reason in unreachable if reason is not None), None)
    if problem is None:
        return Choice(own, hosts)
    if asked != "auto":
        raise BackendUnavailable(problem)
    return Choice(TORCH_DISTRIBUTED, hosts, problem)


def _host() -> tuple[str, str, str]:
    """Equal for processes that can reach each other's abstract sockets and shared memory."""
    with open("/proc/sys/kernel/random/boot_id") as boot_id:
        return socket.gethostname(), boot_id.read().strip(), os.readlink("/proc/self/ns/net")

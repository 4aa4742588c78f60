"""A group of ranks that can run commfuse's ops together."""

from __future__ import annotations

import os
import socket
import time
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from commfuse import _extension
from commfuse.errors import BackendUnavailable, CommunicatorClosed, UsageError
from commfuse.runtime.link import Link

SHARED_MEMORY = "shared memory"
TORCH_DISTRIBUTED = "torch.distributed"
LOCAL = "local"

DEFAULT_PAYLOAD_BYTES = 4 << 20
DEFAULT_WORKSPACE_BYTES = 1 << 20
MOST_BYTES = 1 << 47  # the address space of a process; also keeps all sizes within 64 bits


@dataclass
class Statistics:
    """What a communicator has done since it was made or reset.

    Attributes:
        calls: collective calls.
        bytes_sent: bytes that this rank has sent, once for each receiver.
        communication_seconds: time of this rank in communication: waiting for peers, copying and
            adding their data. The computing part of a fused op is not counted.
    """

    calls: int = 0
    bytes_sent: int = 0
    communication_seconds: float = 0.0


def _host_identity() -> tuple[str, str, str]:
    """Equal for processes that can reach each other's abstract sockets and shared memory."""
    with open("/proc/sys/kernel/random/boot_id") as boot_id:
        return socket.gethostname(), boot_id.read().strip(), os.readlink("/proc/self/ns/net")


class Communicator:
    """One rank's end of a group of ranks, with the memory they share.

    Every rank of the group must construct it, and must then make the same calls in the same
    order. A communicator serves one stream of calls; a second one gets :class:`ConcurrentUse`.
    Its first failure is final: later calls raise the same error, and a new communicator must be
    made.

    Args:
        group: a ``ProcessGroup``, a one-dimensional ``DeviceMesh``, or None for a group of one.
        transport: ``"shared memory"``, ``"torch.distributed"``, or ``"auto"``: the first where all
            ranks run on one host (the CPU op kernels need it), else the second.
        payload_bytes: the largest message that one call can carry, bytes; larger ones take several.
            All ranks together reserve about ``2 W (1 + 1/W)`` times as much shared memory.
        workspace_bytes: memory of each rank that every rank can map, for kernels such as Triton's.
        timeout: seconds that a rank waits for another before it raises :class:`PeerTimeout`.
        link: an emulated link; everything measured through it is marked as emulated.

    Raises:
        UsageError: a mesh of several dimensions, an unknown transport, or too little shared memory
            (the message says how much is needed). All ranks raise it.
        BackendUnavailable: shared memory was asked for and the extension is missing, or the ranks
            run on several hosts.

    Example:
        >>> torch.distributed.init_process_group("gloo")
        >>> with Communicator(torch.distributed.group.WORLD) as comm:
        ...     y = commfuse.ops.all_reduce(x, comm)
    """

    def __init__(
        self,
        group: dist.ProcessGroup | DeviceMesh | None = None,
        *,
        transport: str = "auto",
        payload_bytes: int = DEFAULT_PAYLOAD_BYTES,
        workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
        timeout: float = 30.0,
        link: Link | None = None,
    ):
        self._closed = True  # until construction succeeds
        if isinstance(group, DeviceMesh):
            if group.ndim != 1:
                raise UsageError(
                    f"the mesh has {group.ndim} dimensions {group.mesh_dim_names}; a communicator "
                    "takes one, as in Communicator(mesh['tp'])"
                )
            group = group.get_group()
        if transport not in ("auto", SHARED_MEMORY, TORCH_DISTRIBUTED):
            raise UsageError(
                f"unknown transport {transport!r}: use 'auto', {SHARED_MEMORY!r} or "
                f"{TORCH_DISTRIBUTED!r}"
            )
        if payload_bytes <= 0 or workspace_bytes < 0 or not timeout > 0:
            raise UsageError("payload_bytes and timeout must be positive, workspace_bytes >= 0")
        if max(payload_bytes, workspace_bytes) > MOST_BYTES:
            raise UsageError(
                f"too little shared memory: payload_bytes={payload_bytes} and workspace_bytes="
                f"{workspace_bytes} are needed for each rank, and no process can map more than "
                f"{MOST_BYTES} bytes"
            )
        self.group = group
        self.rank = dist.get_rank(group) if group is not None else 0
        self.world_size = dist.get_world_size(group) if group is not None else 1
        self.timeout = timeout
        self.link = link
        self.backends: dict[Any, Any] = {}  # filled by commfuse.ops: what serves which call
        self._torch_traffic = Statistics()
        self._native = None
        if self.world_size == 1:
            self.transport = LOCAL
            if _extension.module is not None:
                self._native = _extension.module.Communicator()
        else:
            self.transport = self._choose_transport(transport)
            if self.transport == SHARED_MEMORY:
                self._native = self._share_memory(payload_bytes, workspace_bytes)
        self._closed = False

    def _choose_transport(self, asked: str) -> str:
        identities: list[Any] = [None] * self.world_size
        mine = (_host_identity(), _extension.reason)
        dist.all_gather_object(identities, mine, group=self.group)
        hosts = {host for host, _ in identities}
        missing = next((reason for _, reason in identities if reason is not None), None)
        if asked == TORCH_DISTRIBUTED:
            return TORCH_DISTRIBUTED
        if asked == SHARED_MEMORY and len(hosts) > 1:
            raise BackendUnavailable(
                f"the ranks run on {len(hosts)} hosts and cannot share memory; use "
                f"transport={TORCH_DISTRIBUTED!r}"
            )
        if asked == SHARED_MEMORY and missing:
            raise BackendUnavailable(missing)
        return SHARED_MEMORY if len(hosts) == 1 and not missing else TORCH_DISTRIBUTED

    def _share_memory(self, payload_bytes: int, workspace_bytes: int):
        native = _extension.require()
        server, offer = None, [None, None]
        if self.rank == 0:
            try:
                server = native.SegmentServer(self.world_size, payload_bytes, workspace_bytes)
                offer = [server.address, None]
            except RuntimeError as error:
                offer = [None, str(error)]
        dist.broadcast_object_list(
            offer, dist.get_global_rank(self.group, 0), group=self.group, device=None
        )
        address, problem = offer
        if problem is not None:
            raise UsageError(problem)
        latency_ns = self.link.latency_us * 1e3 if self.link else 0.0
        bytes_per_ns = self.link.gigabytes_per_second if self.link else 0.0
        if server is not None:
            return native.Communicator.serve(server, self.timeout, latency_ns, bytes_per_ns)
        return native.Communicator.connect(
            address, self.rank, self.timeout, latency_ns, bytes_per_ns
        )

    @property
    def handle(self) -> int:
        """What stands for this communicator in the schemas of ``torch.ops.commfuse``."""
        if self._native is None:
            raise BackendUnavailable(
                _extension.reason
                or f"transport {self.transport!r} has no shared memory for the CPU kernels"
            )
        return self._native.handle

    @property
    def emulated(self) -> bool:
        """Whether a link is emulated."""
        return self.link is not None

    @property
    def payload_bytes(self) -> int:
        """The largest message of one call over shared memory, bytes; 0 for other transports."""
        return self._native.payload_bytes if self._native is not None else 0

    @property
    def workspace_bytes(self) -> int:
        """The size of each rank's workspace, bytes; 0 where there is no shared memory."""
        return self._native.workspace_bytes if self._native is not None else 0

    def workspace(self, rank: int) -> torch.Tensor:
        """A rank's workspace: uint8 [workspace_bytes], zero at first, mapped by every rank.

        Raises:
            BackendUnavailable: the transport shares no memory.
        """
        if self._native is None:
            raise BackendUnavailable(f"transport {self.transport!r} shares no memory")
        return self._native.workspace(rank)

    def check(self) -> None:
        """Raises this communicator's failure, if there is one: see :mod:`commfuse.errors`."""
        if self._closed:
            raise CommunicatorClosed("this communicator is closed; make a new Communicator")
        if self._native is not None:
            self._native.check()

    def barrier(self) -> None:
        """Returns when every rank has called it."""
        self.check()
        if self._native is not None:
            self._native.barrier()
        else:
            dist.barrier(group=self.group)

    def torch_all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sums ``x`` over the ranks, in place, by torch.distributed: what commfuse competes with.

        An emulated link is charged for a ring: 2 (W - 1) messages of a W-th of the bytes.
        """
        self.check()
        if self.world_size == 1:
            self._torch_traffic.calls += 1
            return x
        begin = time.perf_counter()
        dist.all_reduce(x, group=self.group)
        steps = 2 * (self.world_size - 1)
        transferred = x.nbytes * steps // self.world_size
        self._count_torch(begin, transferred, steps)
        return x

    def torch_all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """Stacks every rank's ``x``: [...] to [W, ...], by torch.distributed."""
        self.check()
        if self.world_size == 1:
            self._torch_traffic.calls += 1
            return x.unsqueeze(0)
        begin = time.perf_counter()
        gathered = [torch.empty_like(x) for _ in range(self.world_size)]
        dist.all_gather(gathered, x.contiguous(), group=self.group)
        steps = self.world_size - 1
        self._count_torch(begin, x.nbytes * steps, steps)
        return torch.stack(gathered)

    def _count_torch(self, begin: float, transferred: int, messages: int) -> None:
        end = time.perf_counter()
        if self.link is not None:
            end += self.link.seconds(messages, transferred)
            while time.perf_counter() < end:
                pass
        self._torch_traffic.calls += 1
        self._torch_traffic.bytes_sent += transferred
        self._torch_traffic.communication_seconds += end - begin

    def statistics(self) -> Statistics:
        """Counters since construction or the last :meth:`reset_statistics`."""
        total = Statistics(**vars(self._torch_traffic))
        if self._native is not None:
            native = self._native.statistics()
            total.calls += native.calls
            total.bytes_sent += native.bytes_sent
            total.communication_seconds += native.communication_ns * 1e-9
        return total

    def reset_statistics(self) -> None:
        """Starts the counters of :meth:`statistics` anew."""
        self._torch_traffic = Statistics()
        if self._native is not None:
            self._native.reset_statistics()

    def start_trace(self) -> None:
        """Records what ``matmul_all_reduce`` does when, until :meth:`stop_trace`."""
        if self._native is None:
            raise BackendUnavailable(f"transport {self.transport!r} keeps no trace")
        self._native.start_trace()

    def stop_trace(self) -> list[tuple[int, str, int]]:
        """The recorded events: (CLOCK_MONOTONIC ns, kind, slice), in order.

        Kinds: ``computed`` (the slice's GEMM is done), ``published`` (peers may read it),
        ``arrived`` (every peer's is there), ``reduced``.
        """
        return [
            (event.time_ns, event.kind.name, event.block) for event in self._native.stop_trace()
        ]

    def close(self) -> None:
        """Leaves the group. Peers that wait for this rank are told; memory is released."""
        if not self._closed:
            self._closed = True
            self.backends.clear()
            if self._native is not None:
                self._native.close()

    def __enter__(self) -> Communicator:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            warnings.warn(
                f"{self!r} was never closed; use it in a with statement or call close()",
                ResourceWarning,
                stacklevel=2,
            )
            self.close()

    def __repr__(self) -> str:
        emulated = f", emulated {self.link.name}" if self.link else ""
        return f"<Communicator rank {self.rank} of {self.world_size}, {self.transport}{emulated}>"

"""A group of ranks that can run commfuse's ops together."""

from __future__ import annotations

import secrets
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from commfuse import _extension
from commfuse.errors import BackendUnavailable, CommunicatorClosed, UsageError
from commfuse.runtime import agreement, shared_memory, symmetric, transports, tuning
from commfuse.runtime.gpu_memory import GpuMemory
from commfuse.runtime.hierarchy import Hierarchy
from commfuse.runtime.link import Link
from commfuse.runtime.transports import (
    HIERARCHICAL,
    LOCAL,
    SHARED_MEMORY,
    SYMMETRIC_MEMORY,
    TORCH_DISTRIBUTED,
)

DEFAULT_PAYLOAD_BYTES = 4 << 20
DEFAULT_WORKSPACE_BYTES = {"cpu": 1 << 20, "cuda": 16 << 20}
HOST_PAYLOAD_BYTES = 4096  # of a CUDA communicator, whose messages stay on the GPUs
MOST_BYTES = 1 << 47  # the address space of a process; also keeps all sizes within 64 bits


@dataclass
class Statistics:
    """What a communicator has done since it was made or reset.

    Attributes:
        calls: collective calls, and messages sent or received.
        bytes_sent: bytes that this rank has sent, once for each receiver.
        communication_seconds: time of this rank in communication: waiting for peers, copying and
            adding their data. The computing part of a fused op is not counted.
    """

    calls: int = 0
    bytes_sent: int = 0
    communication_seconds: float = 0.0


class Communicator:
    """One rank's end of a group of ranks, with the memory they share.

    Every rank of the group must construct it, and must then make the same calls in the same
    order. A communicator serves one stream of calls; a second one gets :class:`ConcurrentUse`.
    Its first failure is final: later calls raise the same error, and a new communicator must be
    made.

    Args:
        group: a ``ProcessGroup``, a one-dimensional ``DeviceMesh``, or None for a group of one.
        device: where its tensors are: None or ``"cpu"``, or a CUDA device (``"cuda"``: the current
            one). A CUDA communicator shares host memory as well, to learn of peers that fail.
        transport: ``"shared memory"`` on the CPU, ``"symmetric memory"`` on GPUs (torch's: they map
            each other's memory), ``"hierarchical"`` on the CPU (the former within hosts,
            torch.distributed across), or ``"torch.distributed"``. ``"auto"``: one of the first two
            where all ranks run on one host (our kernels need it), the third where some of them
            share one, else the last; ``transport_reason`` then says why.
        payload_bytes: the largest message that one call can carry, bytes; larger ones take several.
            All ranks together reserve about ``2 W (1 + 1/W)`` times as much shared memory; on GPUs
            it is rounded up to a multiple of 256.
        workspace_bytes: memory of each rank that every rank can map, for kernels such as Triton's;
            None: 1 MiB, on a GPU 16 MiB.
        timeout: seconds that a rank waits for another before it raises :class:`PeerTimeout`.
        link: an emulated link; everything measured through it is marked as emulated. With the
            hierarchical transport it is the one between hosts.
        link_inside: with the hierarchical transport, an emulated link within each host.
        host: ranks that name different hosts share no memory, even where they could: to have
            several hosts on one. None: only where the operating system keeps them apart.
        name: of its ranks, plural, for errors, in which ranks are numbered from 0.

    Raises:
        UsageError: a mesh of several dimensions, an unknown transport, too little shared memory
            (the message says how much is needed), or ranks on one GPU without the set-up that this
            takes. All ranks raise it.
        BackendUnavailable: the transport that was asked for cannot be had: the extension is missing
            or was built without CUDA, the ranks do not run on one host (or, for the hierarchical
            one, on several, some together), or their GPUs cannot map each other's memory.

    Attributes:
        device: see above, with its index.
        transport: what was chosen; ``"local"`` for a group of one.
        transport_reason: why ``"auto"`` has chosen neither shared nor symmetric memory, or None.
        hosts: the ranks of each host, in order.
        hierarchy: how the ranks of several hosts meet; None with other transports.

    Example:
        >>> torch.distributed.init_process_group("gloo")
        >>> with Communicator(torch.distributed.group.WORLD) as comm:
        ...     y = commfuse.ops.all_reduce(x, comm)
    """

    def __init__(
        self,
        group: dist.ProcessGroup | DeviceMesh | None = None,
        *,
        device: torch.device | str | None = None,
        transport: str = "auto",
        payload_bytes: int = DEFAULT_PAYLOAD_BYTES,
        workspace_bytes: int | None = None,
        timeout: float = 30.0,
        link: Link | None = None,
        link_inside: Link | None = None,
        host: str | None = None,
        name: str | None = None,
    ):
        self._closed = True  # until construction succeeds
        if isinstance(group, DeviceMesh):
            if group.ndim != 1:
                raise UsageError(
                    f"the mesh has {group.ndim} dimensions {group.mesh_dim_names}; a communicator "
                    "takes one, as in Communicator(mesh['tp'])"
                )
            group = group.get_group()
        self._group = group
        self.rank = dist.get_rank(group) if group is not None else 0
        self.world_size = dist.get_world_size(group) if group is not None else 1
        self.timeout = timeout
        self.link, self.link_inside = link, link_inside
        self.backends: dict[Any, Any] = {}  # filled by commfuse.ops: what serves which call
        self.further_checks: list[Callable[[], None]] = []  # of check(), by commfuse.ops
        self.channels: list[Any] = []  # between its ranks; they close with it
        self.port_free_ns = 0  # of an emulated link, for messages by torch.distributed
        self._torch_traffic = Statistics()
        self._native = None
        self._gpu: GpuMemory | None = None
        self._torch_symmetric: symmetric.TorchAllReduce | None = None
        self.transport_reason: str | None = None
        self.hosts = [[0]]
        self.hierarchy: Hierarchy | None = None

        def introduce() -> transports.Place:
            nonlocal workspace_bytes
            self.device = symmetric.resolve_device(device)
            transports.check_name(transport, self.device)
            if workspace_bytes is None:
                workspace_bytes = DEFAULT_WORKSPACE_BYTES[self.device.type]
            if payload_bytes <= 0 or workspace_bytes < 0 or not timeout > 0:
                raise UsageError("payload_bytes and timeout must be positive, workspace_bytes >= 0")
            if max(payload_bytes, workspace_bytes) > MOST_BYTES:
                raise UsageError(
                    f"too little shared memory: payload_bytes={payload_bytes} and workspace_bytes="
                    f"{workspace_bytes} are needed for each rank, and no process can map more than "
                    f"{MOST_BYTES} bytes"
                )
            if self.device.type == "cuda" and not link is link_inside is host is None:
                raise UsageError("links and hosts are emulated between CPU ranks only")
            return transports.locate(self.device, host)

        places = agreement.collect(group, introduce)
        if self.world_size == 1:
            self.transport = LOCAL
            if _extension.module is not None:
                self._native = _extension.module.Communicator()
            if self.device.type == "cuda" and _extension.why_no_cuda() is None:
                self._share_gpu_memory(payload_bytes, 0)
        else:
            choice = transports.choose(transport, self.device, places, self.gather)
            self.transport, self.transport_reason = choice.transport, choice.reason
            self.hosts = choice.hosts
            everybody = range(self.world_size)
            if self.transport == SHARED_MEMORY:
                self._native = self._connect(everybody, payload_bytes, workspace_bytes, link)
            elif self.transport == SYMMETRIC_MEMORY:
                self._native = self._connect(everybody, HOST_PAYLOAD_BYTES, 0, None)
                self._share_gpu_memory(payload_bytes, workspace_bytes)
            elif self.transport == HIERARCHICAL:
                self.hierarchy = self._meet_hosts(payload_bytes, link_inside, name)
        self.name = name
        if name is not None and self._native is not None:
            self._native.set_name(name)
        self._closed = False

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, by torch.distributed; anything that can be pickled."""
        return agreement.gather(self.group, value)

    def _connect(
        self, members: Sequence[int], payload_bytes: int, workspace_bytes: int, link: Link | None
    ) -> Any:
        return shared_memory.connect(
            self.group,
            members,
            payload_bytes=payload_bytes,
            workspace_bytes=workspace_bytes,
            timeout=self.timeout,
            link=link,
        )

    def _meet_hosts(self, payload_bytes: int, link: Link | None, name: str | None) -> Hierarchy:
        here = next(ranks for ranks in self.hosts if self.rank in ranks)
        inside = self._connect(here, payload_bytes, 0, link)
        token = self.gather(f"commfuse-{secrets.token_hex(8)}")[0]
        return agreement.attempt(
            self.group,
            lambda: Hierarchy(self.group, self.hosts, inside, token, self.timeout, name),
        )

    def _share_gpu_memory(self, payload_bytes: int, workspace_bytes: int) -> None:
        self._gpu = GpuMemory(
            self._native,
            self.group,
            self.device,
            self.gather,
            payload_bytes=payload_bytes,
            workspace_bytes=workspace_bytes,
        )

    def transport_between(self, a: int, b: int) -> str:
        """What carries data between two ranks.

        Example:
            >>> comm.transport_between(0, 3)             # on different hosts
            'torch.distributed'
        """
        if a == b:
            return LOCAL
        if self.transport != HIERARCHICAL:
            return self.transport
        together = any(a in ranks and b in ranks for ranks in self.hosts)
        return SHARED_MEMORY if together else TORCH_DISTRIBUTED

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor, all zeros, in memory that every rank's GPU maps.

        :func:`~commfuse.ops.all_reduce_` reduces a large one in place, with no copy in between.
        Collective: all ranks call with the same shape and dtype, and not while a graph is captured.
        The memory is released by :meth:`close`.

        Args:
            shape: of the tensor.
            dtype: bfloat16, float16 or float32.

        Raises:
            BackendUnavailable: the communicator shares no GPU memory.
            UsageError: all such tensors of the communicator would take 64 GiB or more.

        Example:
            >>> x = comm.empty((1024, 8192), torch.bfloat16)
            >>> ops.all_reduce_(x.copy_(partial), comm)
        """
        if not self.serves_gpu:
            raise BackendUnavailable(
                f"transport {self.transport!r} on {self.device.type} shares no GPU memory"
            )
        return self._gpu.tensor(shape, dtype)

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The process group, or None for a process by itself.

        Raises:
            CommunicatorClosed: it belongs to torch alone again.
        """
        if self._group is None and self.world_size > 1:
            raise CommunicatorClosed("this communicator is closed; make a new Communicator")
        return self._group

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
        inside = self.link_inside if self.hierarchy is not None else None
        return self.link is not None or inside is not None

    @property
    def serves_gpu(self) -> bool:
        """Whether our CUDA kernels can run on it."""
        return self._gpu is not None

    @property
    def table(self) -> tuning.Table | None:
        """The crossovers by which kernels on GPUs are chosen, rank 0's; None on the CPU."""
        return self._gpu.table if self._gpu is not None else None

    @property
    def table_source(self) -> str | None:
        """Where the table comes from, in words."""
        return self._gpu.table_source if self._gpu is not None else None

    @property
    def payload_bytes(self) -> int:
        """The largest message of one call over shared memory, bytes; 0 for other transports."""
        if self._native is None or self.device.type == "cuda":
            return self._gpu.payload_bytes if self._gpu is not None else 0
        return self._native.payload_bytes

    @property
    def workspace_bytes(self) -> int:
        """The size of each rank's workspace, bytes; 0 where there is no shared memory."""
        if self._native is None or self.device.type == "cuda":
            shared = self._gpu.workspace if self._gpu is not None else None
            return shared.nbytes if shared is not None else 0
        return self._native.workspace_bytes

    def workspace(self, rank: int) -> torch.Tensor:
        """A rank's workspace: uint8 [workspace_bytes], zero at first, mapped by every rank.

        On a CUDA communicator it is memory of that rank's GPU, and lives until :meth:`close`.

        Raises:
            BackendUnavailable: the transport shares no memory.
        """
        if self._native is None:
            raise BackendUnavailable(f"transport {self.transport!r} shares no memory")
        if self._gpu is not None and self._gpu.workspace is not None:
            return self._gpu.workspace.of_rank(rank)
        return self._native.workspace(rank)

    def check_host(self) -> None:
        """As :meth:`check`, as far as the host knows: never waits for a GPU."""
        if self._closed:
            raise CommunicatorClosed("this communicator is closed; make a new Communicator")
        if self._native is not None:
            self._native.check()
        if self.hierarchy is not None:
            self.hierarchy.check()

    def check(self) -> None:
        """Raises this communicator's failure, if there is one: see :mod:`commfuse.errors`.

        Calls on a GPU return before they have run: it first waits for the current stream. That a
        row of logits had no token is raised once, as CommfuseError, and is not final.
        """
        if self.device.type == "cuda" and not self._closed:
            torch.cuda.current_stream(self.device).synchronize()
        self.check_host()
        if self.serves_gpu:
            self._native.check_rows()
        for check in self.further_checks:
            check()

    def barrier(self) -> None:
        """Returns when every rank has called it; kernels may still be running on GPUs."""
        self.check_host()
        if self._native is not None:
            self._native.barrier()
        elif self.hierarchy is not None:
            with self.hierarchy.call("barrier"):
                self.hierarchy.gather(torch.zeros(1, dtype=torch.uint8), "barrier")
        else:
            dist.barrier(group=self.group)

    def hand_over(self, nbytes: int) -> None:
        """Writes bytes that every peer reads, reads theirs, and does nothing else.

        No op over shared memory that exchanges messages of this size can be faster: what memory
        and the way between the cores take, for benchmarks to compare with.

        Args:
            nbytes: of each rank's message; at most :attr:`payload_bytes`.

        Raises:
            UsageError: the message is larger.
            BackendUnavailable: the ranks share no memory of the CPU.
            CommunicatorError: a rank called something else, was late, or is gone.

        Example:
            >>> comm.hand_over(8192)                 # on every rank
        """
        self.check_host()
        if self._native is None or self.transport not in (SHARED_MEMORY, LOCAL):
            raise BackendUnavailable(
                _extension.reason or f"transport {self.transport!r} shares no memory of the CPU"
            )
        if self.world_size > 1 and not 0 <= nbytes <= self.payload_bytes:
            raise UsageError(
                f"{nbytes} bytes do not fit the communicator's payload: use 0 to "
                f"{self.payload_bytes}, or make it with Communicator(payload_bytes={nbytes})"
            )
        self._native.hand_over(nbytes)

    @property
    def torch_symmetric(self) -> symmetric.TorchAllReduce:
        """torch's all-reduces over memory that the GPUs share."""
        if self._torch_symmetric is None:
            self._torch_symmetric = symmetric.TorchAllReduce(self.group, self.device)
        return self._torch_symmetric

    def count_message(self, bytes_sent: int, seconds: float) -> None:
        """Counts a call, or a message of a channel, that torch.distributed has carried."""
        self._torch_traffic.calls += 1
        self._torch_traffic.bytes_sent += bytes_sent
        self._torch_traffic.communication_seconds += seconds

    def statistics(self) -> Statistics:
        """Counters since construction or the last :meth:`reset_statistics`."""
        total = Statistics(**vars(self._torch_traffic))
        if self.hierarchy is not None:
            inside = self.hierarchy.inside.statistics()  # its calls are parts of ours
            total.bytes_sent += inside.bytes_sent
            total.communication_seconds += inside.communication_ns * 1e-9
        if self._native is not None:
            native = self._native.statistics()
            total.calls += native.calls
            total.bytes_sent += native.bytes_sent
            total.communication_seconds += native.communication_ns * 1e-9
        return total

    def reset_statistics(self) -> None:
        """Starts the counters of :meth:`statistics` anew."""
        self._torch_traffic = Statistics()
        if self.hierarchy is not None:
            self.hierarchy.inside.reset_statistics()
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

    def start_spans(self) -> None:
        """Records when this rank is in communication, until :meth:`stop_spans`."""
        if self._native is None:
            raise BackendUnavailable(f"transport {self.transport!r} keeps no trace")
        self._native.start_spans()

    def stop_spans(self) -> list[tuple[int, int]]:
        """(begin, end) of each stretch of communication, CLOCK_MONOTONIC ns, in order.

        Waiting for peers, copying and adding their data; the computing part of a fused op is not in
        it.
        """
        return self._native.stop_spans()

    def close(self) -> None:
        """Leaves the group. Peers that wait for this rank are told; memory is released."""
        if not self._closed:
            self._closed = True
            self.backends.clear()
            self.further_checks.clear()
            for channel in self.channels:
                channel.close()
            self.channels.clear()  # they refer to this communicator, and would keep its memory
            if self.hierarchy is not None:
                self.hierarchy.close()
            try:
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)  # kernels of ours may still be at work
            finally:
                if self._native is not None:
                    self._native.close()
                for memory in (self._gpu, self._torch_symmetric):
                    if memory is not None:
                        memory.close()
                # Or torch's destroy_process_group() would leave the group's threads running, which
                # must not be when the interpreter ends.
                self._group = None

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
        place = f"{self.transport}{emulated}"
        if self.device.type == "cuda":
            place = f"{self.device}, {place}"
        return f"<Communicator rank {self.rank} of {self.world_size}, {place}>"

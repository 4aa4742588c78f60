"""Channels: one direction between two ranks of a communicator, with slots of a fixed size."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from commfuse import _extension
from commfuse.errors import (
    BackendUnavailable,
    CommunicatorClosed,
    CommunicatorError,
    PeerDied,
    PeerMismatch,
    PeerTimeout,
    UsageError,
)
from commfuse.runtime import agreement
from commfuse.runtime.communicator import MOST_BYTES, Communicator
from commfuse.runtime.symmetric import SymmetricBuffer
from commfuse.runtime.transports import (
    SHARED_MEMORY,
    SYMMETRIC_MEMORY,
    TORCH_DISTRIBUTED,
    own_transport,
)

# Which backend of the ops serves a transport.
BACKENDS = {SHARED_MEMORY: "cpu", SYMMETRIC_MEMORY: "cuda", TORCH_DISTRIBUTED: "torch"}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FEWEST_SLOTS, MOST_SLOTS = 2, 64
# Of torch.distributed's messages: no other channel of this process, on whatever communicator, has
# had the same, so that none gets what was sent into another.
_next_tag = 0
STAMP_BYTES = 8  # of the time of arrival, over an emulated link


def _transport(asked: str, comm: Communicator) -> str:
    """What a channel goes by.

    Raises:
        UsageError, BackendUnavailable: see :class:`Channel`.
    """
    own = own_transport(comm.device)
    known = ["auto", own, *([TORCH_DISTRIBUTED] if own == SHARED_MEMORY else [])]
    if asked not in known:
        raise UsageError(
            f"unknown transport {asked!r} of a channel on {comm.device.type}: use one of "
            f"{', '.join(map(repr, known))}"
        )
    if comm.transport == own and asked in ("auto", own):
        return own
    if asked == own or TORCH_DISTRIBUTED not in known:
        because = f" ({comm.transport_reason})" if comm.transport_reason else ""
        raise BackendUnavailable(
            f"a channel over {own} needs a communicator that has it; transport is "
            f"{comm.transport}{because}"
        )
    return TORCH_DISTRIBUTED


class Channel:
    """Carries messages of up to ``rows`` rows from one rank of a communicator to another.

    Every rank of the communicator must construct it, the two ends and the others; what they declare
    is compared once, here, so that no shapes travel with the messages. Both ends then exchange
    messages in the same order, by :func:`commfuse.ops.send` and :func:`commfuse.ops.recv`, and know
    the rows of each. A sender may be ``slots`` messages ahead; then it waits for the receiver.

    Its failures are the communicator's, and final. It closes with the communicator.

    Between GPUs it serves one stream of messages, which need not be that of the communicator's
    collectives; calls return before they have run, and CUDA graphs may hold them. Every rank of the
    communicator gives the slots' memory, whether it is at an end or not.

    Args:
        comm: of the two ranks. An emulated link holds back what a rank sends.
        source, target: ranks of ``comm``, where messages begin and end.
        rows: the most rows of a message.
        columns: of every message.
        dtype: bfloat16, float16 or float32. Bits are copied as they are: other data may be viewed
            as one of these.
        slots: messages that may be under way, 2 to 64.
        transport: on the CPU ``"shared memory"`` or ``"torch.distributed"``; ``"auto"``: the former
            where all ranks of the communicator share it. On GPUs ``"symmetric memory"``, which
            ``"auto"`` stands for.

    Raises:
        UsageError: sizes or ranks that cannot be, too little shared memory.
        PeerMismatch: ranks have declared different channels; all ranks raise it.
        BackendUnavailable: shared or symmetric memory was asked for and the communicator has none;
            or the GPUs cannot map each other's.

    Attributes:
        backend: of the ops on this channel: ``"cpu"``, ``"cuda"`` or ``"torch"``.
        no_rows: [0, columns], a message without rows.

    Example:
        >>> channel = Channel(comm, 0, 1, rows=512, columns=4096, dtype=torch.bfloat16)
        >>> if comm.rank == 0:
        ...     ops.send(x, channel)               # x: [8, 4096]
        ... elif comm.rank == 1:
        ...     x = ops.recv(8, channel)
    """

    def __init__(
        self,
        comm: Communicator,
        source: int,
        target: int,
        *,
        rows: int,
        columns: int,
        dtype: torch.dtype,
        slots: int = FEWEST_SLOTS,
        transport: str = "auto",
    ):
        self.comm, self.source, self.target = comm, source, target
        self.rows, self.columns, self.dtype, self.slots = rows, columns, dtype, slots
        self.transport = transport
        self._native = None
        self._memory: SymmetricBuffer | None = None  # between GPUs
        self._posted: deque[tuple[torch.Tensor, dist.Work]] = deque()
        self._sent: deque[tuple[torch.Tensor, dist.Work]] = deque()
        self._failure: CommunicatorError | None = None
        self._open()
        self.no_rows = torch.empty(0, columns, dtype=dtype, device=comm.device)
        comm.channels.append(self)

    def __repr__(self) -> str:
        return (
            f"<Channel from rank {self.source} to {self.target}: {self.slots} slots of "
            f"{self.dtype} [{self.rows}, {self.columns}], {self.transport}>"
        )

    @property
    def handle(self) -> int:
        """What stands for this channel in the schemas of ``torch.ops.commfuse``."""
        if self._native is None:
            raise CommunicatorClosed(f"{self!r} is closed, or this rank is at neither end")
        return self._native.handle

    @property
    def peer(self) -> int:
        """The rank at the other end.

        Raises:
            UsageError: this rank is at neither.
        """
        if self.comm.rank not in (self.source, self.target):
            raise UsageError(f"rank {self.comm.rank} is at neither end of {self!r}")
        return self.target if self.comm.rank == self.source else self.source

    def _declare(self) -> None:
        """Refuses what this rank cannot have."""
        comm, source, target = self.comm, self.source, self.target
        rows, columns, dtype, slots = self.rows, self.columns, self.dtype, self.slots
        world = comm.world_size
        comm.check_host()
        if not (0 <= source < world and 0 <= target < world and source != target):
            raise UsageError(
                f"a channel from rank {source} to rank {target} of {world}: it takes two different "
                f"ranks, 0 to {world - 1}"
            )
        if rows < 1 or columns < 1 or dtype not in DTYPES:
            raise UsageError(
                f"a channel for {dtype} [{rows}, {columns}]: rows and columns must be at least 1, "
                f"and the dtype one of {', '.join(str(dtype) for dtype in DTYPES)}"
            )
        if not FEWEST_SLOTS <= slots <= MOST_SLOTS:
            raise UsageError(f"slots={slots}: use {FEWEST_SLOTS} to {MOST_SLOTS}")
        if (needed := slots * rows * columns * dtype.itemsize) > MOST_BYTES:
            raise UsageError(
                f"too little shared memory: a channel needs {needed} bytes, and no process can map "
                f"more than {MOST_BYTES}; pass fewer rows or slots"
            )
        self.transport = _transport(self.transport, comm)
        self.backend = BACKENDS[self.transport]

    def _open(self) -> None:
        """Compares the declarations and connects the two ends."""
        comm, servers = self.comm, []

        def offer() -> tuple[str, str | None, int]:
            self._declare()
            if self.transport == SHARED_MEMORY and comm.rank == self.source:
                try:
                    servers.append(_extension.require().SegmentServer.for_channel(self._shape))
                except RuntimeError as error:
                    raise UsageError(str(error)) from None
            return repr(self), servers[0].address if servers else None, _next_tag

        global _next_tag
        everybody = agreement.collect(comm.group, offer)
        self._tag = max(tag for *_, tag in everybody)
        _next_tag = self._tag + 1
        for rank, (declared, *_) in enumerate(everybody):
            if declared != everybody[0][0]:
                raise PeerMismatch(
                    f"rank {rank} has declared {declared} while rank 0 has declared "
                    f"{everybody[0][0]}: all ranks must make the same channels in the same order"
                )
        if self.transport == SYMMETRIC_MEMORY:
            self._open_on_gpus()
        elif self.transport == SHARED_MEMORY:
            address = everybody[self.source][1]
            agreement.attempt(comm.group, lambda: self._connect(servers, address))

    def _connect(self, servers: list[Any], address: str) -> None:
        """Meets the other end, if this rank is at one: in memory that the source has made."""
        ends = (self.source, self.target, self._shape)
        native = _extension.require().Channel
        if servers:
            self._native = native.serve(self.comm._native, servers[0], *ends)
        elif self.comm.rank == self.target:
            self._native = native.connect(self.comm._native, address, *ends)

    def _open_on_gpus(self) -> None:
        """Every rank gives memory; those at the ends map it and load their kernels."""
        comm, native = self.comm, _extension.require()
        self._memory = SymmetricBuffer(
            comm.group, native.gpu_channel_bytes(self._shape), comm.device
        )

        def attach() -> None:
            if comm.rank in (self.source, self.target):
                ends = (comm._native, self._memory.addresses, self.source, self.target, self._shape)
                with torch.cuda.device(comm.device):
                    self._native = native.Channel.on_gpu(*ends)

        # Nobody sends before both ends have loaded their kernels.
        agreement.attempt(comm.group, attach)

    @property
    def _shape(self) -> Any:
        native = _extension.require()
        dtype = getattr(native.DType, str(self.dtype).removeprefix("torch."))
        return native.ChannelShape(dtype, self.rows, self.columns, self.slots)

    def close(self) -> None:
        """Releases its memory; by torch.distributed, when all that was sent has left.

        Between GPUs, when this rank's kernels have ended; the peer must have ended its own.
        """
        if self._memory is not None:
            torch.cuda.synchronize(self.comm.device)
            self._native = None
            self._memory.close()
            self._memory = None
        self._native = None
        self._posted.clear()
        while self._sent and self._failure is None:
            message, work = self._sent.popleft()
            # A peer that is gone, or stuck, has no use for it.
            with suppress(PeerDied, PeerTimeout):
                self._wait(work, f"send of {message.nbytes} bytes")
        self._sent.clear()

    # ---- over torch.distributed ----------------------------------------------------------------

    def post(self, rows: int) -> None:
        """Asks for the next message before it is needed, so that it can arrive meanwhile.

        Over memory that the ranks share a message needs no asking: its slot is there.
        """
        if self.backend == "torch":
            self._check(rows, self.target, "recv")
            self._posted.append(self._receive(rows))

    def torch_send(self, x: torch.Tensor) -> None:
        """Hands ``x`` [rows, columns] to torch.distributed, which reads it until it is sent."""
        self._check(x.shape[0], self.source, "send")
        begin = time.perf_counter()
        while len(self._sent) >= self.slots:
            message, work = self._sent.popleft()
            self._wait(work, f"send of {message.nbytes} bytes")
        message = x
        if self.comm.link is not None:
            # When it will have arrived travels at its end.
            message = torch.empty(x.nbytes + STAMP_BYTES, dtype=torch.uint8)
            message[:-STAMP_BYTES] = x.view(-1).view(torch.uint8)
            message[-STAMP_BYTES:].view(torch.int64)[0] = self._arrival(x.nbytes)
        with self._named(f"send of {message.nbytes} bytes"):
            options = {"group": self.comm.group, "group_dst": self.target, "tag": self._tag}
            self._sent.append((message, dist.isend(message, **options)))
        self.comm.count_message(x.nbytes, time.perf_counter() - begin)

    def torch_recv(self, rows: int) -> torch.Tensor:
        """The next message, [rows, columns], from torch.distributed."""
        self._check(rows, self.target, "recv")
        begin = time.perf_counter()
        message, work = self._posted.popleft() if self._posted else self._receive(rows)
        self._wait(work, f"recv of {message.nbytes} bytes")
        if self.comm.link is not None:
            arrival = message[-STAMP_BYTES:].view(torch.int64).item()
            while time.monotonic_ns() < arrival:
                pass
            message = message[:-STAMP_BYTES].view(self.dtype).view(-1, self.columns)
        if len(message) != rows:
            raise UsageError(f"recv of {rows} rows, and {len(message)} were asked for by post()")
        self.comm.count_message(0, time.perf_counter() - begin)
        return message

    def _receive(self, rows: int) -> tuple[torch.Tensor, dist.Work]:
        message = torch.empty(rows, self.columns, dtype=self.dtype)
        if self.comm.link is not None:
            message = torch.empty(message.nbytes + STAMP_BYTES, dtype=torch.uint8)
        with self._named(f"recv of {message.nbytes} bytes"):
            options = {"group": self.comm.group, "group_src": self.source, "tag": self._tag}
            return message, dist.irecv(message, **options)

    def _arrival(self, nbytes: int) -> int:
        """When a message handed over now will have arrived, CLOCK_MONOTONIC nanoseconds."""
        link = self.comm.link
        begin = max(time.monotonic_ns(), self.comm.port_free_ns)
        self.comm.port_free_ns = begin + int(nbytes / link.gigabytes_per_second)
        return self.comm.port_free_ns + int(link.latency_us * 1e3)

    def _check(self, rows: int, end: int, name: str) -> None:
        if self._failure is not None:
            raise self._failure
        self.comm.check_host()
        if self.comm.rank != end:
            raise UsageError(
                f"{name} is for rank {end}, where this channel "
                f"{'begins' if name == 'send' else 'ends'}; this is rank {self.comm.rank}"
            )
        if not 0 <= rows <= self.rows:
            raise UsageError(
                f"a message of {rows} rows: the channel's slots take 0 to {self.rows}; send more "
                "in several messages, or make the channel with more rows"
            )

    def _wait(self, work: dist.Work, what: str) -> None:
        with self._named(what):
            work.wait(timedelta(seconds=self.comm.timeout))

    @contextmanager
    def _named(self, what: str) -> Iterator[None]:
        """Names the peer in torch.distributed's error, which is then this channel's for good."""
        try:
            yield
        except RuntimeError as error:
            me = f"rank {self.comm.rank}"
            among = f"among the {self.comm.name}, " if self.comm.name else ""
            if "timed out" in str(error).lower():
                waited = (
                    f"{among}{me} waited {self.comm.timeout:.3g} s for rank {self.peer} in {what}"
                )
                self._failure = PeerTimeout(f"{waited}. Is that rank stuck?")
            else:
                self._failure = PeerDied(
                    f"{among}rank {self.peer} is gone: {me} lost it in {what}: {error}"
                )
            raise self._failure from None

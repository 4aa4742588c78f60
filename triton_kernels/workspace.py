"""The host's side of the protocol: how a workspace is laid out, created, checked and aborted.

What the parts of a workspace mean, and why it works, is written in ``protocol``.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from commfuse.errors import CommunicatorError, PeerMismatch, PeerTimeout, UsageError

from . import protocol

SLOT_ALIGNMENT = 4096  # bytes: a multiple of every tile that a kernel moves

# How often ``wait`` polls, at most: a time-out may come late, never early. CUDA: an H200 made 2.6
# to 3.9 million. Interpreter: one to two milliseconds of Python a poll.
POLLS_PER_SECOND = {"cuda": 4_000_000, "cpu": 800}

# The index is the op's, the dtype's code in a descriptor.
OPS = (
    "none",
    "all_reduce",
    "all_reduce_rms_norm",
    "matmul_all_reduce",
    "vocab_parallel_argmax",
    "vocab_parallel_sample",
    "verify_chain",
)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# What a call may leave out: bit i of a descriptor's options stands for the i-th.
OPTIONS = (
    "bias", "residual", "norm_weight", "log_probabilities", "draft_probabilities", "truncation",
)  # fmt: skip


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple that is not below ``value``."""
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class Layout:
    """Where things lie in a workspace; equal on all ranks.

    Args:
        world_size: number of ranks W.
        slot_bytes: bytes that one rank can send to one peer in one call, a multiple of 4096.
        max_blocks: largest grid of a kernel on this workspace, a power of two. All blocks must be
            resident on the GPU at the same time, because they spin.
    """

    world_size: int
    slot_bytes: int
    max_blocks: int = 32

    def __post_init__(self):
        if self.max_blocks < 1 or self.max_blocks & (self.max_blocks - 1):
            raise UsageError(f"max_blocks is {self.max_blocks}; it must be a power of two")

    @property
    def padded(self) -> int:
        """W rounded up to a power of two: the length of a vector over the ranks."""
        return 1 << (self.world_size - 1).bit_length()

    @property
    def generations(self) -> int:
        """Byte offset of the generations."""
        return protocol.DESCRIPTORS.value + 2 * self.padded * 8 * protocol.DESCRIPTOR_WORDS.value

    @property
    def words(self) -> int:
        """Byte offset of the signal words."""
        return round_up(self.generations + 8 * self.max_blocks, 128)

    @property
    def arrivals(self) -> int:
        """Byte offset of the arrivals."""
        return self.words + 2 * protocol.PHASES.value * self.max_blocks * self.padded * 8

    @property
    def squares(self) -> int:
        """Byte offset of the sums of squares."""
        return round_up(self.arrivals + 8 * self.max_blocks, 128)

    @property
    def payload(self) -> int:
        """Byte offset of the payload."""
        return round_up(self.squares + 4 * self.max_blocks * protocol.MAX_ROWS.value, 4096)

    @property
    def half_stride(self) -> int:
        """Bytes from the payload half of even generations to that of odd ones."""
        return self.world_size * self.slot_bytes

    @property
    def nbytes(self) -> int:
        """Bytes that every rank's workspace must have."""
        return self.payload + 2 * self.world_size * self.slot_bytes

    def constants(self) -> dict[str, int]:
        """The layout as the compile-time arguments of a kernel that exchanges messages."""
        return {
            "W": self.world_size,
            "PADDED": self.padded,
            "MAX_BLOCKS": self.max_blocks,
            "GENERATIONS": self.generations,
            "WORDS": self.words,
            "PAYLOAD": self.payload,
            "HALF": self.half_stride,
            "SLOT": self.slot_bytes,
        }

    def meeting_constants(self) -> dict[str, int]:
        """The further ones of a kernel whose blocks meet."""
        return {"ARRIVALS": self.arrivals, "SQUARES": self.squares}

    @classmethod
    def fit(cls, nbytes: int, world_size: int, max_blocks: int = 32) -> Layout:
        """The layout with the largest slots that ``nbytes`` bytes per rank can hold.

        Raises:
            UsageError: not even the smallest slots fit; the message says how much is needed.
        """
        smallest = cls(world_size, SLOT_ALIGNMENT, max_blocks)
        slot = (nbytes - smallest.payload) // (2 * world_size)
        if slot < SLOT_ALIGNMENT:
            raise UsageError(
                f"a workspace of {nbytes} bytes is too small for Triton kernels with {world_size} "
                f"ranks and {max_blocks} blocks: at least {smallest.nbytes} bytes are needed"
            )
        # Offsets within a slot are 32-bit in the kernels.
        slot = min(slot, 2**30)
        return cls(world_size, slot // SLOT_ALIGNMENT * SLOT_ALIGNMENT, max_blocks)


@dataclass(frozen=True)
class Failure:
    """A failure record: ``rank`` gave up on ``peer`` (-1: no peer in particular)."""

    kind: int
    rank: int
    peer: int
    generation: int
    expected: int
    seen: int


@dataclass(frozen=True, eq=False)
class Workspace:
    """Every rank's memory, as one rank sees it. Make it with :meth:`create`.

    One workspace serves one stream of calls: kernels on it must run one after the other.

    Attributes:
        rank: this rank.
        buffers: per rank, a uint8 tensor on that rank's memory.
        addresses: int64 [W] on the device of this rank: where the buffers start.
        layout: the same on every rank.
        timeout: seconds that a wait lasts, approximately (see ``protocol``).
    """

    rank: int
    buffers: tuple[torch.Tensor, ...]
    addresses: torch.Tensor
    layout: Layout
    timeout: float

    @classmethod
    def create(
        cls,
        rank: int,
        buffers: Sequence[torch.Tensor],
        *,
        max_blocks: int = 32,
        timeout: float = 30.0,
    ) -> Workspace:
        """Lays a workspace out over memory that all ranks map.

        Args:
            rank: this rank, 0 <= rank < W.
            buffers: W contiguous uint8 tensors of equal size, aligned to 16 bytes and filled with
                zeros: entry r is rank r's memory as this process maps it. The first kernel of any
                rank may start only when the memory of every rank is zero.
            max_blocks: largest grid, a power of two; equal on all ranks.
            timeout: seconds that a rank waits for its peers, approximately.

        Raises:
            UsageError: the buffers do not fit together, or are too small (says the size needed).

        Example::

            buffers = [comm.workspace(r) for r in range(comm.world_size)]
            workspace = Workspace.create(comm.rank, buffers, timeout=30.0)
        """
        buffers = tuple(buffers)
        if not 0 <= rank < len(buffers):
            raise UsageError(f"rank {rank} does not exist: there are {len(buffers)} buffers")
        sizes = {buffer.numel() for buffer in buffers}
        if len(sizes) != 1:
            raise UsageError(f"the ranks' workspaces differ in size: {sorted(sizes)} bytes")
        for r, buffer in enumerate(buffers):
            if buffer.dtype != torch.uint8 or not buffer.is_contiguous():
                raise UsageError(f"the workspace of rank {r} must be contiguous uint8 memory")
            if buffer.data_ptr() % 16:
                raise UsageError(f"the workspace of rank {r} is not aligned to 16 bytes")
        layout = Layout.fit(sizes.pop(), len(buffers), max_blocks)
        addresses = torch.tensor([b.data_ptr() for b in buffers], dtype=torch.int64)
        return cls(rank, buffers, addresses.to(buffers[rank].device), layout, timeout)

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self.buffers)

    @property
    def max_polls(self) -> int:
        """``timeout`` as a number of polls."""
        return max(1, int(self.timeout * POLLS_PER_SECOND[self.addresses.device.type]))

    def _int64(self, rank: int, offset: int, count: int) -> torch.Tensor:
        return self.buffers[rank][offset : offset + 8 * count].view(torch.int64)

    def failure(self) -> Failure | None:
        """The failure that ended this workspace, or None. On CUDA this waits for the stream."""
        reporter = int(self._int64(self.rank, protocol.ABORT.value, 1)) - 1
        if reporter < 0:
            return None
        # What this rank found itself comes first; else the record of the rank that set our word.
        claimed, *own = self._int64(self.rank, protocol.RECORD.value, 7).tolist()
        record = own if claimed else self._int64(reporter, protocol.RECORD.value, 7).tolist()[1:]
        return Failure(*record)

    def check(self) -> None:
        """Raises what :meth:`failure` finds; a failed workspace can never be used again.

        Raises:
            PeerTimeout: a rank did not signal in time.
            PeerMismatch: two ranks called different ops, dtypes or shapes.
            CommunicatorError: the host of some rank aborted.
        """
        failure = self.failure()
        if failure is None:
            return
        call = f"call {failure.generation}"
        if failure.kind == protocol.TIMED_OUT.value and failure.peer == failure.rank:
            raise PeerTimeout(
                f"rank {failure.rank} waited in vain for blocks of its own in "
                f"{self._called(failure, failure.rank)}, {call} (limit about {self.timeout:g} s): "
                f"a grid of up to {self.layout.max_blocks} blocks must run at once on the GPU; "
                "make the workspace with fewer max_blocks, or leave the GPU to this process"
            )
        if failure.kind == protocol.TIMED_OUT.value:
            raise PeerTimeout(
                f"rank {failure.rank} waited in vain for rank {failure.peer} in "
                f"{self._called(failure, failure.rank)}, {call} (limit about {self.timeout:g} s): "
                f"expected generation {failure.generation}, seen {failure.seen >> 16}"
            )
        if failure.kind == protocol.MISMATCHED.value:
            raise PeerMismatch(
                f"rank {failure.peer} called {self._called(failure, failure.peer)} while rank "
                f"{failure.rank} called {self._called(failure, failure.rank)} ({call})"
            )
        raise CommunicatorError(f"the host of rank {failure.rank} aborted the communication")

    def _called(self, failure: Failure, source: int) -> str:
        """What ``source`` called, from the descriptor that it left with the reporting rank."""
        count = protocol.DESCRIPTOR_WORDS.value
        slot = (failure.generation & 1) * self.layout.padded + source
        words = self._int64(
            failure.rank, protocol.DESCRIPTORS.value + 8 * count * slot, count
        ).tolist()
        op, dtype, rows, columns, options = words[:5]
        called = f"{OPS[op]} {str(DTYPES[dtype]).removeprefix('torch.')}[{rows}, {columns}]"
        given = [name for i, name in enumerate(OPTIONS) if options >> i & 1]
        return " with ".join([called, *([", ".join(given)] if given else [])])

    def abort(self) -> None:
        """Ends this workspace on all ranks, from the host: waiting kernels leave, later ones too.

        For a host that knows that a peer is gone. On CUDA call it on a stream of its own: the
        stream of the waiting kernel would run it when the wait is over.
        """
        record = self._int64(self.rank, protocol.RECORD.value, 7)
        if not int(record[0]):
            record[1:] = torch.tensor([protocol.ABORTED.value, self.rank, -1, 0, 0, 0])
            record[0] = 1
        for rank in range(self.world_size):
            self._int64(rank, protocol.ABORT.value, 1).fill_(self.rank + 1)


def options_code(**tensors: torch.Tensor | None) -> int:
    """Which of ``OPTIONS`` a call gives, as a descriptor says it."""
    return sum(1 << OPTIONS.index(name) for name, given in tensors.items() if given is not None)


def call_tag(op: int, dtype: int, rows: int, columns: int, options: int) -> int:
    """16 bits that differ, almost surely, between calls that do not belong together."""
    return zlib.crc32(f"{op} {dtype} {rows} {columns} {options}".encode()) & 0xFFFF

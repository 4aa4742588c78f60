"""On every rank: many calls with random ops, sizes and delays, and a broken exchange beside it."""

import os
import random
import time

import torch
import torch.distributed as dist

from commfuse import ops
from commfuse.runtime.communicator import Communicator

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# One slice, several, two-shot (from 64 KiB on), several calls of the payload below.
SIZES = (0, 1, 17, 576, 4096, 16385, 33000, 70001)
PAYLOAD_BYTES = 128 * 1024
KINDS = ("sum", "sum", "in_place", "scatter", "gather", "norm", "matmul", "argmax", "barrier")


class Soak:
    """Calls that are drawn alike on every rank, with delays that are not.

    Every result is an exact sum of small integers that change from call to call, so that data of
    another call, or half a message, cannot pass.
    """

    def __init__(self, comm, seed: int):
        self.comm = comm
        self.shared = random.Random(seed)
        self.own = random.Random(1000 * seed + comm.rank)
        self.calls = 0
        features = 40
        self.w = torch.randint(
            -2, 3, (130, features), generator=torch.Generator().manual_seed(seed)
        )
        self.packed = {dtype: ops.pack_weight(self.w.to(dtype)) for dtype in DTYPES}
        # Slices of x, so that drawing inputs costs next to nothing.
        self.numbers = torch.randint(-8, 9, (max(SIZES) + 64,), generator=torch.Generator()
                                     .manual_seed(seed))  # fmt: skip

    def part(self, rank: int, shape) -> torch.Tensor:
        """What a rank contributes to the present call."""
        count = 1
        for length in shape:
            count *= length
        begin = (7 * self.calls + 13 * rank) % 64
        return self.numbers[begin : begin + count].view(shape)

    def total(self, shape) -> torch.Tensor:
        return sum(self.part(rank, shape) for rank in range(self.comm.world_size))

    def delay(self) -> None:
        """One call in eight: before it begins, or at each of its signals."""
        draw = self.own.random()
        self.comm._native.set_publish_delay_us(self.own.randrange(300) if draw < 0.06 else 0)
        if draw > 0.94:
            time.sleep(self.own.random() * 1e-3)

    def step(self) -> str | None:
        """One call; what it was, if its result is wrong."""
        self.calls += 1
        kind = self.shared.choice(KINDS)
        dtype = self.shared.choice(DTYPES)
        self.delay()
        wrong = getattr(self, f"_{kind}")(dtype)
        return f"call {self.calls}: {kind} {dtype}" if wrong else None

    def _sum(self, dtype) -> bool:
        shape = (self.shared.choice(SIZES),)
        out = ops.all_reduce(self.part(self.comm.rank, shape).to(dtype), self.comm)
        return not torch.equal(out.to(torch.int64), self.total(shape))

    def _in_place(self, dtype) -> bool:
        shape = (self.shared.choice(SIZES),)
        out = self.part(self.comm.rank, shape).to(dtype)
        ops.all_reduce_(out, self.comm)
        return not torch.equal(out.to(torch.int64), self.total(shape))

    def _scatter(self, dtype) -> bool:
        rank, world = self.comm.rank, self.comm.world_size
        rows = self.shared.choice(SIZES) // world
        out = ops.reduce_scatter(self.part(rank, (rows * world,)).to(dtype), self.comm)
        mine = self.total((rows * world,))[rank * rows : (rank + 1) * rows]
        return not torch.equal(out.to(torch.int64), mine)

    def _gather(self, dtype) -> bool:
        shape = (self.shared.choice(SIZES),)
        out = ops.all_gather(self.part(self.comm.rank, shape).to(dtype), self.comm)
        parts = [self.part(rank, shape) for rank in range(self.comm.world_size)]
        return not torch.equal(out.to(torch.int64), torch.cat(parts))

    def _norm(self, dtype) -> bool:
        shape = (self.shared.randrange(1, 5), self.shared.choice((1, 33, 576)))
        residual = self.part(99, shape)
        _, out = ops.all_reduce_rms_norm(
            self.part(self.comm.rank, shape).to(dtype), residual.to(dtype),
            torch.ones(shape[1], dtype=dtype), 1e-5, self.comm,
        )  # fmt: skip
        return not torch.equal(out.to(torch.int64), self.total(shape) + residual)

    def _matmul(self, dtype) -> bool:
        # Only zeros and ones: sums stay below 256, where bfloat16 is exact.
        shape = (self.shared.randrange(0, 8), 40)
        x = self.part(self.comm.rank, shape) % 2
        out = ops.matmul_all_reduce(x.to(dtype), self.packed[dtype], self.comm)
        total = sum(self.part(rank, shape) % 2 for rank in range(self.comm.world_size))
        return not torch.equal(out.to(torch.int64), total @ self.w.T)

    def _argmax(self, dtype) -> bool:
        rows, shard = self.shared.randrange(1, 9), 33
        parts = [self.part(rank, (rows, shard)) for rank in range(self.comm.world_size)]
        mine = parts[self.comm.rank].to(dtype)
        out = ops.vocab_parallel_argmax(mine, shard * self.comm.rank, self.comm)
        whole = torch.cat(parts, dim=1)
        first = (whole == whole.max(dim=1, keepdim=True).values).int().argmax(dim=1)
        return not torch.equal(out, first)

    def _barrier(self, dtype) -> bool:
        self.comm.barrier()
        return False


def run(calls: int, seed: int) -> list[str]:
    """The wrong results."""
    with Communicator(dist.group.WORLD, payload_bytes=PAYLOAD_BYTES) as comm:
        soak = Soak(comm, seed)
        return [wrong for wrong in (soak.step() for _ in range(calls)) if wrong]


class MiniExchange:
    """The one-shot exchange in Python over the workspaces, with any number of payload halves.

    Its word is a generation, its payload int64. With two halves it follows docs/protocol.md; with
    one, a rank that is slow to read finds the next call's payload.
    """

    def __init__(self, comm: Communicator, halves: int):
        self.comm, self.halves, self.generation = comm, halves, 0
        areas = [comm.workspace(rank).view(torch.int64) for rank in range(comm.world_size)]
        self.words = [area[:16:8].numpy() for area in areas]  # one cache line for each parity
        self.slots = [area[16 : 16 + 2 * 33000].view(2, 33000).numpy() for area in areas]
        self.rank = comm.rank

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.generation += 1
        parity, half = self.generation % 2, self.generation % self.halves
        count = x.numel()
        self.slots[self.rank][half, :count] = x.numpy()
        self.words[self.rank][parity] = self.generation
        total = torch.zeros_like(x)
        for rank in range(self.comm.world_size):
            while self.words[rank][parity] != self.generation:
                os.sched_yield()
            total += torch.from_numpy(self.slots[rank][half, :count])
        return total


class ControlledSoak(Soak):
    """The same calls, delays and checks, with the exchange above in place of ours."""

    def __init__(self, comm, seed: int, halves: int):
        super().__init__(comm, seed)
        self.exchange = MiniExchange(comm, halves)

    def step(self) -> str | None:
        self.calls += 1
        shape = (self.shared.choice(SIZES[:-1]),)
        if self.own.random() > 0.94:
            time.sleep(self.own.random() * 1e-3)
        out = self.exchange(self.part(self.comm.rank, shape).contiguous())
        return None if torch.equal(out, self.total(shape)) else f"call {self.calls}"


def controls(calls: int, seed: int) -> dict[int, int]:
    """By the number of payload halves, how many results were wrong."""
    wrong = {}
    for halves in (2, 1):
        with Communicator(dist.group.WORLD) as comm:
            soak = ControlledSoak(comm, seed, halves)
            wrong[halves] = sum(soak.step() is not None for _ in range(calls))
            dist.barrier()
    return wrong

"""Measures stage boundaries between GPUs: messages to and fro, and the two GEMMs beside one.

Ranks work in pairs, all at once: an even one sends to the odd one behind it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F

from commfuse import ops
from commfuse.bench.provenance import gpu_provenance, provenance
from commfuse.bench.send_recv import Options
from commfuse.bench.table import show_rows
from commfuse.bench.timing import Cell, Times, gather, measure
from commfuse.errors import CommfuseError, UsageError
from commfuse.runtime import launch
from commfuse.runtime.channel import Channel
from commfuse.runtime.communicator import Communicator
from commfuse.runtime.symmetric import SymmetricBuffer
from commfuse.testing.numerics import complaint

COLUMNS, HIDDEN = 4096, 8192
# 8 KB to 64 MB of a two-byte type.
ROWS = {"quick": (1, 8, 128, 1024, 8192), "all": (1, 8, 32, 128, 512, 1024, 8192)}
GEMM_ROWS = {"quick": (1, 16, 64, 512, 4096), "all": (1, 16, 64, 65, 256, 512, 1024, 2048, 4096)}
MESSAGES = ("cuda", "symm_mem", "nccl")
GEMMS = ("cuda", "gemm+send", "cublas+symm_mem", "gemms", "cublas_twice")
THERE, BACK = 0, 1  # torch's signals


def check_options(options: Options, world_size: int) -> None:
    """Refuses, before ranks are started, what they would refuse.

    Raises:
        UsageError: an unknown backend, or ranks that do not pair up.
    """
    known = tuple(dict.fromkeys((*MESSAGES, *GEMMS)))
    for name in options.backends or ():
        if name not in known:
            raise UsageError(
                f"unknown backend {name!r} for send_recv on GPUs: use {', '.join(known)}"
            )
    if world_size < 2 or world_size % 2:
        raise UsageError(
            f"send_recv is measured between pairs of ranks, not {world_size}: use --ranks 2 or 4"
        )


def run_rank(options: Options) -> None:
    """Runs the benchmark on one of the ranks; the first prints the rows.

    Raises:
        CommfuseError: a message or a product is wrong.
    """
    launch.join_job()
    device = launch.use_gpu()
    try:
        with (
            torch.inference_mode(),
            torch.cuda.stream(torch.cuda.Stream()),
            Communicator(dist.group.WORLD, device=device) as comm,
        ):
            for sizes, measured in ((ROWS, _messages), (GEMM_ROWS, _gemms)):
                rows = (row for n in sizes[options.cases] for row in measured(n, options, comm))
                show_rows(rows, options.as_json, quiet=comm.rank != 0)
    finally:
        dist.destroy_process_group()


@dataclass
class _Boundary:
    """This rank's side of a boundary: channels to and fro, and torch's memory and signals."""

    comm: Communicator
    channels: list[Channel]
    buffer: SymmetricBuffer
    x: torch.Tensor  # [rows, columns], the same on all ranks: what the even ones send

    @classmethod
    def open(cls, comm: Communicator, rows: int, columns: int, dtype: torch.dtype) -> _Boundary:
        sizes = {"rows": rows, "columns": columns, "dtype": dtype}
        channels = [
            Channel(comm, *ends, **sizes)
            for even in range(0, comm.world_size, 2)
            for ends in ((even, even + 1), (even + 1, even))
        ]
        generator = torch.Generator(str(comm.device)).manual_seed(rows)
        x = torch.randn(rows, columns, generator=generator, device=str(comm.device)).to(dtype)
        return cls(comm, channels, SymmetricBuffer(comm.group, x.nbytes, comm.device), x)

    @property
    def first(self) -> bool:
        return self.comm.rank % 2 == 0

    @property
    def peer(self) -> int:
        return self.comm.rank ^ 1

    @property
    def there(self) -> Channel:
        return self.channels[self.comm.rank // 2 * 2]

    @property
    def back(self) -> Channel:
        return self.channels[self.comm.rank // 2 * 2 + 1]

    def put(self, x: torch.Tensor, signal: int) -> None:
        """Copies to the peer's memory and signals, by torch."""
        self.buffer.of_rank(self.peer)[: x.nbytes].view(x.dtype).view(x.shape).copy_(x)
        self.buffer.signal(self.peer, signal)

    def get(self, signal: int) -> torch.Tensor:
        """What the peer has put here."""
        self.buffer.await_signal(self.peer, signal)
        return self.buffer.local.view(self.x.dtype).view_as(self.x)

    def close(self) -> None:
        self.comm.check()
        self.comm.barrier()
        for channel in self.channels:
            channel.close()
        self.buffer.close()


@functools.cache
def _nccl_group(group: dist.ProcessGroup) -> dist.ProcessGroup:
    return dist.new_group(dist.get_process_group_ranks(group), backend="nccl")


def _cuda_to_and_fro(b: _Boundary) -> torch.Tensor:
    if b.first:
        ops.send(b.x, b.there)
        return ops.recv(len(b.x), b.back)
    x = ops.recv(len(b.x), b.there)
    ops.send(x, b.back)
    return x


def _torch_to_and_fro(b: _Boundary) -> torch.Tensor:
    if b.first:
        b.put(b.x, THERE)
        return b.get(BACK).clone()
    x = b.get(THERE).clone()
    b.put(x, BACK)
    return x


def _nccl_to_and_fro(b: _Boundary) -> torch.Tensor:
    options = {"group": _nccl_group(b.comm.group)}
    x = b.x if b.first else torch.empty_like(b.x)
    if not b.first:
        dist.recv(x, group_src=b.peer, **options)
    dist.send(x, group_dst=b.peer, **options)
    if b.first:
        x = torch.empty_like(x)
        dist.recv(x, group_src=b.peer, **options)
    return x


def _left_out(name: str, comm: Communicator) -> bool:
    """NCCL takes one rank on each GPU."""
    return name == "nccl" and not (
        dist.is_nccl_available() and torch.cuda.device_count() >= comm.world_size
    )


def _messages(count: int, options: Options, comm: Communicator) -> list[dict]:
    """The rows of one size of messages."""
    calls = dict(
        zip(MESSAGES, (_cuda_to_and_fro, _torch_to_and_fro, _nccl_to_and_fro), strict=True)
    )
    boundary = _Boundary.open(comm, count, COLUMNS, getattr(torch, options.dtype))
    cells = []
    for name in MESSAGES:
        if name not in (options.backends or MESSAGES) or _left_out(name, comm):
            continue
        run = functools.partial(calls[name], boundary)
        same = torch.equal(run(), boundary.x)
        comm.check()
        if not all(gather(same, comm)):
            raise CommfuseError(f"{name}: a message of {count} rows came changed")
        cells.append(Cell(name, [run]))
    times = measure(cells, comm, options.iterations) if cells else {}
    shape = {"m": count, "n": COLUMNS}
    rows = _rows("send_recv", shape, times, "symm_mem", 2, options, boundary)
    boundary.close()
    return rows


class _Beside:
    """The GEMM in front of a boundary, and the one behind it, which tells the first of its end."""

    def __init__(self, boundary: _Boundary):
        self.b = boundary
        generator = torch.Generator(str(boundary.x.device)).manual_seed(1)
        options = {"generator": generator, "device": str(boundary.x.device)}
        self.w, self.v = (
            (torch.randn(HIDDEN, HIDDEN, **options) / HIDDEN**0.5).to(boundary.x.dtype)
            for _ in range(2)
        )
        self.idle = torch.zeros(1, device=str(boundary.x.device))

    def cuda(self) -> torch.Tensor | None:
        if not self.b.first:
            y, _ = ops.recv_matmul(len(self.b.x), self.b.there, self.v)
            ops.send(self.b.x[:0], self.b.back)
            return y
        ops.matmul_send(self.b.x, self.w, self.b.there)
        ops.recv(0, self.b.back)

    def unfused(self) -> torch.Tensor | None:
        """Our ops one after the other."""
        if not self.b.first:
            y = ops.matmul(ops.recv(len(self.b.x), self.b.there), self.v, backend="cuda")
            ops.send(self.b.x[:0], self.b.back)
            return y
        ops.send(ops.matmul(self.b.x, self.w, backend="cuda"), self.b.there)
        ops.recv(0, self.b.back)

    def torchs(self) -> torch.Tensor | None:
        """torch's GEMM, a copy and a signal, torch's GEMM."""
        if not self.b.first:
            y = F.linear(self.b.get(THERE), self.v)
            self.b.buffer.signal(self.b.peer, BACK)
            return y
        self.b.put(F.linear(self.b.x, self.w), THERE)
        self.b.buffer.await_signal(self.b.peer, BACK)

    def alone(self, gemm: Callable[..., torch.Tensor]) -> torch.Tensor:
        """Both GEMMs on the first rank, and no boundary."""
        if not self.b.first:
            return self.idle.add_(1)
        return gemm(gemm(self.b.x, self.w), self.v)


def _gemms(count: int, options: Options, comm: Communicator) -> list[dict]:
    """The rows of one number of rows between two GEMMs."""
    boundary = _Boundary.open(comm, count, HIDDEN, getattr(torch, options.dtype))
    beside = _Beside(boundary)
    calls = dict(
        zip(
            GEMMS,
            (
                beside.cuda,
                beside.unfused,
                beside.torchs,
                lambda: beside.alone(functools.partial(ops.matmul, backend="cuda")),
                lambda: beside.alone(F.linear),
            ),
            strict=True,
        )
    )
    x, w, v = boundary.x, beside.w, beside.v
    plain, exact = F.linear(F.linear(x, w), v), (x.double() @ w.double().T) @ v.double().T
    cells = []
    for name in GEMMS:
        if name not in (options.backends or GEMMS):
            continue
        y = calls[name]()
        comm.check()
        has_product = boundary.first == (name in GEMMS[-2:])
        problem = complaint(y, plain, exact) if has_product else None
        if problem := next((found for found in gather(problem, comm) if found), None):
            raise CommfuseError(f"{name}: the product of {count} rows is wrong: {problem}")
        cells.append(Cell(name, [calls[name]]))
    del plain, exact
    times = measure(cells, comm, options.iterations) if cells else {}
    shape = {"m": count, "k": HIDDEN, "n": HIDDEN}
    rows = _rows("boundary", shape, times, "cublas+symm_mem", 1, options, boundary)
    alone = min((times[name].p50_us for name in GEMMS[-2:] if name in times), default=None)
    for row in rows:
        row["of_gemms"] = row["p50_us"] / alone if alone else None
    boundary.close()
    return rows


def _rows(
    op: str,
    shape: dict[str, int],
    times: dict[str, Times],
    baseline: str,
    trips: int,
    options: Options,
    boundary: _Boundary,
) -> list[dict]:
    """``trips``: messages, one after the other, in each timed call."""
    comm = boundary.comm
    return [
        {
            "op": op,
            "backend": name,
            "device": "cuda",
            "ranks": comm.world_size,
            "emulated": False,
            "dtype": options.dtype,
            "shape": shape,
            "bytes": boundary.x.nbytes,
            "p20_us": round(time.p20_us / trips, 3),
            "p50_us": round(time.p50_us / trips, 3),
            "p80_us": round(time.p80_us / trips, 3),
            "exposed": None,
            "times_faster_than_torch": (
                times[baseline].p50_us / time.p50_us
                if baseline in times and name not in GEMMS[-2:]
                else None
            ),
            "streamed_gb_per_s": None,
            "fraction_of_read": None,
            "iterations": time.iterations,
            "calls_per_replay": time.calls,
            "graph": True,
            "transport": comm.transport,
            **gpu_provenance(comm),
            **provenance(),
        }
        for name, time in times.items()
    ]

"""On every rank: matmul_all_reduce's independence of the batch, and what it does when."""

import itertools

import torch
import torch.distributed as dist

from commfuse import ops
from commfuse.runtime.communicator import Communicator
from commfuse.testing.numerics import digest

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ROWS = 64


def batches() -> list[str]:
    """Rows computed in small batches, or in calls cut by a small payload, have the same bits."""
    failures = []
    with (
        Communicator(dist.group.WORLD) as comm,
        Communicator(dist.group.WORLD, payload_bytes=4096) as small,
    ):
        for dtype, n in itertools.product(DTYPES, (17, 577)):
            generator = torch.Generator().manual_seed(n)
            x, residual = (
                torch.randn(ROWS, size, generator=generator).to(dtype) for size in (33, n)
            )
            bias, g = (torch.randn(n, generator=generator).to(dtype) for _ in range(2))
            # K differs between ranks, and is odd on some.
            k = 33 - comm.rank
            x, w = x[:, :k].contiguous(), torch.randn(n, k, generator=generator).to(dtype)
            w = ops.pack_weight(w)

            def call(on, begin, end, x=x, w=w, bias=bias, residual=residual, g=g):
                return torch.stack(ops.matmul_all_reduce(
                    x[begin:end], w, on, bias=bias, residual=residual[begin:end], norm_weight=g
                ))  # fmt: skip

            whole = call(comm, 0, ROWS)
            if digest(call(small, 0, ROWS)) != digest(whole):
                failures.append(f"{dtype} n={n}: small payload")
            for m in (1, 2, 3, 4, 5, 6, 7, 13):
                for begin in (0, ROWS - m):
                    end = begin + m
                    if digest(call(comm, begin, end)) != digest(whole[:, begin:end]):
                        failures.append(f"{dtype} n={n}: rows {begin} to {end}")
    return failures


def trace() -> dict[str, list]:
    """What a large matmul_all_reduce did when, and that nothing is traced outside."""
    with Communicator(dist.group.WORLD) as comm:
        x = torch.randn(4, 2048).bfloat16()
        w = ops.pack_weight(torch.randn(4096, 2048).bfloat16())
        ops.matmul_all_reduce(x, w, comm)
        before = comm.stop_trace()
        comm.barrier()
        comm.start_trace()
        ops.matmul_all_reduce(x, w, comm)
        return {"before": before, "events": comm.stop_trace(), "after": comm.stop_trace()}


def row_above_the_payload() -> tuple[str, list[float]]:
    """A single row that no call can carry: the error, and that the ranks can go on."""
    with Communicator(dist.group.WORLD, payload_bytes=4096) as comm:
        w = ops.pack_weight(torch.ones(1025, 3))
        message = ""
        try:
            ops.matmul_all_reduce(torch.ones(1, 3), w, comm)
        except ValueError as error:
            message = str(error)
        return message, ops.all_reduce(torch.ones(3), comm).tolist()


def run() -> dict:
    """All of it in one job."""
    return {"batches": batches(), "trace": trace(), "too large": row_above_the_payload()}

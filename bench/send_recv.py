"""Measures a stage boundary: messages that two ranks send to and fro, ours and gloo's."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from commfuse import ops
from commfuse.bench.provenance import provenance
from commfuse.bench.table import show_rows
from commfuse.bench.timing import gather
from commfuse.errors import CommfuseError, UsageError
from commfuse.runtime import launch
from commfuse.runtime.channel import Channel
from commfuse.runtime.communicator import Communicator
from commfuse.runtime.link import Link
from commfuse.runtime.transports import SHARED_MEMORY, TORCH_DISTRIBUTED

TRANSPORTS = {"cpu": SHARED_MEMORY, "torch": TORCH_DISTRIBUTED}
COLUMNS = 4096
# 8 KB, 64 KB, 256 KB and 1 MB of a two-byte type; then what a prefill of 512 tokens sends.
ROWS = {"quick": (1, 8, 32, 128), "all": (1, 8, 32, 128, 512)}
ROUNDS, SECONDS, FEWEST, MOST = 10, 1.0, 50, 20_000


@dataclass(frozen=True)
class Options:
    """A benchmark of send and recv, as ``commfuse bench send_recv`` takes it.

    Attributes:
        backends: on the CPU ``cpu`` and ``torch``; None: all.
        dtype: name of a torch dtype.
        cases: ``quick`` or ``all``.
        iterations: messages each way that are timed; None: about a second's worth.
        link: an emulated link, or None.
        as_json: print JSON lines instead of a table.
    """

    backends: tuple[str, ...] | None = None
    dtype: str = "bfloat16"
    cases: str = "quick"
    iterations: int | None = None
    link: Link | None = None
    as_json: bool = False


def check_options(options: Options, world_size: int) -> None:
    """Refuses, before ranks are started, what they would refuse.

    Raises:
        UsageError: an unknown backend, or another number of ranks than two.
    """
    for name in options.backends or ():
        if name not in TRANSPORTS:
            raise UsageError(f"unknown backend {name!r} for send_recv: use {', '.join(TRANSPORTS)}")
    if world_size != 2:
        raise UsageError(f"send_recv is measured between 2 ranks, not {world_size}: use --ranks 2")


def run_rank(options: Options) -> None:
    """Runs the benchmark on one of the two ranks; the first prints the rows.

    Raises:
        CommfuseError: a message did not arrive as it was sent.
    """
    torch.set_num_threads(1)
    launch.join_job()
    try:
        with torch.inference_mode(), Communicator(dist.group.WORLD, link=options.link) as comm:
            rows = (row for n in ROWS[options.cases] for row in _measure(n, options, comm))
            show_rows(rows, options.as_json, quiet=comm.rank != 0)
    finally:
        dist.destroy_process_group()


def to_and_fro(x: torch.Tensor, there: Channel, back: Channel, count: int) -> list[int]:
    """Nanoseconds of ``count`` round trips; on the second rank, of no meaning."""
    times = []
    if there.comm.rank == 0:
        for _ in range(count):
            begin = time.perf_counter_ns()
            ops.send(x, there)
            ops.recv(len(x), back)
            times.append(time.perf_counter_ns() - begin)
    else:
        for _ in range(count):
            ops.send(ops.recv(len(x), there), back)
    return times


def _check(x: torch.Tensor, there: Channel, back: Channel) -> None:
    if there.comm.rank == 0:
        ops.send(x, there)
        if not torch.equal(ops.recv(len(x), back), x):
            raise CommfuseError(f"{there!r}: a message of {len(x)} rows came back changed")
    else:
        ops.send(ops.recv(len(x), there), back)


def _measure(count: int, options: Options, comm: Communicator) -> list[dict]:
    """The rows of one size."""
    dtype = getattr(torch, options.dtype)
    x = torch.randn(count, COLUMNS).to(dtype)
    names = options.backends or tuple(TRANSPORTS)
    channels, calls = {}, {}
    for name in names:
        sizes = {"rows": count, "columns": COLUMNS, "dtype": dtype, "transport": TRANSPORTS[name]}
        channels[name] = Channel(comm, 0, 1, **sizes), Channel(comm, 1, 0, **sizes)
        _check(x, *channels[name])
        trial = to_and_fro(x, *channels[name], 10)
        wanted = options.iterations
        if wanted is None:
            median = float(np.median(trial)) if trial else 0.0
            wanted = int(min(max(SECONDS * 1e9 / max(median, 1.0), FEWEST), MOST))
        calls[name] = gather(-(-wanted // ROUNDS), comm)[0]
    times: dict[str, list[int]] = {name: [] for name in names}
    for _ in range(ROUNDS):  # a drift of the machine hits all alike
        for name in names:
            comm.barrier()
            times[name] += to_and_fro(x, *channels[name], calls[name])
    for pair in channels.values():
        for channel in pair:
            channel.close()
    if comm.rank:
        return []
    one_way = {name: np.percentile(taken, (20, 50, 80)) / 2e3 for name, taken in times.items()}
    return [
        {
            "op": "send_recv",
            "backend": name,
            "device": "cpu",
            "gpus": 0,
            "ranks": 2,
            "emulated": comm.link.name if comm.link else False,
            "dtype": options.dtype,
            "shape": {"m": count, "n": COLUMNS},
            "bytes": x.nbytes,
            **{
                f"{p}_us": round(float(us), 3)
                for p, us in zip(("p20", "p50", "p80"), one_way[name], strict=True)
            },
            "exposed": None,
            "times_faster_than_torch": (
                float(one_way["torch"][1] / one_way[name][1]) if "torch" in one_way else None
            ),
            "streamed_gb_per_s": None,
            "fraction_of_read": None,
            "iterations": len(times[name]),
            "threads_per_rank": 1,
            "transport": channels[name][0].transport,
            **provenance(),
        }
        for name in names
    ]

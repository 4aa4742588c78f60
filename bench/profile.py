"""``commfuse profile``: what a planner wants to know of this machine, measured in a minute.

GEMMs and memory, all-reduces and send/recv over sizes; on the CPU also what the layers and the
steps of ``commfuse generate`` cost beside them. Rank 0 writes a cluster file for ``commfuse plan``.
"""

from __future__ import annotations

import contextlib
import functools
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from commfuse import ops
from commfuse.bench.profile_cpu import layers_of, overheads, random_tensor, seconds
from commfuse.bench.provenance import cpu_model, provenance
from commfuse.bench.send_recv import to_and_fro
from commfuse.bench.timing import Cell, gather, measure
from commfuse.errors import BackendUnavailable
from commfuse.planner.cluster_file import write_cluster
from commfuse.runtime import launch
from commfuse.runtime.channel import Channel
from commfuse.runtime.communicator import Communicator
from commfuse.runtime.symmetric import SymmetricBuffer
from commfuse.runtime.transports import SHARED_MEMORY

# By device: bytes of messages, 1 KB to 4 MB or 64 MB; side of a square weight; rows of a GEMM that
# is bound by arithmetic.
MESSAGES = {
    "cpu": tuple(1 << exponent for exponent in range(10, 24, 2)),
    "cuda": tuple(1 << exponent for exponent in range(10, 28, 2)),
}
STREAMED_BYTES = 1 << 30  # of a GPU's memory: many times its last-level cache
SIDE = {"cpu": 2048, "cuda": 8192}
ROWS = {"cpu": 256, "cuda": 4096}
LARGE = {"hidden": 1024, "features": 4096, "heads": 16, "head_dim": 64}  # 34 MB of weights
LARGE_LAYERS, LARGE_HEAD = 6, 32000  # 267 MB in all, several times a core's caches
ROUND_TRIPS = 1000


def run_rank(device_type: str, path: Path) -> None:
    """Measures on this rank and its peers; rank 0 writes the file and says what it holds.

    Args:
        device_type: ``cpu`` or ``cuda``.
        path: of the file to write.

    Raises:
        BackendUnavailable: the GPUs cannot map each other's memory.
        CommfuseError: a call failed.
    """
    launch.join_job()
    on_gpu = device_type == "cuda"
    device = launch.use_gpu() if on_gpu else torch.device("cpu")
    if not on_gpu:
        torch.set_num_threads(1)  # a device is one core
    # What is captured on a GPU must not be made on its default stream.
    stream = torch.cuda.stream(torch.cuda.Stream()) if on_gpu else contextlib.nullcontext()
    try:
        with torch.inference_mode(), stream, Communicator(dist.group.WORLD, device=device) as comm:
            if on_gpu and not comm.serves_gpu:
                raise BackendUnavailable(f"--device cuda: {comm.transport_reason}")
            found = measure_all(comm)
            if comm.rank == 0:
                write_cluster(path, found)
                print(f"written to {path}; plan with it: commfuse plan --cluster {path} --model …")
    finally:
        dist.destroy_process_group()


def measure_all(comm: Communicator) -> dict[str, Any]:
    """The content of a cluster file, the same on every rank."""
    on_cpu = comm.device.type == "cpu"
    say = print if comm.rank == 0 else (lambda *_, **__: None)
    rates = [stream_rates(comm)]
    flops = arithmetic_rate(comm)
    sizes = MESSAGES[comm.device.type]
    reduces = {size: all_reduce_us(comm, size) for size in sizes}
    sends = {size: send_us(comm, size, reduces[sizes[0]]) for size in sizes}
    for what, times in (("all-reduce", reduces), ("send", sends)):
        ends = ", ".join(f"{times[n]:.1f} us for {n >> 10} KB" for n in (sizes[0], sizes[-1]))
        say(f"{what} {ends}", file=sys.stderr)
    measured = overheads(comm, reduces[sizes[0]]) if on_cpu else {}
    # Before and after the others: neighbours of a virtual machine take its memory for seconds.
    rates.append(stream_rates(comm))
    alone, together = (statistics.fmean(found) for found in zip(*rates, strict=True))
    say(f"memory {alone / 1e9:.1f} GB/s alone, {together / 1e9:.1f} together", file=sys.stderr)
    facts: dict[str, Any] = {
        "name": device_name(comm).lower().replace(" ", "-"),
        "bandwidth_gb_per_s": round(alone / 1e9, 2),
        "memory_gb": round(memory_bytes(comm) / 1e9, 1),
        "tflops": {"bf16": round(flops / 1e12, 3)},
        "achievable": 1.0,
    }
    calibration: dict[str, float] = {"memory": 1.0, "gemm": 1.0, **measured}
    if on_cpu:
        facts["name"] = "cpu"
        facts["title"] = f"a core of {device_name(comm)}"
        facts["host_bandwidth_gb_per_s"] = round(together * comm.world_size / 1e9, 2)
    link = {
        "latency_us": round(sends[sizes[0]], 2),
        "gb_per_s": round(sizes[-1] / sends[sizes[-1]] / 1e3, 3),
        "mapped": comm.transport == SHARED_MEMORY or comm.serves_gpu,
        "all_reduce_us": {comm.world_size: ascending(reduces)},
        "send_us": ascending(sends),
        "source": f"commfuse profile, {provenance()['date_utc'][:10]}",
    }
    return {
        "name": f"{comm.world_size}x-{facts['name']}",
        "device": facts,
        "levels": [{"name": "host", "size": comm.world_size, "link": link}],
        "calibration": {name: float(f"{value:.4g}") for name, value in calibration.items()},
        "measured": {
            name: str(provenance()[name]) for name in ("date_utc", "commfuse", "torch", "cpu_model")
        },
    }


def ascending(times: dict[int, float]) -> list[list[float]]:
    """[bytes, microseconds]; a larger message is never said to be faster than a smaller one."""
    points, least = [], 0.0
    for size in sorted(times):
        least = max(least, times[size])
        points.append([size, round(least, 2)])
    return points


def device_name(comm: Communicator) -> str:
    """As the maker calls it."""
    return torch.cuda.get_device_name(comm.device) if comm.device.type == "cuda" else cpu_model()


def memory_bytes(comm: Communicator) -> int:
    """Of one device; cores share the host's, and ranks may share a GPU."""
    if comm.device.type == "cuda":
        total = torch.cuda.get_device_properties(comm.device).total_memory
        return total // -(-comm.world_size // torch.cuda.device_count())
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // comm.world_size


def _gemms(comm: Communicator, rows: int, count: int) -> list[Callable[[], torch.Tensor]]:
    """Products of ``rows`` rows with ``count`` different square weights, each computed once."""
    kind = comm.device.type
    linear, pack = (ops.matmul, ops.pack_weight) if kind == "cpu" else (F.linear, lambda w: w)
    side = SIDE[kind]
    x = random_tensor(comm, rows, side)
    weights = [pack(random_tensor(comm, side, side)) for _ in range(count)]
    calls = [functools.partial(linear, x, weight) for weight in weights]
    for call in calls:
        call()
    return calls


def stream_rates(comm: Communicator) -> tuple[float, float]:
    """Bytes/s at which a step of one row reads weights: this rank alone, and all at once.

    On the CPU they are read as in the engine: layers by one call, which prefetches from one GEMM to
    the next, and a head, which is a GEMM of its own and reaches less.
    """
    if comm.device.type == "cuda":
        each = SIDE["cuda"] ** 2 * 2
        calls = _gemms(comm, 1, STREAMED_BYTES // each)
        rate = each / measure([Cell("stream", calls)], comm)["stream"].p50_us * 1e6
        return rate, rate  # each reads its own memory
    hidden, features = LARGE["hidden"], LARGE["features"]
    width = LARGE["heads"] * LARGE["head_dim"]
    with Communicator() as single:
        layers = layers_of(single, LARGE, LARGE_LAYERS)
        head, x = (
            ops.pack_weight(random_tensor(comm, LARGE_HEAD, hidden)),
            random_tensor(comm, 1, hidden),
        )

        def run() -> None:
            layers()
            ops.matmul(x, head)

        run()
        together = gather(seconds(run, comm), comm)
        # Meanwhile the others sleep in a socket: in a barrier they would poll, next to this core.
        alone = gather(seconds(run, None) if comm.rank == 0 else 0.0, comm)[0]
    nbytes = 2 * hidden * (LARGE_LAYERS * (4 * width + 3 * features) + LARGE_HEAD)
    return nbytes / alone, nbytes / max(together)


def arithmetic_rate(comm: Communicator) -> float:
    """Operations/s of a GEMM with many rows, all ranks at once."""
    kind = comm.device.type
    calls = _gemms(comm, ROWS[kind], 1)
    operations = 2.0 * ROWS[kind] * SIDE[kind] ** 2
    if kind == "cuda":
        return operations / measure([Cell("gemm", calls)], comm)["gemm"].p50_us * 1e6
    return operations / max(gather(seconds(calls[0], comm), comm))


def all_reduce_us(comm: Communicator, nbytes: int) -> float:
    """An all-reduce as the library chooses it, the slowest rank's median."""
    x = torch.zeros(nbytes // 2, dtype=torch.bfloat16, device=comm.device)
    ops.all_reduce(x, comm)
    cell = Cell("all_reduce", [lambda: ops.all_reduce(x, comm)])
    few = comm.device.type == "cpu" and nbytes >= 1 << 20
    return measure([cell], comm, iterations=100 if few else None)["all_reduce"].p50_us


def send_us(comm: Communicator, nbytes: int, signal_us: float) -> float:
    """One message from a rank to another.

    On the CPU half of a round trip through channels, as between the stages of a pipeline. On GPUs a
    copy into the next rank's memory, all at the same time, which takes at least a signal.

    Args:
        comm: of the ranks, two at least.
        nbytes: of the message.
        signal_us: of the smallest all-reduce: everything about it but its bytes.
    """
    if comm.device.type == "cuda":
        return max(_copy_us(comm, nbytes), signal_us)
    sizes = {"rows": 1, "columns": nbytes // 2, "dtype": torch.bfloat16}
    there, back = Channel(comm, 0, 1, **sizes), Channel(comm, 1, 0, **sizes)
    x, times = torch.zeros(1, nbytes // 2, dtype=torch.bfloat16), [0]
    comm.barrier()
    if comm.rank < 2:
        times = to_and_fro(x, there, back, ROUND_TRIPS) or times
    there.close()
    back.close()
    return gather(statistics.median(times), comm)[0] / 2e3


def _copy_us(comm: Communicator, nbytes: int) -> float:
    buffer = SymmetricBuffer(comm.group, nbytes, comm.device)
    target = buffer.of_rank((comm.rank + 1) % comm.world_size)
    x = torch.zeros(nbytes, dtype=torch.uint8, device=comm.device)
    target.copy_(x)
    found = measure([Cell("copy", [lambda: target.copy_(x)])], comm)["copy"].p50_us
    torch.cuda.synchronize()
    comm.barrier()  # nobody unmaps what a peer may still write to
    buffer.close()
    return found

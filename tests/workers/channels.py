"""On every rank: messages through channels, what goes wrong with them, and what they cost."""

import itertools
import os
import random
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from commfuse import ops
from commfuse.errors import CommfuseError
from commfuse.ops.matmul_send import reference as send_reference
from commfuse.ops.recv import reference as recv_reference
from commfuse.ops.recv_matmul import reference as recv_matmul_reference
from commfuse.runtime.channel import Channel
from commfuse.runtime.communicator import Communicator
from commfuse.runtime.link import parse_link
from commfuse.testing.numerics import complaint, digest

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ROWS = (0, 1, 2, 3, 7, 64, 65, 130)
COLUMNS = (1, 3, 17, 1031)
TRANSPORTS = ("shared memory", "torch.distributed")


def _bits(rows: int, columns: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Any bits, NaN of all kinds among them."""
    integers = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    limits = torch.iinfo(integers)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(
        limits.min, limits.max, (rows, columns), generator=generator, dtype=integers
    ).view(dtype)


def _raised(call) -> tuple[str, str, float]:
    begin = time.monotonic()
    try:
        call()
    except (CommfuseError, ValueError) as error:
        return type(error).__name__, str(error), time.monotonic() - begin
    return "", "", time.monotonic() - begin


def _finish(comm: Communicator) -> None:
    """All leave together: who leaves first would be another failure."""
    dist.barrier()
    comm.close()
    dist.barrier()


def exact() -> dict:
    """Failures of messages of odd sizes from the first rank to the last, and back."""
    failures, traffic = [], []
    with Communicator(dist.group.WORLD) as comm:
        last = comm.world_size - 1
        for transport, dtype, columns in itertools.product(TRANSPORTS, DTYPES, COLUMNS):
            if transport == "torch.distributed" and columns not in COLUMNS[2:4]:
                continue
            options = {"rows": max(ROWS), "columns": columns, "dtype": dtype, "slots": 3}
            there = Channel(comm, 0, last, transport=transport, **options)
            back = Channel(comm, last, 0, transport=transport, **options)
            for seed, rows in enumerate(ROWS):
                name = f"{transport} {dtype} [{rows}, {columns}]"
                sent = _bits(rows, columns, dtype, seed)
                comm.reset_statistics()
                if comm.rank == 0:
                    kept = sent.clone()
                    ops.send(sent, there)
                    found = ops.recv(rows, back)
                    if digest(sent) != digest(kept):
                        failures.append(f"{name}: the input has changed")
                elif comm.rank == last:
                    there.post(rows)
                    found = ops.recv(rows, there)
                    ops.send(found, back)
                else:
                    continue
                if digest(found) != digest(sent) or found.shape != sent.shape:
                    failures.append(name)
                statistics = comm.statistics()
                if (statistics.calls, statistics.bytes_sent) != (2, sent.nbytes):
                    traffic.append(f"{name}: {statistics}")
            if comm.rank == last and transport == TRANSPORTS[0]:
                with FakeTensorMode():
                    norm = torch.empty(columns, dtype=dtype)
                    fake = torch.ops.commfuse.recv(5, there.handle, norm)
                    pair = torch.ops.commfuse.recv.rms_norm(5, there.handle, norm, 1e-5)
                if any((f.shape, f.dtype) != ((5, columns), dtype) for f in (fake, *pair)):
                    failures.append(f"shape-only: {fake}, {pair}")
            norm = torch.rand(columns, generator=torch.Generator().manual_seed(7)).to(dtype)
            x = torch.randn(65, columns, generator=torch.Generator().manual_seed(8)).to(dtype)
            if comm.rank == 0:
                ops.send(x, there)
            elif comm.rank == last:
                y, found = ops.recv(65, there, norm_weight=norm, eps=1e-5)
                expected, _ = recv_reference(x, norm, 1e-5)
                plain = torch.nn.functional.rms_norm(x, norm.shape, norm, 1e-5)
                if digest(found) != digest(x) or complaint(y, plain, expected):
                    failures.append(f"{transport} {dtype} norm: {complaint(y, plain, expected)}")
            dist.barrier()
            there.close()
            back.close()
    return {"failures": failures, "traffic": traffic}


def fused() -> list[str]:
    """matmul_send and recv_matmul against float64 and, in bits, against their unfused forms."""
    failures = []
    rows = (0, 1, 5, 96, 97, 200)  # around the groups that a GEMM computes together
    with Communicator(dist.group.WORLD) as comm, Communicator() as alone:
        for transport, dtype, (k, n, after) in itertools.product(
            TRANSPORTS, DTYPES, ((33, 17, 65), (64, 1031, 31))
        ):
            sizes = {"rows": max(rows), "columns": n, "dtype": dtype, "transport": transport}
            channel = Channel(comm, 0, 1, **sizes)
            for seed, m in enumerate(rows):
                name = f"{transport} {dtype} [{m}, {k}] -> {n} -> {after}"
                generator = torch.Generator().manual_seed(seed)

                def random(*shape, generator=generator, dtype=dtype):
                    return torch.randn(shape, generator=generator).to(dtype)

                x, w, v = random(m, k), random(n, k), random(after, n)
                first, second = random(n), random(after)
                residual, norm = random(m, n), random(n)
                chosen = {"bias": first} if seed % 2 else {}
                chosen |= {"residual": residual} if seed % 3 else {}
                packed = ops.pack_weight(w)
                sent = ops.matmul_all_reduce(x, packed, alone, **chosen)
                if comm.rank == 0:
                    ops.matmul_send(x, packed, channel, **chosen)
                elif comm.rank == 1:
                    options = {"bias": second, "norm_weight": norm if seed % 2 else None}
                    y, found = ops.recv_matmul(m, channel, ops.pack_weight(v), **options)
                    # The largest error of few numbers is luck.
                    large = found.numel() >= 4096
                    problem = complaint(found, sent, send_reference(x, w, **chosen))
                    if large and transport == TRANSPORTS[1] and problem:
                        failures.append(f"{name}: sent {problem}")
                    normal = sent
                    if seed % 2 and transport == TRANSPORTS[0]:
                        normal, _ = ops.all_reduce_rms_norm(sent, None, norm, 1e-6, alone)
                    elif seed % 2:
                        normal = torch.nn.functional.rms_norm(found, norm.shape, norm, 1e-6)
                    if digest(y) != digest(ops.matmul(normal, ops.pack_weight(v), second)):
                        failures.append(f"{name}: other bits than matmul's")
                    if transport == TRANSPORTS[0] and digest(found) != digest(sent):
                        failures.append(f"{name}: other bits than matmul_all_reduce's")
                    plain = torch.nn.functional.linear(normal, v, second)
                    problem = complaint(y, plain, recv_matmul_reference(found, v, **options)[0])
                    if large and y.numel() >= 4096 and problem:
                        failures.append(f"{name}: {problem}")
            if comm.rank == 1 and transport == TRANSPORTS[0]:
                data = ops.pack_weight(v).data
                with FakeTensorMode(allow_non_fake_inputs=True):
                    fake = torch.ops.commfuse.recv_matmul(5, channel.handle, data, after)
                if [f.shape for f in fake] != [(5, after), (5, n)]:
                    failures.append(f"shape-only: {fake}")
            dist.barrier()
    return failures


def stream(messages: int, slots: int, delays: bool) -> list[str]:
    """Messages of changing sizes around a ring, with stragglers at both ends."""
    failures = []
    with Communicator(dist.group.WORLD) as comm:
        world, rank = comm.world_size, comm.rank
        options = {"rows": 40, "columns": 577, "dtype": torch.float32, "slots": slots}
        channels = [Channel(comm, r, (r + 1) % world, **options) for r in range(world)]
        pause = random.Random(rank)
        for number in range(messages):
            rows = number * 7 % 41
            if delays and pause.random() < 0.1:
                time.sleep(pause.random() * 2e-3)
            ops.send(torch.full((rows, 577), float(number * world + rank)), channels[rank])
            if delays and pause.random() < 0.1:
                time.sleep(pause.random() * 2e-3)
            source = (rank - 1) % world
            found = ops.recv(rows, channels[source])
            if not bool((found == number * world + source).all()):
                failures.append(f"message {number}")
        comm.barrier()
    return failures


def delayed() -> list[str]:
    """A sender that sleeps before every signal; the receiver sees whole blocks all the same."""
    failures = []
    with Communicator(dist.group.WORLD) as comm:
        channel = Channel(comm, 0, 1, rows=64, columns=2048, dtype=torch.float32)
        if comm.rank > 1:
            comm.barrier()
            return []
        comm._native.set_publish_delay_us(300 if comm.rank == 0 else 0)
        for number in range(5):
            if comm.rank == 0:
                ops.send(torch.full((64, 2048), float(number)), channel)
            elif not bool((ops.recv(64, channel) == number).all()):
                failures.append(f"message {number}")
        comm.barrier()
    return failures


def run(slots: int, cases: list[tuple[str, int]]) -> dict:
    """All that should go well, in one job."""

    def memory() -> tuple[int, int]:
        maps = Path("/proc/self/maps").read_text()
        return maps.count("memfd:commfuse"), len(os.listdir("/proc/self/fd"))

    stream(3, slots, False)  # what torch.distributed opens for the first use
    before = memory()
    stream(3, slots, False)
    return {
        "left behind": before != memory(),
        "exact": exact(),
        "fused": fused(),
        "ring": stream(300, slots, True),
        "delayed": delayed(),
        "links": links(cases) if dist.get_world_size() == 2 else {},
    }


def failures() -> dict:
    """By case: what is raised on this rank."""
    results = {}
    sizes = {"rows": 4, "columns": 8, "dtype": torch.float32}

    def between(transport="auto", **options):
        comm = Communicator(dist.group.WORLD, timeout=1.0)
        return comm, Channel(comm, 0, 1, transport=transport, **{**sizes, **options})

    comm, channel = between(slots=3)
    if comm.rank == 0:
        for _ in range(3):
            ops.send(torch.ones(1, 8), channel)
        results["overrun"] = _raised(lambda: ops.send(torch.ones(2, 8), channel))
        results["after"] = _raised(lambda: ops.send(torch.ones(2, 8), channel))
    else:
        time.sleep(1.5)
        results["overrun"] = _raised(lambda: ops.recv(1, channel))
    _finish(comm)

    comm, channel = between()
    if comm.rank == 1:
        results["nothing sent"] = _raised(lambda: ops.recv(3, channel))
    _finish(comm)

    comm, channel = between()
    if comm.rank == 0:
        ops.send(torch.ones(2, 8), channel)
        time.sleep(0.5)
        results["rows"] = _raised(lambda: ops.send(torch.ones(2, 8), channel))
    else:
        results["rows"] = _raised(lambda: ops.recv(3, channel))
    _finish(comm)

    comm, channel = between()
    if comm.rank == 0:
        comm.close()
    else:
        results["closed"] = _raised(lambda: ops.recv(3, channel))
    _finish(comm)

    for name, options in {
        "declared rows": {"rows": 4 + dist.get_rank()},
        "declared dtype": {"dtype": DTYPES[dist.get_rank()]},
        "declared slots": {"slots": 2 + dist.get_rank()},
    }.items():
        results[name] = _raised(lambda options=options: between(**options))

    comm, channel = between()
    end = ops.send if comm.rank == 0 else lambda x, c: ops.recv(len(x), c)
    results["too many rows"] = _raised(lambda: end(torch.ones(5, 8), channel))
    if comm.rank == 0:
        results["columns"] = _raised(lambda: ops.send(torch.ones(4, 7), channel))
        results["dtype"] = _raised(lambda: ops.send(torch.ones(4, 8).half(), channel))
        results["strided"] = _raised(lambda: ops.send(torch.ones(8, 4).T, channel))
        results["wrong end"] = _raised(lambda: ops.recv(1, channel))
    else:
        results["wrong end"] = _raised(lambda: ops.send(torch.ones(4, 8), channel))
    for name, (source, target, options) in {
        "one rank": (1, 1, {}),
        "no such rank": (0, 2, {}),
        "one slot": (0, 1, {"slots": 1}),
        "no rows": (0, 1, {"rows": 0}),
        "float64": (0, 1, {"dtype": torch.float64}),
        "transport": (0, 1, {"transport": "pigeons"}),
        "memory": (0, 1, {"rows": 1 << 40}),
        "beyond 64 bits": (0, 1, {"rows": 1 << 62}),
    }.items():
        results[name] = _raised(
            lambda s=source, t=target, o=options: Channel(comm, s, t, **{**sizes, **o})
        )
    results["still works"] = _raised(lambda: end(torch.ones(4, 8), channel))
    _finish(comm)

    comm, channel = between()
    if comm.rank == 1:
        thread = threading.Thread(target=lambda: ops.recv(1, channel))
        thread.start()
        time.sleep(0.3)
        results["two threads"] = _raised(lambda: ops.recv(1, channel))
        dist.barrier()
        thread.join()
    else:
        dist.barrier()
        ops.send(torch.ones(1, 8), channel)
    _finish(comm)

    # A deadline that passes costs gloo the connections of the whole group.
    comm = Communicator(dist.new_group(), timeout=1.0)
    channel = Channel(comm, 0, 1, transport="torch.distributed", **sizes)
    if comm.rank == 1:
        results["torch, nothing sent"] = _raised(lambda: ops.recv(3, channel))
        results["torch, after"] = _raised(lambda: ops.recv(3, channel))
    _finish(comm)
    return results


def dying(transport: str, folder: str) -> tuple[str, str, float]:
    """The first rank is killed between two messages; what the others get."""
    comm = Communicator(dist.group.WORLD)
    world = comm.world_size
    options = {"rows": 4, "columns": 8, "dtype": torch.float32, "transport": transport}
    channels = [Channel(comm, r, r + 1, **options) for r in range(world - 1)]
    if comm.rank == 0:
        ops.send(torch.ones(1, 8), channels[0])
        time.sleep(0.5)
        os.kill(os.getpid(), 9)
    incoming = channels[comm.rank - 1]

    def receive():
        for _ in range(2):
            x = ops.recv(1, incoming)
            if comm.rank < world - 1:
                ops.send(x, channels[comm.rank])

    error = _raised(receive)
    Path(folder, str(comm.rank)).touch()
    deadline = time.monotonic() + 10
    while len(os.listdir(folder)) < world - 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    comm.close()
    return error


def links(cases: list[tuple[str, int]]) -> dict:
    """By link, bytes and transport: seconds from just before a message is sent to its arrival."""
    results = {}
    for (link, nbytes), transport in itertools.product(cases, TRANSPORTS):
        times = results[link, nbytes, transport] = []
        with Communicator(dist.group.WORLD, link=parse_link(link)) as comm:
            sizes = {"rows": nbytes // 4096, "columns": 1024, "dtype": torch.float32}
            channel = Channel(comm, 0, 1, transport=transport, **sizes)
            clock = Channel(comm, 0, 1, rows=1, columns=2, dtype=torch.float32)
            x = torch.ones(sizes["rows"], 1024)
            for _ in range(9):
                dist.barrier()
                if comm.rank == 0:
                    begin = torch.tensor([[time.monotonic_ns()]])
                    ops.send(x, channel)
                    ops.send(begin.view(torch.float32), clock)
                else:
                    ops.recv(len(x), channel)
                    end = time.monotonic_ns()
                    begin = ops.recv(1, clock).view(torch.int64).item()
                    times.append((end - begin) * 1e-9)
            dist.barrier()
    return results

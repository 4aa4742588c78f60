"""On every rank, with a GPU: messages through channels, and what goes wrong with them."""

import itertools
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from commfuse import ops
from commfuse.bench.timing import gather
from commfuse.ops.matmul_send import reference as send_reference
from commfuse.ops.recv import reference as recv_reference
from commfuse.ops.recv_matmul import reference as recv_matmul_reference
from commfuse.runtime.channel import Channel
from commfuse.testing.numerics import complaint
from commfuse.testing.worker import load

GPU = load(Path(__file__).with_name("gpu.py"))
# Around the rows that the decode GEMM takes, and those that two and more GEMMs of torch's take.
FUSED_ROWS = (0, 1, 5, 16, 64, 65, 511, 512, 1100)
LATE = 2 * GPU.MILLISECOND


def ends(comm, source: int, target: int) -> bool:
    return comm.rank in (source, target)


def exact(comm, triton_dtypes) -> GPU.Found:
    """Messages of odd sizes at odd addresses, from the first rank to the last and back."""
    failures, last, rows = [], comm.world_size - 1, (0, 1, 2, 7, 64, 65, 300, 1031)
    for dtype, columns in itertools.product(GPU.DTYPES, (1, 3, 17, 1031, 8192)):
        options = {"rows": max(rows), "columns": columns, "dtype": dtype, "slots": 3}
        there, back = Channel(comm, 0, last, **options), Channel(comm, last, 0, **options)
        norm = GPU.reals(comm, (columns,), dtype, 1, 0)
        for seed, m in enumerate(rows if ends(comm, 0, last) else ()):
            # Bits of all kinds, from the second element on.
            sent = GPU.integers(comm, (m * columns + 1,), torch.int16, seed, 0, 1 << 14)
            sent = sent.repeat_interleave(dtype.itemsize // 2).view(dtype)[1:].view(m, columns)
            if comm.rank == 0:
                ops.send(sent, there)
                found = ops.recv(m, back)
            else:
                found = ops.recv(m, there)
                ops.send(found, back)
            if not GPU.same_bits(found, sent):
                failures.append(f"{dtype} [{m}, {columns}]")
        x = GPU.reals(comm, (65, columns), dtype, 2, 0)
        if comm.rank == 0:
            ops.send(x, there)
        elif comm.rank == last:
            y, found = ops.recv(65, there, norm_weight=norm, eps=GPU.EPS)
            plain = F.rms_norm(x, norm.shape, norm, GPU.EPS)
            problem = complaint(y, plain, recv_reference(x, norm, GPU.EPS)[0])
            if problem or not GPU.same_bits(found, x):
                failures.append(f"{dtype} of {columns} columns, normalised: {problem}")
        comm.check()
        comm.barrier()
        there.close()
        back.close()
    return failures


def fused(comm, triton_dtypes) -> GPU.Found:
    """matmul_send and recv_matmul against float64, and in bits against their unfused forms."""
    failures = []
    for dtype, (k, n, after) in itertools.product(GPU.DTYPES, ((40, 17, 65), (256, 1024, 520))):
        channel = Channel(comm, 0, 1, rows=max(FUSED_ROWS), columns=n, dtype=dtype)
        for seed, m in enumerate(FUSED_ROWS if ends(comm, 0, 1) else ()):
            name = f"{dtype} [{m}, {k}] -> {n} -> {after}"
            x, w, v = (
                GPU.reals(comm, shape, dtype, seed, i)
                for i, shape in enumerate(((m, k), (n, k), (after, n)))
            )
            residual, first, second, norm = (
                GPU.reals(comm, shape, dtype, seed, 3 + i)
                for i, shape in enumerate(((m, n), (n,), (after,), (n,)))
            )
            chosen = {"bias": first} if seed % 2 else {}
            chosen |= {"residual": residual} if seed % 3 else {}
            if comm.rank == 0:
                ops.matmul_send(x, w, channel, **chosen)
                continue
            options = {"bias": second, "norm_weight": norm if seed % 2 else None, "eps": GPU.EPS}
            y, found = ops.recv_matmul(m, channel, v, **options)
            sent = ops.matmul(x, w, chosen.get("bias"), backend="cuda")
            sent = sent + residual if seed % 3 else sent
            problem = complaint(found, sent, send_reference(x, w, **chosen))
            if found.numel() >= 4096 and problem:
                failures.append(f"{name}: sent {problem}")
            normal = F.rms_norm(found, norm.shape, norm, GPU.EPS) if seed % 2 else found
            problem = complaint(
                y, F.linear(normal, v, second), recv_matmul_reference(found, v, **options)[0]
            )
            if y.numel() >= 4096 and problem:
                failures.append(f"{name}: {problem}")
            if 0 < m <= 64 and dtype != torch.float32:
                if not GPU.same_bits(found, sent):
                    failures.append(f"{name}: sent other bits than matmul's")
                plain = ops.matmul(found, v, second, backend="cuda")
                if not seed % 2 and not GPU.same_bits(y, plain):
                    failures.append(f"{name}: other bits than matmul's")
        comm.check()
        comm.barrier()
        channel.close()
    return failures


def _ring(comm, exchange, messages: int) -> int:
    """How many messages around a ring are wrong, with late ranks at both ends of an exchange."""
    wrong, world = torch.zeros((), dtype=torch.int64, device=str(comm.device)), comm.world_size
    for number in range(messages):
        rows = number * 7 % 41
        late = number % 5 == 0 and number // 5 % world == comm.rank
        if late and number % 2:
            torch.cuda._sleep(LATE)
        x = torch.full((rows, 577), float(number * world + comm.rank), device=str(comm.device))
        found = exchange(x, late and number % 2 == 0)
        wrong += (found != number * world + (comm.rank - 1) % world).any()
    comm.check()
    return wrong.item()


def ring(comm, triton_dtypes) -> GPU.Found:
    """Messages of changing sizes around a ring, with late ranks; then the same without signals."""
    world, rank = comm.world_size, comm.rank
    options = {"rows": 40, "columns": 577, "dtype": torch.float32}
    channels = [Channel(comm, r, (r + 1) % world, **options) for r in range(world)]

    def signalled(x: torch.Tensor, late: bool) -> torch.Tensor:
        ops.send(x, channels[rank])
        if late:
            torch.cuda._sleep(LATE)
        return ops.recv(len(x), channels[rank - 1])

    areas = [comm.workspace(r).view(torch.float32) for r in range(world)]

    def bare(x: torch.Tensor, late: bool) -> torch.Tensor:
        areas[(rank + 1) % world][: x.numel()] = x.view(-1)
        if late:
            torch.cuda._sleep(LATE)
        return areas[rank][: x.numel()].clone().view_as(x)

    found = [f"{wrong} messages are wrong"] if (wrong := _ring(comm, signalled, 200)) else []
    if not sum(gather(_ring(comm, bare, 200), comm)):
        found.append("messages without signals pass")
    return found


def replays(comm, triton_dtypes) -> GPU.Found:
    """Graphs of three messages, by all ops, replayed among eager ones; each message is new."""
    n, found = 256, []
    options = {"rows": 512, "columns": n, "dtype": torch.bfloat16}
    channel = Channel(comm, 0, 1, **options)
    if not ends(comm, 0, 1):
        comm.barrier()
        return found
    device = str(comm.device)
    step, wrong = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))
    one = torch.eye(n, dtype=torch.bfloat16, device=device)
    shape = torch.arange(512 * n, device=device).view(512, n) % 113

    def message(rows: int) -> torch.Tensor:
        step.add_(1)  # bfloat16 holds integers up to 256
        return ((shape[:rows] + step) % 127).to(torch.bfloat16)

    def exchange(rows: int, multiplied: bool) -> None:
        x = message(rows)
        if comm.rank == 0:
            ops.matmul_send(x, one, channel) if multiplied else ops.send(x, channel)
        elif multiplied:
            for out in ops.recv_matmul(rows, channel, one):
                wrong.add_((out != x).any())
        else:
            wrong.add_((ops.recv(rows, channel) != x).any())

    def calls() -> None:
        exchange(9, False)
        exchange(16, True)
        exchange(512, True)

    calls()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        calls()
    for number in range(1000):
        if number % 100 == comm.rank * 50:
            torch.cuda._sleep(LATE)
        if number % 128 == 0:
            exchange(3, False)
        graph.replay()
    comm.check()
    if wrong.item():
        found.append(f"{wrong.item()} of 3000 messages are wrong")
    if comm.rank == 1 and step.item() != 3 * 1001 + 8:
        found.append(f"{step.item()} messages were counted")
    comm.barrier()
    return found


def beside(comm, triton_dtypes) -> GPU.Found:
    """Messages on a second stream, in each direction, while all ranks add up on the first."""
    world, rank, device = comm.world_size, comm.rank, str(comm.device)
    options = {"rows": 64, "columns": 1024, "dtype": torch.float32}
    channels = [Channel(comm, r, (r + 1) % world, **options) for r in range(world)]
    wrong = [torch.zeros((), dtype=torch.int64, device=device) for _ in range(2)]
    x = torch.ones(5000, device=device)
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    for number in range(200):
        wrong[0] += (ops.all_reduce(x, comm, "cuda") != world).any()
        with torch.cuda.stream(other):
            ops.send(
                torch.full((64, 1024), float(number * world + rank)).to(device), channels[rank]
            )
            found = ops.recv(64, channels[rank - 1])
            wrong[1] += (found != number * world + (rank - 1) % world).any()
    torch.cuda.synchronize()
    comm.check()
    return [f"{count.item()} are wrong" for count in wrong if count.item()]


CHECKS = (exact, fused, ring, replays, beside)


def results() -> dict[str, GPU.Found]:
    return GPU.run_checks(CHECKS, ())


def _later(comm, call) -> dict[str, GPU.Raised]:
    """What a call raises once it has run, and then the next one."""

    def called() -> None:
        call()
        comm.check()

    return {"first": GPU.raised(called), "second": GPU.raised(comm.check)}


def failures() -> dict[str, dict]:
    """By case: what is raised on this rank."""
    found, sizes = {}, {"rows": 4, "columns": 8, "dtype": torch.float32}

    def between(comm, source: int = 0, target: int = 1, **options) -> Channel:
        return Channel(comm, source, target, **{**sizes, **options})

    with torch.inference_mode():
        with GPU.communicator(timeout=1.0) as comm:
            x, channel = torch.ones(2, 8, device=str(comm.device)), between(comm, slots=3)
            if comm.rank == 0:
                for _ in range(3):
                    ops.send(x[:1], channel)
                comm.check()
                found["overrun"] = _later(comm, lambda: ops.send(x, channel))
            else:
                time.sleep(2.5)
                found["overrun"] = _later(comm, comm.check)
        with GPU.communicator(timeout=1.0) as comm:
            channel = between(comm)
            if comm.rank == 1:
                found["nothing sent"] = _later(comm, lambda: ops.recv(3, channel))
            else:
                time.sleep(2.5)
                found["nothing sent"] = _later(comm, comm.check)
        with GPU.communicator() as comm:
            channel = between(comm)
            if comm.rank == 0:
                ops.send(x, channel)
                time.sleep(1.0)
                found["rows"] = _later(comm, comm.check)
            elif comm.rank == 1:
                found["rows"] = _later(comm, lambda: ops.recv(3, channel))
            else:
                time.sleep(1.0)
                found["rows"] = _later(comm, comm.check)
        with GPU.communicator() as comm:
            last = comm.world_size - 1
            for name, options in {
                "declared rows": {"rows": 4 + (comm.rank == last)},
                "declared slots": {"slots": 2 + (comm.rank == last)},
            }.items():
                found[name] = {"first": GPU.raised(lambda o=options: between(comm, **o))}
            channel = between(comm)
            found["wrong end"] = {"first": GPU.raised(lambda: _wrong(comm, x, channel))}
            if comm.rank == 0:
                ops.send(x, channel)
            elif comm.rank == 1:
                found["alive"] = GPU.same_bits(ops.recv(2, channel), x)
            comm.check()
    return found


def _wrong(comm, x: torch.Tensor, channel: Channel) -> None:
    """From an end, the op of the other one."""
    try:
        ops.recv(2, channel) if comm.rank == 0 else ops.send(x, channel)
    except ValueError as error:
        raise GPU.CommfuseError(str(error)) from None

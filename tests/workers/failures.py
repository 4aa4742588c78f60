"""On every rank: calls that must fail, what they raise, and how soon."""

import os
import resource
import socket
import subprocess
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from commfuse import ops
from commfuse.errors import CommfuseError
from commfuse.runtime.communicator import Communicator

Raised = tuple[str, str, float]  # class, message, seconds


def raised(call) -> Raised:
    """What a call raises, and after how many seconds."""
    begin = time.monotonic()
    try:
        call()
    except CommfuseError as error:
        return type(error).__name__, str(error), time.monotonic() - begin
    return "", "", time.monotonic() - begin


@contextmanager
def communicator(**options):
    """A communicator that all ranks leave together, so that no failure spoils the next."""
    comm = Communicator(dist.group.WORLD, **options)
    try:
        yield comm
    finally:
        dist.barrier()
        comm.close()
        dist.barrier()


def _twice(comm, call) -> dict[str, Raised]:
    """A call that fails, another one, check() and a barrier after it."""
    return {
        "first": raised(call),
        "second": raised(lambda: ops.all_reduce(torch.ones(2), comm)),
        "check": raised(comm.check),
        "barrier": raised(comm.barrier),
    }


def mismatches() -> dict[str, dict[str, Raised]]:
    """Pairs of calls that do not belong together; the last rank makes the other one."""
    results = {}
    one, six, w = torch.ones(2, 4), torch.ones(6, 4), ops.pack_weight(torch.ones(4, 4))
    pairs = {
        "shapes": (lambda c: ops.all_reduce(one, c), lambda c: ops.all_reduce(one.T, c)),
        "sizes": (lambda c: ops.all_reduce(one, c), lambda c: ops.all_reduce(one.new_ones(0), c)),
        "dtypes": (lambda c: ops.all_reduce(one, c), lambda c: ops.all_reduce(one.half(), c)),
        "ops": (
            lambda c: ops.all_reduce_rms_norm(one, None, one[0], 1e-5, c),
            lambda c: ops.matmul_all_reduce(one, w, c),
        ),
        "options": (
            lambda c: ops.matmul_all_reduce(one, w, c),
            lambda c: ops.matmul_all_reduce(one, w, c, residual=one),
        ),
        "parts": (lambda c: ops.all_gather(one, c), lambda c: ops.all_gather(one[:1], c)),
        "directions": (lambda c: ops.all_gather(six, c), lambda c: ops.reduce_scatter(six, c)),
        "barrier": (lambda c: ops.all_reduce(one, c), lambda c: c.barrier()),
        "messages": (lambda c: c.hand_over(512), lambda c: c.hand_over(64)),
        # Different numbers of slices and calls; two-shot against one-shot.
        "large": (
            lambda c: ops.all_reduce(torch.ones(3_000_000), c),
            lambda c: ops.all_reduce(torch.ones(5), c),
        ),
    }
    pairs["shapes"] = (pairs["shapes"][0], lambda c: ops.all_reduce(one.T.contiguous(), c))
    for name, (ours, other) in pairs.items():
        with communicator() as comm:
            ops.all_reduce(one, comm)
            call = other if comm.rank == comm.world_size - 1 else ours
            results[name] = _twice(comm, lambda comm=comm, call=call: call(comm))
    return results


def absence() -> dict[str, dict[str, Raised]]:
    """The last rank does not call, leaves in order, or works on after it has closed."""
    results = {}
    with communicator(timeout=1.0) as comm:
        ops.all_reduce(torch.ones(3), comm)
        if comm.rank == comm.world_size - 1:
            time.sleep(2.5)
        results["never calls"] = _twice(comm, lambda: ops.all_reduce(torch.ones(3, 5), comm))
    with communicator() as comm:
        ops.all_reduce(torch.ones(3), comm)
        if comm.rank == comm.world_size - 1:
            comm.close()
        results["closes"] = _twice(comm, lambda: ops.all_reduce(torch.ones(3), comm))
    with communicator() as comm:
        if comm.rank == comm.world_size - 1:
            time.sleep(0.5)
            comm.close()
        results["closes while others wait"] = _twice(
            comm, lambda: ops.all_reduce(torch.ones(3), comm)
        )
    with communicator(transport="torch.distributed") as comm:
        comm.close()
        results["torch, closed"] = _twice(
            comm, lambda: ops.all_reduce(torch.ones(3), comm, "torch")
        )
    return results


def run() -> dict[str, dict]:
    """Both in one job."""
    return {"mismatches": mismatches(), "absence": absence()}


def second_thread() -> tuple[Raised, list[float], list[float]]:
    """A call from another thread while one is waiting; then both threads' results."""
    with communicator() as comm:
        if comm.rank == 1:
            time.sleep(1.0)
            first = ops.all_reduce(torch.ones(2), comm)
            return ("", "", 0.0), first.tolist(), ops.all_reduce(torch.ones(2), comm).tolist()
        first: list[float] = []
        thread = threading.Thread(
            target=lambda: first.extend(ops.all_reduce(torch.ones(2), comm).tolist())
        )
        thread.start()
        time.sleep(0.3)
        error = raised(lambda: ops.all_reduce(torch.ones(2), comm))
        thread.join()
        return error, first, ops.all_reduce(torch.ones(2), comm).tolist()


def refusals() -> dict[str, Raised]:
    """Communicators and backends that cannot be had."""
    results = {}
    world = dist.group.WORLD
    for name, options in {
        "payload": {"payload_bytes": 1 << 44},
        "workspace": {"workspace_bytes": 1 << 44},
        "beyond 64 bits": {"payload_bytes": 1 << 63},
        "no payload": {"payload_bytes": 0},
        "transport": {"transport": "pigeons"},
    }.items():
        results[name] = raised(lambda options=options: Communicator(world, **options))

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == 0:  # the rank that reserves the memory
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    results["file size limit"] = raised(lambda: Communicator(world))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    mesh = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("pp", "tp"))
    results["two dimensions"] = raised(lambda: Communicator(mesh))
    x, w = torch.ones(2, 2), torch.ones(2, 2)
    with communicator() as comm:
        results["float64"] = raised(lambda: ops.all_reduce(x.double(), comm, "cpu"))
        results["unpacked"] = raised(lambda: ops.matmul_all_reduce(x, w, comm, backend="cpu"))
        results["unknown"] = raised(lambda: ops.all_reduce(x, comm, "nccl"))
        results["triton"] = raised(lambda: ops.all_reduce(x, comm, "triton"))
        results["hand over"] = raised(lambda: comm.hand_over(comm.payload_bytes + 1))
    with communicator(transport="torch.distributed") as comm:
        results["no shared memory"] = raised(lambda: ops.all_reduce(x, comm, "cpu"))
        results["handle"] = raised(lambda: comm.handle)
        results["workspace of torch"] = raised(lambda: comm.workspace(0))
        results["hand over of torch"] = raised(lambda: comm.hand_over(1))
        results["auto over torch"] = ("", str(ops.all_reduce(x, comm).tolist()), 0.0)
    return results


def _listening_sockets() -> list[str]:
    """This process's listening sockets: Unix ones, by their flag, and TCP ones in state LISTEN."""
    mine = set()
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            target = os.readlink(entry)
            if target.startswith("socket:["):
                mine.add(target[8:-1])
    found = []
    for line in Path("/proc/self/net/unix").read_text().splitlines()[1:]:
        fields = line.split()
        if int(fields[3], 16) & 0x10000 and fields[6] in mine:
            found.append(line)
    for table in ("tcp", "tcp6"):
        with suppress(FileNotFoundError):
            for line in Path("/proc/self/net", table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and fields[9] in mine:
                    found.append(line)
    return found


def footprint() -> dict:
    """What a communicator adds to this process, while it lives and after it."""

    def state():
        descriptors = len(os.listdir("/proc/self/fd"))
        maps = Path("/proc/self/maps").read_text()
        return (
            descriptors,
            maps.count("memfd:commfuse"),
            "/dev/shm" in maps,
            threading.active_count(),
        )

    def tasks():
        return len(os.listdir("/proc/self/task"))

    with communicator():
        pass
    listening, before, tasks_before = _listening_sockets(), state(), tasks()
    with communicator() as comm:
        ops.all_reduce(torch.ones(3), comm)
        during = state()
        added = [line for line in _listening_sockets() if line not in listening]
    del comm
    return {
        "before": before,
        "during": during,
        "after": state(),
        "listening": added,
        "threads": tasks() - tasks_before,
        "host": socket.gethostname(),
    }


def dying(victim: int, in_call: bool, folder: str) -> tuple[Raised, Raised]:
    """A rank is killed; what the others' next calls raise, and check() after it."""
    comm = Communicator(dist.group.WORLD)
    x = torch.ones(3, 5)
    ops.all_reduce(x, comm)
    if comm.rank == victim:
        if in_call:
            # It sleeps between writing its payload and its signal.
            comm._native.set_publish_delay_us(60_000_000)
            subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -9 {os.getpid()}"])
            ops.all_reduce(x, comm)
        os.kill(os.getpid(), 9)
    if not in_call:
        time.sleep(1.0)
    error = raised(lambda: [ops.all_reduce(x, comm) for _ in range(2)])
    again = raised(comm.check)
    comm.close()
    # Nobody ends before all have noticed: the first that ends would be noticed as well.
    Path(folder, str(comm.rank)).touch()
    deadline = time.monotonic() + 10
    while len(os.listdir(folder)) < comm.world_size - 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    return error, again

"""On every rank: sums over ranks of several hosts, declared or real, and how they fail."""

import json
import os
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist

from commfuse import ops
from commfuse.errors import CommfuseError
from commfuse.runtime.communicator import Communicator
from commfuse.runtime.link import parse_link
from commfuse.testing.numerics import complaint, digest

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = ((0,), (1,), (5,), (3, 17), (64, 33), (5001,), (70001,))
SMALL_PAYLOAD = 4096


def communicator(group, hosts: list[int] | None, **options) -> Communicator:
    """Of the group's ranks, each on the host that the list names for it; None: on its real one."""
    host = None if hosts is None else str(hosts[dist.get_rank(group)])
    return Communicator(group, host=host, **options)


def _integers(shape, dtype, seed, rank):
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    return torch.randint(-9, 10, shape, generator=generator).to(dtype)


def _reals(shape, dtype, seed, rank):
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    scale = torch.exp2(torch.randint(-6, 7, shape, generator=generator).float())
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


def _sum_of_hosts(parts: list[torch.Tensor], hosts: list[list[int]]) -> torch.Tensor:
    """float32 sums in the order of ranks, rounded; then of these in the order of hosts, rounded."""

    def total(addends: list[torch.Tensor]) -> torch.Tensor:
        found = addends[0].float()
        for addend in addends[1:]:
            found = found + addend.float()
        return found.to(addends[0].dtype)

    return total([total([parts[rank] for rank in host]) for host in hosts])


def sums(group, hosts: list[int] | None) -> dict:
    """All checks: what is wrong, digests that ranks must share, and what is said of it."""
    wrong: list[str] = []
    digests: dict[str, str] = {}
    for payload in (SMALL_PAYLOAD, None):
        options = {"payload_bytes": payload} if payload else {}
        with communicator(group, hosts, **options) as comm:
            for dtype in DTYPES:
                for seed, shape in enumerate(SHAPES):
                    _check_sum(comm, shape, dtype, seed, wrong, digests)
                _check_fused(comm, dtype, wrong, digests)
            comm.barrier()
    with communicator(group, hosts) as comm:
        comm.reset_statistics()
        ops.all_reduce(torch.ones(840), comm)
        statistics = comm.statistics()
        world = range(comm.world_size)
        return {
            "wrong": wrong,
            "digests": digests,
            "transport": comm.transport,
            "reason": comm.transport_reason,
            "hosts": comm.hosts,
            "pairs": [[comm.transport_between(a, b) for b in world] for a in world],
            "backends": {name: ops.explain(name, comm).backend for name in ops.OP_NAMES},
            "why": ops.explain("all_reduce", comm).reasons,
            "calls": statistics.calls,
            "bytes": statistics.bytes_sent,
        }


def _check_sum(comm, shape, dtype, seed, wrong, digests):
    name = f"{dtype} {list(shape)}"
    parts = [_integers(shape, dtype, seed, rank) for rank in range(comm.world_size)]
    exact = torch.stack([part.to(torch.int64) for part in parts]).sum(0)
    for backend in ("auto", "torch"):
        mine = parts[comm.rank].clone()
        out = ops.all_reduce(mine, comm, backend)
        if out.dtype != dtype or not torch.equal(out.to(torch.int64), exact):
            wrong.append(f"{backend}: {name}")
        if not torch.equal(mine, parts[comm.rank]):
            wrong.append(f"{backend}: {name} has changed its input")
        if ops.all_reduce_(mine, comm, backend) is not mine or not torch.equal(mine, out):
            wrong.append(f"{backend}: {name} in place")
    parts = [_reals(shape, dtype, seed, rank) for rank in range(comm.world_size)]
    for attempt in range(2):
        out = ops.all_reduce(parts[comm.rank], comm)
        digests[f"{name} {attempt}"] = digest(out)
        if digest(out) != digest(_sum_of_hosts(parts, comm.hosts)):
            wrong.append(f"{name}: not the sum of the hosts' sums")
    gathered = ops.all_gather(parts[comm.rank], comm)
    if digest(gathered) != digest(torch.cat(parts)):
        wrong.append(f"{name}: all_gather")


def _check_fused(comm, dtype, wrong, digests):
    """What ends in a sum over ranks."""
    world, eps, rows, n, k = comm.world_size, 1e-5, 6 * comm.world_size, 48, 32
    parts = [_reals((rows, n), dtype, 40, rank) for rank in range(world)]
    own = rows // world
    part = ops.reduce_scatter(parts[comm.rank], comm)
    whole = _sum_of_hosts(parts, comm.hosts)
    if digest(part) != digest(whole[comm.rank * own : (comm.rank + 1) * own]):
        wrong.append(f"{dtype}: reduce_scatter")

    residual, weight = _reals((rows, n), dtype, 41, 0), _reals((n,), dtype, 42, 0)
    y, total = ops.all_reduce_rms_norm(parts[comm.rank], residual, weight, eps, comm)
    plain = torch.nn.functional.rms_norm(whole + residual, (n,), weight, eps)
    if digest(y, total) != digest(plain, whole + residual):
        wrong.append(f"{dtype}: all_reduce_rms_norm")

    xs = [_reals((rows, k), dtype, 43, rank) for rank in range(world)]
    ws = [_reals((n, k), dtype, 44, rank) for rank in range(world)]
    products = [x @ w.T for x, w in zip(xs, ws, strict=True)]
    exact = sum(x.double() @ w.double().T for x, w in zip(xs, ws, strict=True))
    out = ops.matmul_all_reduce(
        xs[comm.rank], ops.pack_weight(ws[comm.rank]), comm, residual=residual
    )
    problem = complaint(
        out, _sum_of_hosts(products, comm.hosts) + residual, exact + residual.double()
    )
    if problem:
        wrong.append(f"{dtype}: matmul_all_reduce: {problem}")
    digests[f"{dtype} fused"] = digest(out, y, total)

    table = _integers((8 * world, n), dtype, 45, 0)
    shard = table[8 * comm.rank : 8 * comm.rank + 8]
    tokens = torch.randint(0, 8 * world, (7,), generator=torch.Generator().manual_seed(1))
    embedded = ops.vocab_parallel_embedding(tokens, shard, 8 * comm.rank, comm)
    if not torch.equal(embedded, table[tokens]):
        wrong.append(f"{dtype}: vocab_parallel_embedding")
    logits = torch.arange(8.0 * world)[None, 8 * comm.rank : 8 * comm.rank + 8].contiguous()
    if ops.vocab_parallel_argmax(logits, 8 * comm.rank, comm).tolist() != [8 * world - 1]:
        wrong.append(f"{dtype}: vocab_parallel_argmax")


def links(group, hosts: list[int]) -> dict[str, list[float] | bool]:
    """Seconds of sums over emulated links: between hosts, and within them."""
    found = {}
    for name, options in {
        "across": {"link": parse_link("3000:1")},
        "inside": {"link_inside": parse_link("3000:1")},
    }.items():
        with communicator(group, hosts, **options) as comm:
            found[name] = []
            for _ in range(3):
                comm.barrier()
                begin = time.perf_counter()
                ops.all_reduce(torch.ones(64), comm)
                found[name].append(time.perf_counter() - begin)
            found[f"{name} emulated"] = comm.emulated
    return found


def raised(call) -> tuple[str, str, float]:
    """What a call raises, and after how many seconds."""
    begin = time.monotonic()
    try:
        call()
    except CommfuseError as error:
        return type(error).__name__, str(error), time.monotonic() - begin
    return "", "", time.monotonic() - begin


def failures(group, hosts: list[int]) -> dict[str, tuple]:
    """The last rank does something else than the others; what each of them raises, three times."""
    found = {}
    x = torch.ones(6)
    for name, usual, other in (
        ("shapes", lambda c: ops.all_reduce(x, c), lambda c: ops.all_reduce(torch.ones(8, 6), c)),
        ("dtypes", lambda c: ops.all_reduce(x, c), lambda c: ops.all_reduce(x.half(), c)),
        ("late", lambda c: ops.all_reduce(x, c), lambda c: dist.barrier(group)),
        ("closes", lambda c: ops.all_reduce(x, c), lambda c: c.close()),
    ):
        name_of_ranks = "testers" if name == "late" else None
        comm = communicator(group, hosts, timeout=0.5, name=name_of_ranks)
        ops.all_reduce(torch.ones(3), comm)
        last = comm.rank == comm.world_size - 1
        call = other if last else usual
        found[name] = (
            raised(lambda comm=comm, call=call: call(comm)),
            raised(lambda comm=comm: ops.all_reduce(x, comm)),
            raised(comm.check),
        )
        if not (last and name == "late"):  # which has been there already
            dist.barrier(group)
        comm.close()
    return found


def padded(group, hosts: list[int]) -> list[tuple[str, str, float]]:
    """Shapes that differ within hosts alone, and are cut into as many parts of as many elements."""
    found = []
    for shapes in ((5, 6), ((4, 2), (2, 4))):
        with communicator(group, hosts) as comm:
            x = torch.ones(shapes[comm.rank % 2])
            found.append(raised(lambda x=x, comm=comm: ops.all_reduce(x, comm)))
            dist.barrier(group)
    return found


def until(true) -> None:
    """Polls for it; what follows finds out when it never comes."""
    deadline = time.monotonic() + 30
    while not true() and time.monotonic() < deadline:
        time.sleep(0.01)


def held_up(group, hosts: list[int]) -> dict[str, list[tuple[str, str, float]]]:
    """Rank 3 gets stuck; rank 0, the first to lose patience, waits for one who waits for rank 3."""
    found = {}
    for name in ("across", "within"):
        with communicator(group, hosts, timeout=0.5 if dist.get_rank(group) == 0 else 60) as comm:
            hierarchy, sum_across = comm.hierarchy, comm.hierarchy.sum_across
            has_failed = lambda place=hierarchy: place._store.check(["failure"])  # noqa: E731

            def stuck(mine, what, has_failed=has_failed, sum_across=sum_across):
                until(has_failed)
                return sum_across(mine, what)

            def hurried(mine, what, waits=hierarchy._waits, sum_across=sum_across):
                sent = sum_across(mine, what)
                until(lambda: waits.of(1) == 3)  # across, while rank 0 waits for it within
                return sent

            if comm.rank == 3 and name == "across":
                hierarchy.sum_across = stuck
            elif comm.rank == 3:
                until(has_failed)
            elif comm.rank == 0 and name == "across":
                hierarchy.sum_across = hurried
            elif comm.rank == 0:
                until(lambda waits=hierarchy._waits: waits.of(2) == 3)  # within, and rank 0 across
            x = torch.ones(6)
            found[name] = [raised(lambda comm=comm, x=x: ops.all_reduce(x, comm)) for _ in range(2)]
            dist.barrier(group)
    return found


def second_thread(group, hosts: list[int]) -> tuple[tuple[str, str, float], list[float]]:
    """A call on rank 0 while another thread's is waiting across hosts; what both calls give."""
    sums: list[float] = []
    error = ("", "", 0.0)
    with communicator(group, hosts) as comm:
        hierarchy = comm.hierarchy

        def call() -> None:
            sums.extend(ops.all_reduce(torch.ones(2), comm).tolist())

        if comm.rank == 0:
            first = threading.Thread(target=call)
            first.start()
            until(lambda: hierarchy._across is not None)
            error = raised(call)
            hierarchy._store.set("go", "")
            first.join()
        else:
            if comm.rank == 2:
                until(lambda: hierarchy._store.check(["go"]))
            call()
        call()
    return error, sums


def refusals(group) -> dict[str, tuple[str, str, float]]:
    """Hierarchies that cannot be had, for two ranks."""
    host = str(dist.get_rank(group))

    def make(**options):
        return raised(lambda: Communicator(group, **options).close())

    return {
        "one host": make(transport="hierarchical"),
        "two hosts": make(transport="hierarchical", host=host),
        "shared": make(transport="shared memory", host=host),
    }


def dying(group, hosts: list[int] | None, victim: int, folder: str) -> tuple[str, str, float]:
    """A rank is killed between two calls of the others."""
    comm = communicator(group, hosts)
    x = torch.ones(300)
    ops.all_reduce(x, comm)
    if comm.rank == victim:
        Path(folder, str(comm.rank)).touch()
        os.kill(os.getpid(), 9)
    error = raised(lambda: [ops.all_reduce(x, comm) for _ in range(2)])
    comm.close()
    # Nobody ends before all have noticed: the first that ends would be noticed as well.
    Path(folder, str(comm.rank)).touch()
    deadline = time.monotonic() + 20
    while len(os.listdir(folder)) < comm.world_size and time.monotonic() < deadline:
        time.sleep(0.01)
    return error


def everything(even: list[int], uneven: list[int], victim: int, folder: str) -> dict:
    """All of it in one job of four ranks; what all of them have found, on each that survives."""
    world, rank = dist.group.WORLD, dist.get_rank()
    three, two = dist.new_group([0, 1, 2]), dist.new_group([0, 1])
    mine = {"even": sums(world, even), "even failures": failures(world, even)}
    mine |= {"padded": padded(world, even), "held up": held_up(world, even)}
    mine["second thread"] = second_thread(world, even)
    if rank < 3:
        mine["uneven"] = sums(three, uneven)
        mine["uneven failures"] = failures(three, uneven)
        mine["links"] = links(three, [0, 1, 0])
    if rank < 2:
        mine["refusals"] = refusals(two)
    every = [None] * 4
    dist.all_gather_object(every, mine)
    return {"every": every, "killed": dying(world, even, victim, folder)}


def many_hosts(hosts: list[int]) -> dict:
    """Sums alone, on the ranks of a job."""
    return sums(dist.group.WORLD, hosts)


def main(folder: str) -> None:
    """A program for torchrun on two hosts: sums over real ones, then the last rank dies."""
    from commfuse.runtime.launch import join_job

    torch.set_num_threads(1)
    join_job()
    result = sums(dist.group.WORLD, None)
    deaths = Path(folder, "deaths")
    deaths.mkdir(exist_ok=True)

    def leave() -> None:
        unfinished = Path(folder, f"{dist.get_rank()}.part")
        unfinished.write_text(json.dumps(result))
        unfinished.rename(unfinished.with_suffix(".json"))

    if dist.get_rank() >= 2:  # its own torchrun ends rank 2 when rank 3 is gone
        leave()
        Path(deaths, "2").touch()
    result["killed"] = dying(dist.group.WORLD, None, 3, str(deaths))
    if dist.get_rank() < 2:
        leave()
    os._exit(0)  # the other host's rank is gone: no process group to leave


if __name__ == "__main__":
    main(sys.argv[1])

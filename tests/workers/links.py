"""On every rank: emulated links hold messages back, and several communicators in one process."""

import time

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from commfuse import ops
from commfuse.runtime.communicator import Communicator
from commfuse.runtime.link import parse_link


def _seconds(comm, call, repeats: int = 5) -> tuple[list[float], object]:
    """The duration of each of some calls that all ranks begin together, and the last result."""
    times, out = [], None
    for _ in range(repeats):
        dist.barrier()
        begin = time.perf_counter()
        out = call()
        times.append(time.perf_counter() - begin)
    return times, out


def links() -> dict:
    """By link: emulated, durations and result of all_reduce, statistics."""
    results = {}
    small, large = torch.ones(16), torch.ones(25_000)  # 100 kB
    for name, x, backend in (
        (None, small, "cpu"),
        ("2000:1", small, "cpu"),
        ("0:0.01", large, "cpu"),
        ("2000:1", small, "torch"),
        ("0:0.01", large, "torch"),
    ):
        link = parse_link(name) if name else None
        with Communicator(dist.group.WORLD, link=link) as comm:
            comm.reset_statistics()
            # Without a link one call at least must find no other process in its way.
            repeats = 5 if link else 200
            times, out = _seconds(
                comm, lambda x=x, c=comm, b=backend: ops.all_reduce(x, c, b), repeats
            )
            statistics = comm.statistics()
            results[f"{name} {backend}"] = {
                "emulated": comm.emulated,
                "times": times,
                "right": torch.equal(out, x * comm.world_size),
                "calls": statistics.calls,
                "bytes": statistics.bytes_sent,
                "communication": statistics.communication_seconds,
                "text": repr(comm),
            }
    with Communicator(dist.group.WORLD, link=parse_link("2000:1")) as comm:
        x, w = torch.ones(1, 64), ops.pack_weight(torch.ones(512, 64))
        times, out = _seconds(comm, lambda: ops.matmul_all_reduce(x, w, comm))
        results["fused"] = {"times": times, "right": bool((out == 64 * comm.world_size).all())}
        times, _ = _seconds(comm, lambda: comm.hand_over(64))
        results["hand over"] = {"times": times, "right": True}
        logits = torch.arange(8.0)[None]
        times, out = _seconds(comm, lambda: ops.vocab_parallel_argmax(logits, 8 * comm.rank, comm))
        results["argmax"] = {"times": times, "right": out.tolist() == [7]}
    return results


def composed(tp: int) -> list[str]:
    """W x W ranks: rows and columns of a mesh and the whole world, used in turns; the failures."""
    failures = []
    mesh = init_device_mesh("cpu", (tp, tp), mesh_dim_names=("pp", "tp"))
    rank, row, column = dist.get_rank(), *mesh.get_coordinate()
    with (
        Communicator(mesh["tp"]) as in_row,
        Communicator(mesh["pp"], payload_bytes=4096) as in_column,
        Communicator(dist.group.WORLD) as world,
        Communicator(dist.group.WORLD) as other,
    ):
        if (in_row.rank, in_column.rank, world.rank) != (column, row, rank):
            failures.append(f"ranks {in_row.rank}, {in_column.rank} of {rank}")
        handles = {comm.handle for comm in (in_row, in_column, world, other)}
        if len(handles) != 4:
            failures.append(f"handles {handles}")
        everybody = torch.arange(float(tp * tp)).view(tp, tp)
        for call in range(20):
            for name, comm, members in (
                ("row", in_row, everybody[row]),
                ("column", in_column, everybody[:, column]),
                ("world", world, everybody),
                ("other", other, everybody),
            ):
                x = torch.full((1 + 40 * call,), float(rank + call))
                out = ops.all_reduce(x, comm)
                if not (out == members.sum() + call * members.numel()).all():
                    failures.append(f"call {call}: {name}")
        in_row.close()  # one failure or end does not touch the others
        if ops.all_reduce(torch.ones(3), world).tolist() != [tp * tp] * 3:
            failures.append("world after the row has closed")
    return failures

"""On every rank: the benchmark runner on small cases, and with results that are wrong."""

import torch
import torch.distributed as dist

from commfuse.bench import runner
from commfuse.bench.selection import Options
from commfuse.errors import CommfuseError
from commfuse.runtime.communicator import Communicator
from commfuse.runtime.link import parse_link
from commfuse.testing.adapters import AllReduce
from commfuse.testing.cases import Case

GEMM = Case("matmul_all_reduce", (("m", 1), ("k", 64), ("n", 96)))
# So slow that what it costs stands out on any machine, however busy: `exposed` is a number then.
SLOW = parse_link("20000:10")
SUM = Case("all_reduce", (("m", 2), ("n", 33)))


def _options(case: Case, *backends: str) -> Options:
    return Options(case.op, dist.get_world_size(), backends, iterations=10)


def everything() -> tuple[list[dict], str, str]:
    """Rows of a small matmul_all_reduce; complaints about wrong and about differing results."""
    with torch.inference_mode(), Communicator(dist.group.WORLD, link=SLOW) as comm:
        return _rows(comm), _complaint(comm, 1.0), _complaint(comm, 2.0**-10)


def _rows(comm: Communicator) -> list[dict]:
    runner.ROTATED_BYTES, runner.READ_BYTES, runner.READ_SLICE = 1 << 16, 1 << 20, 1 << 18
    runner.last_level_cache_bytes = lambda: 0
    return runner.measure_case(GEMM, _options(GEMM, "cpu", "torch"), comm)


def _complaint(comm: Communicator, error: float) -> str:
    """What the runner says where all_reduce is wrong by ``error`` on rank 1."""
    right = AllReduce.call

    def wrong(self, inputs, comm, backend):
        (y,) = right(self, inputs, comm, backend)
        return (y + error if comm.rank == 1 and backend == "cpu" else y,)

    AllReduce.call = wrong
    try:
        runner.measure_case(SUM, _options(SUM, "cpu", "torch"), comm)
    except CommfuseError as problem:
        return str(problem)
    finally:
        AllReduce.call = right
    return ""

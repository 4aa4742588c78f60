"""On every rank, with a GPU: what the checks of the other files have in common. A check returns
what it has found wrong; each has a communicator of its own.
"""

import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager

import torch
import torch.distributed as dist

from commfuse import ops
from commfuse.bench.timing import gather
from commfuse.errors import CommfuseError
from commfuse.runtime import launch
from commfuse.runtime.communicator import Communicator

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Rows for which matmul_all_reduce sends tiles while it computes: set here, not by the GPU's table.
FUSED, UNFUSED = (1, 64), (1, 0)
CLAIMED = (0, 20, 40)  # likewise, per cent of the tiles of its GEMM
EPS = 1e-5
MILLISECOND = 1_800_000  # cycles of an H100
OPS = torch.ops.commfuse
Raised = tuple[str, str, float]  # class, message, seconds
Found = list[str]


@contextmanager
def communicator(**options):
    """A communicator that all ranks leave together, so that no failure spoils the next."""
    comm = Communicator(dist.group.WORLD, device=launch.use_gpu(), **options)
    try:
        yield comm
    finally:
        dist.barrier()
        comm.close()
        dist.barrier()


def generator_of(comm, *seeds: int) -> torch.Generator:
    seed = 0
    for part in seeds:
        seed = 1009 * seed + part
    return torch.Generator(str(comm.device)).manual_seed(seed)


def integers(comm, shape, dtype, seed: int, rank: int, bound: int = 8) -> torch.Tensor:
    """Small ones of a rank, which every rank can make."""
    source = {"generator": generator_of(comm, seed, rank), "device": str(comm.device)}
    return torch.randint(-bound, bound + 1, shape, **source).to(dtype)


def reals(comm, shape, dtype, seed: int, rank: int) -> torch.Tensor:
    """Of very different magnitudes, so that the order of additions shows."""
    source = {"generator": generator_of(comm, seed, rank), "device": str(comm.device)}
    scale = torch.exp2(torch.randint(-6, 7, shape, **source).float())
    return (torch.randn(shape, **source) * scale).to(dtype)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def sum_in_rank_order(parts: list[torch.Tensor]) -> torch.Tensor:
    """float32 sums, added in rank order, not yet rounded to the parts' dtype."""
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total


def differing(digests: dict[str, str], comm) -> Found:
    """The labels of results whose bits are not the same on all ranks."""
    everywhere = gather(digests, comm)
    return [
        f"{label}: the ranks' bits differ"
        for label in digests
        if len({rank[label] for rank in everywhere}) > 1
    ]


def tuple_of(out) -> tuple[torch.Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


def backends_of(op: str, dtype: torch.dtype, triton_dtypes) -> list[str]:
    """Our backends of an op. Triton compiles a kernel for a second or two, and another one for
    every dtype, set of options and kind of size: it has fewer dtypes, and a part of the cases.
    """
    known = {backend.name for backend in ops.op(op).backends}
    names = ["auto", *(name for name in ("cuda", "triton") if name in known)]
    return names if dtype in triton_dtypes else [name for name in names if name != "triton"]


def in_turn(comm, number: int, period: int) -> set[torch.dtype]:
    """Triton's dtypes for one of many cases: of every ``period``-th, on few ranks; else none."""
    return {torch.bfloat16} if number % period == 0 and comm.world_size <= 3 else set()


def captured(calls: list[Callable], expected: list, wrong: torch.Tensor) -> torch.cuda.CUDAGraph:
    """A graph that makes calls and counts in ``wrong`` how many results have unexpected bits."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for call, results in zip(calls, expected, strict=True):
            for out, result in zip(tuple_of(call()), results, strict=True):
                wrong += (bits(out) != bits(result)).any()
    return graph


def raised(call) -> Raised:
    """What a call raises, and after how many seconds."""
    begin = time.monotonic()
    try:
        call()
    except CommfuseError as error:
        return type(error).__name__, str(error), time.monotonic() - begin
    return "", "", time.monotonic() - begin


def failing(comm, call) -> dict[str, Raised]:
    """A call that fails, and what comes after it; kernels fail behind the call that starts them."""
    one = torch.ones(2, device=str(comm.device))

    def called():
        call()
        comm.check()

    return {
        "first": raised(called),
        "second": raised(lambda: ops.all_reduce(one, comm)),
        "check": raised(comm.check),
    }


def run_checks(checks, triton_dtypes, **options) -> dict[str, Found]:
    found = {}
    launch.use_gpu()
    with torch.cuda.stream(torch.cuda.Stream()):  # the default stream cannot be captured
        for check in checks:
            begin = time.monotonic()
            try:
                with communicator(**options) as comm:
                    comm._native.set_fused_rows(*FUSED)
                    found[check.__name__] = check(comm, triton_dtypes)
            except Exception:
                found[check.__name__] = [traceback.format_exc()]
            if dist.get_rank() == 0:
                print(f"{check.__name__}: {time.monotonic() - begin:.1f} s", flush=True)
    return found

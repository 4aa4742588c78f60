"""What the ranks of test_all_reduce.py run, in Triton's interpreter.

Delays are put between the steps of the kernel by replacing, in the kernel's module, the device
function that makes the step: interpreted kernels look it up there when they run.
"""

import contextlib
import dataclasses
import time

import torch
import torch.distributed as dist

from commfuse import Communicator
from commfuse.errors import CommunicatorError
from commfuse.triton_kernels import all_reduce as kernel_module
from commfuse.triton_kernels.all_reduce import all_reduce, block_size
from commfuse.triton_kernels.protocol import OK
from commfuse.triton_kernels.workspace import Layout, Workspace

MAX_BLOCKS = 2
TILES_PER_SLOT = 4  # two for every block of the largest grid
WORKSPACE_BYTES = 4 << 20
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def layout(world_size: int) -> Layout:
    """Small slots, so that small messages exceed them."""
    return Layout(world_size, 4096 * TILES_PER_SLOT, MAX_BLOCKS)


def sizes(dtype: torch.dtype) -> dict[str, int]:
    """Numbers of elements around everything that could go wrong, by name."""
    block = block_size(dtype)
    capacity = TILES_PER_SLOT * block
    return {
        "empty": 0,
        "one": 1,
        "special": 8,
        "odd": 77,
        "block-1": block - 1,
        "block": block,
        "block+1": block + 1,
        "blocks": (MAX_BLOCKS + 1) * block + 3,
        "capacity+1": capacity + 1,
        "chunks": 2 * capacity + 333,
    }


@contextlib.contextmanager
def communicator():
    """A communicator over all ranks with memory for a few workspaces."""
    with Communicator(dist.group.WORLD, workspace_bytes=WORKSPACE_BYTES) as comm:
        yield comm


def make_workspace(comm, index: int = 0, timeout: float = 30.0) -> Workspace:
    """The ``index``-th workspace of its own in the communicator's memory."""
    nbytes = layout(comm.world_size).nbytes
    start = index * nbytes
    if comm.world_size == 1:  # a group of one shares no memory
        buffers = [torch.zeros(nbytes, dtype=torch.uint8)]
    else:
        buffers = [comm.workspace(r)[start : start + nbytes] for r in range(comm.world_size)]
    return Workspace.create(comm.rank, buffers, max_blocks=MAX_BLOCKS, timeout=timeout)


@contextlib.contextmanager
def replaced(name: str, function):
    """Replaces a device function that the kernel calls."""
    original = getattr(kernel_module, name)
    setattr(kernel_module, name, function)
    try:
        yield original
    finally:
        setattr(kernel_module, name, original)


@contextlib.contextmanager
def delayed(name: str, before: float = 0.0, after: float = 0.0):
    """Sleeps before and after a step of the kernel."""
    original = getattr(kernel_module, name)

    def step(*args):
        time.sleep(before)
        result = original(*args)
        time.sleep(after)
        return result

    with replaced(name, step):
        yield


def inputs(world_size: int, kind: str, numel: int, dtype: torch.dtype, seed: int = 0):
    """Every rank's input: all ranks can make all of them."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "integers":
        made = [torch.randint(-8, 9, (numel,), generator=generator) for _ in range(world_size)]
    elif kind == "random":
        made = [torch.randn(numel, generator=generator) for _ in range(world_size)]
    else:
        tiny = torch.finfo(dtype).smallest_normal / 4  # subnormal
        inf = float("inf")
        special = torch.tensor([0.0, -0.0, tiny, -tiny, inf, -inf, float("nan"), 1.0])
        made = [special.roll(rank // 2) for rank in range(world_size)]
    return [x.to(dtype) for x in made]


def expected(xs: list[torch.Tensor]) -> torch.Tensor:
    """The sum in float32 in rank order, rounded once: what the op promises, bit for bit."""
    total = xs[0].float()
    for x in xs[1:]:
        total = total + x.float()
    return total.to(xs[0].dtype)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equality in which -0.0 differs from 0.0, and NaN equals NaN."""
    nan = a.isnan()
    bits = a.new_zeros(()).view(torch.int16 if a.itemsize == 2 else torch.int32).dtype
    return torch.equal(nan, b.isnan()) and torch.equal(a[~nan].view(bits), b[~nan].view(bits))


def correctness(cases: list[tuple[str, str]]) -> dict[tuple[str, str, str], tuple[bool, bytes]]:
    """(dtype, size, kind) -> whether the result is the expected one, and its bytes.

    Args:
        cases: (size, kind), each run with every dtype.
    """
    results = {}
    with communicator() as comm:
        workspace = make_workspace(comm)
        for dtype_name, dtype in DTYPES.items():
            for size_name, kind in cases:
                numel = sizes(dtype)[size_name]
                xs = inputs(comm.world_size, kind, numel, dtype, seed=numel)
                x = xs[comm.rank].clone()
                # In place for integers, out of place otherwise.
                out = x if kind == "integers" else torch.full_like(x, 5.0)
                all_reduce(x, out, workspace)
                data = out.view(torch.uint8).numpy().tobytes()
                results[dtype_name, size_name, kind] = (same_bits(out, expected(xs)), data)
    return results


def stragglers(calls: int) -> int:
    """Many calls of changing size (and grid); one rank at a time is slow, at one step in turn.

    Returns the number of wrong results.
    """
    steps = ["call", "describe", "signal", "wait", "finish"]
    numels = [3, 2 * block_size(torch.float32), 0, block_size(torch.float32) + 1]
    wrong = 0
    with communicator() as comm:
        workspace = make_workspace(comm)
        for call in range(calls):
            xs = inputs(
                comm.world_size, "integers", numels[call % len(numels)], torch.float32, seed=call
            )
            out = torch.empty_like(xs[0])
            slow = (call // len(steps)) % comm.world_size == comm.rank
            step = steps[call % len(steps)]
            delay = 0.02 if slow else 0.0
            if step == "call":
                time.sleep(delay)
                step = "finish"
                delay = 0.0
            with delayed(step, before=delay / 2, after=delay / 2):
                all_reduce(xs[comm.rank], out, workspace)
            wrong += not torch.equal(out, expected(xs))
    return wrong


class OneHalf(Layout):
    """A broken layout: even and odd generations share one payload half."""

    half_stride = 0


def skipped_wait(*args):
    """A broken wait: it does not."""
    return OK


def broken(case: str, calls: int = 4) -> int:
    """Number of wrong results on this rank with a protocol broken as ``case`` says.

    "sound" runs the same delays with nothing broken.
    """
    wrong = 0
    with communicator() as comm:
        index = ["sound", "one half", "skipped wait"].index(case)
        workspace = make_workspace(comm, index)
        if case == "one half":
            broken_layout = OneHalf(**dataclasses.asdict(workspace.layout))
            workspace = dataclasses.replace(workspace, layout=broken_layout)
        with contextlib.ExitStack() as stack:
            if case == "skipped wait":
                stack.enter_context(replaced("wait", skipped_wait))
            # The last rank is slow to send, and slow to read what it has received.
            if comm.rank == comm.world_size - 1:
                stack.enter_context(delayed("begin", before=0.1))
                stack.enter_context(delayed("wait", after=0.3))
            for call in range(calls):
                xs = inputs(comm.world_size, "integers", 50, torch.float32, seed=call)
                out = torch.empty_like(xs[0])
                all_reduce(xs[comm.rank], out, workspace)
                wrong += not torch.equal(out, expected(xs))
        comm.barrier()
    return wrong


def controls() -> dict[str, int]:
    """case -> number of wrong results on this rank."""
    return {case: broken(case) for case in ("sound", "one half", "skipped wait")}


def failures() -> dict[str, tuple[str, str, float]]:
    """case -> type, text and seconds of the error that this rank got."""
    results = {}
    with communicator() as comm:

        def call(case: str, x: torch.Tensor, workspace: Workspace) -> None:
            start = time.monotonic()
            try:
                all_reduce(x, torch.empty_like(x), workspace)
                results[case] = ("none", "", 0.0)
            except CommunicatorError as error:
                seconds = time.monotonic() - start
                results[case] = (type(error).__name__, str(error), seconds)

        x = torch.ones(3, 5)
        workspace = make_workspace(comm, 0, timeout=0.3)
        all_reduce(x, torch.empty_like(x), workspace)
        if comm.rank == 0:  # rank 1 never comes
            call("absent peer", x, workspace)
        comm.barrier()
        before = workspace.buffers[0].clone()
        call("after the failure", x, workspace)
        if not torch.equal(before, workspace.buffers[0]):
            results["after the failure"] = ("store", "a dead workspace was written to", 0.0)
        comm.barrier()

        # Different shapes, and with them different grids.
        shape = (2, 4) if comm.rank == 0 else (2, block_size(torch.float32))
        call("shapes", torch.ones(shape), make_workspace(comm, 1))
        comm.barrier()
        dtype = torch.float32 if comm.rank == 0 else torch.bfloat16
        call("dtypes", torch.ones(2, 4, dtype=dtype), make_workspace(comm, 2))
        comm.barrier()

        workspace = make_workspace(comm, 3, timeout=600.0)
        if comm.rank == 0:
            call("host abort", x, workspace)
        else:
            time.sleep(0.3)
            workspace.abort()
        comm.barrier()
    return results

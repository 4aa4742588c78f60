"""On every rank, with a GPU: calls that fail, and what is left afterwards."""

import time
from pathlib import Path

import torch

from commfuse import ops
from commfuse.runtime import launch
from commfuse.testing.worker import load

GPU = load(Path(__file__).with_name("gpu.py"))


def alive(device: torch.device) -> bool:
    """Whether the CUDA context still works, and a new communicator too."""
    total = torch.full((1000,), 2.0, device=device).sum().item()
    with GPU.communicator() as comm:
        out = ops.all_reduce(torch.ones(3, device=str(comm.device)), comm, "cuda")
        comm.check()
        return total == 2000 and out.tolist() == [comm.world_size] * 3


def in_place(comm, place: int):
    """Sums one of 17 tensors in the memory that the GPUs share, where they lie."""
    comm._native.set_all_reduce_thresholds(0, 0)
    tensors = [comm.empty((64,), torch.float32) for _ in range(17)]
    return ops.all_reduce_(tensors[place], comm)


def failures() -> dict[str, dict]:
    """Calls that do not belong together, a rank that leaves a call out, and a second stream."""
    device, found = launch.use_gpu(), {}
    one = torch.ones(2, 4, device=device)
    x, w = (torch.ones(rows, 8, dtype=torch.bfloat16, device=device) for rows in (2, 8))
    pairs = {
        "shapes": (lambda c: ops.all_reduce(one, c), lambda c: ops.all_reduce(one.view(4, 2), c)),
        "sizes": (lambda c: ops.all_reduce(one, c), lambda c: ops.all_reduce(one[:0], c)),
        "dtypes": (lambda c: ops.all_reduce(one, c), lambda c: ops.all_reduce(one.half(), c)),
        "ops": (
            lambda c: ops.all_reduce_rms_norm(x, None, x[0], GPU.EPS, c, "cuda"),
            lambda c: ops.matmul_all_reduce(x, w, c, backend="cuda"),
        ),
        "options": (
            lambda c: ops.matmul_all_reduce(x, w, c, backend="cuda"),
            lambda c: ops.matmul_all_reduce(x, w, c, residual=x, backend="cuda"),
        ),
        # One-shot against several calls of two-shot.
        "large": (
            lambda c: ops.all_reduce(torch.ones(3_000_000, device=device), c),
            lambda c: ops.all_reduce(torch.ones(5, device=device), c),
        ),
        "places": (lambda c: in_place(c, 0), lambda c: in_place(c, 16)),
    }
    with torch.inference_mode():
        for name, (ours, other) in pairs.items():
            with GPU.communicator() as comm:
                ops.all_reduce(one, comm)
                comm.check()
                call = other if comm.rank == comm.world_size - 1 else ours
                found[name] = GPU.failing(comm, lambda comm=comm, call=call: call(comm))
        found["alive after mismatches"] = alive(device)
        with GPU.communicator(timeout=1.0) as comm:
            ops.all_reduce(one, comm)
            comm.check()
            if comm.rank == comm.world_size - 1:
                time.sleep(2.5)
            found["absent"] = GPU.failing(comm, lambda: ops.all_reduce(x, comm))
        found["alive after time-out"] = alive(device)
        found["second stream"] = second_stream()
    return found


def second_stream() -> dict:
    """Calls on another stream while a layer is under way that is too large to be sent by lines;
    then what the first stream has computed.
    """
    with GPU.communicator() as comm:
        comm._native.set_all_reduce_thresholds(0, 0)
        comm._native.set_fused_rows(*GPU.UNFUSED)
        x, w = (
            torch.full((rows, 64), number, dtype=torch.bfloat16, device=str(comm.device))
            for rows, number in ((64, 1), (8192, 2))
        )

        def layer(x):
            return ops.matmul_all_reduce(x, w, comm, backend="cuda")

        def total(out):
            return out.float().aminmax()

        other = torch.cuda.Stream()  # made before: the first one waits for the device
        layer(x)
        torch.cuda.synchronize()
        torch.cuda._sleep(500 * GPU.MILLISECOND)
        first = layer(x)
        with torch.cuda.stream(other):
            # Either would write to the staging area, where the first product will be.
            errors = [GPU.raised(lambda: layer(-x)), GPU.raised(lambda: ops.all_reduce(w, comm))]
        torch.cuda.synchronize()
        after = layer(x)
        comm.check()
        results = [number.item() for out in (first, after) for number in total(out)]
        return {"errors": errors, "results": results}

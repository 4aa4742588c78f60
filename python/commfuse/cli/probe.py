"""What ranks see of each other: the part of ``commfuse doctor`` that several processes answer.

``python -m commfuse.cli.probe``, started as every rank of a job; rank 0 prints one JSON object.
"""

from __future__ import annotations

import json
import os
import socket
import sys


def collect() -> dict:
    """Joins the job and describes it, the same on every rank.

    Returns:
        ``ranks``: host, process and cores of each; ``transport``: of all together;
        ``transports``: by pair, ``transports[a][b]``;
        ``sums_are_right``: whether an all-reduce over that transport gave the right sum;
        ``backends``: of every op, which backend runs it on these ranks and why not the others.

    Raises:
        CommfuseError: the ranks cannot communicate.
    """
    import torch
    import torch.distributed as dist

    from commfuse import ops
    from commfuse.runtime.communicator import Communicator
    from commfuse.runtime.launch import join_job

    torch.set_num_threads(1)
    join_job()
    try:
        with Communicator(dist.group.WORLD, timeout=20.0) as comm:
            mine = {
                "rank": comm.rank,
                "host": socket.gethostname(),
                "process": os.getpid(),
                "cores": sorted(os.sched_getaffinity(0)),
            }
            world, ranks = comm.world_size, [None] * comm.world_size
            dist.all_gather_object(ranks, mine)
            total = ops.all_reduce(torch.full((64,), comm.rank + 1.0), comm)
            verdicts = [None] * world
            dist.all_gather_object(verdicts, bool((total == world * (world + 1) / 2).all()))
            pairs = [[comm.transport_between(a, b) for b in range(world)] for a in range(world)]
            return {
                "ranks": ranks,
                "transport": comm.transport,
                "transports": pairs,
                "sums_are_right": all(verdicts),
                "shared_bytes_of_a_call": comm.payload_bytes,
                "backends": explain_all(comm),
            }
    finally:
        dist.destroy_process_group()


def explain_all(comm, device: str = "cpu") -> dict[str, dict]:
    """By op: the backend that runs it in bfloat16, and every backend's reason."""
    from commfuse import ops

    found = {}
    for name in (*ops.OP_NAMES, *ops.CHANNEL_OP_NAMES):
        packed = True if "matmul" in name or name == "vocab_parallel_embedding" else None
        explanation = ops.explain(name, comm, device=device, packed=packed)
        found[name] = {"backend": explanation.backend, "reasons": explanation.reasons}
    return found


if __name__ == "__main__":
    from commfuse.errors import CommfuseError

    try:
        result = collect()
    except CommfuseError as error:
        sys.exit(str(error))
    if os.environ["RANK"] == "0":
        print(json.dumps(result))

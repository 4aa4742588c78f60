"""Commands that run on several ranks: this process starts them, unless it is one of them."""

from __future__ import annotations

import os
import sys

from commfuse.errors import UsageError
from commfuse.runtime import launch


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0))


def started_ranks() -> int | None:
    """How many ranks a launcher (ours or torchrun) has started, if this process is one of them."""
    return int(os.environ["WORLD_SIZE"]) if launch.started_by_launcher() else None


def agree_on_tp(tp: int | None) -> int:
    """The tensor parallelism: what was asked for, else the ranks that were started, else 1.

    Raises:
        UsageError: they contradict each other.
    """
    started = started_ranks()
    if tp is not None and tp < 1:
        raise UsageError(f"--tp {tp}: at least 1")
    if tp is not None and started is not None and tp != started:
        raise UsageError(f"--tp {tp}, but the launcher has started {started} ranks")
    return tp or started or 1


def run_again_as_ranks(world_size: int) -> int:
    """Runs this very command on ranks of its own; the exit status of the whole.

    Rank 0 has this process's output streams. What the others say is shown where rank 0 has not
    said the same: when the job failed for another reason than its input.
    """
    results = launch.run_ranks(launch.own_command(*sys.argv[1:]), world_size, stream=True)
    failed = [result for result in results if result.status]
    if not failed:
        return 0
    if all(result.status == 2 for result in failed):
        if results[0].status == 0:
            sys.stderr.write(failed[0].stderr)
        return 2
    for result in failed:
        if result.status < 0:
            print(f"[rank {result.rank}] ended by signal {-result.status}", file=sys.stderr)
        for line in result.stderr.splitlines():
            print(f"[rank {result.rank}] {line}", file=sys.stderr)
    return 1

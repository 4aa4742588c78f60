"""Commands that run on several ranks: this process starts them, unless it is one of them."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING

from commfuse.errors import BackendUnavailable, UsageError
from commfuse.runtime import launch

if TYPE_CHECKING:
    from commfuse.testing import GpuLab


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0))


def started_ranks() -> int | None:
    """How many ranks a launcher (ours or torchrun) has started, if this process is one of them."""
    return int(os.environ["WORLD_SIZE"]) if launch.started_by_launcher() else None


def agree_on_mesh(tp: int | None, pp: int | None) -> tuple[int, int]:
    """(tensor, pipeline parallelism): what was asked for; tp else what the started ranks leave.

    Raises:
        UsageError: they contradict each other.
    """
    started = started_ranks()
    for name, size in (("tp", tp), ("pp", pp)):
        if size is not None and size < 1:
            raise UsageError(f"--{name} {size}: at least 1")
    stages = pp or 1
    ranks = tp or max(1, (started or 1) // stages)
    if started is not None and ranks * stages != started:
        asked = f"--tp {ranks} --pp {stages} needs {ranks * stages} ranks"
        raise UsageError(f"{asked}, but the launcher has started {started} ranks")
    return ranks, stages


def rank_counts(ranks: str | None, started: int | None) -> list[int]:
    """The numbers of ranks to measure: those asked for, or the one that a launcher has started.

    Args:
        ranks: as given: a number, or several, as in ``2,4,8``; None: 2.
        started: by a launcher, which chose one of them; None: this process starts them.

    Raises:
        UsageError: not positive numbers, or not the one that was started.

    Example:
        >>> rank_counts("2,4", None), rank_counts("2,4", 4)
        ([2, 4], [4])
    """
    try:
        counts = [int(part) for part in (ranks or str(started or 2)).split(",")]
    except ValueError:
        raise UsageError(f"--ranks {ranks}: a number, or several, as in 2,4,8") from None
    if min(counts) < 1:
        raise UsageError(f"--ranks {ranks}: at least 1")
    if started is not None and started not in counts:
        raise UsageError(f"--ranks {ranks}, but the launcher has started {started} ranks")
    return counts if started is None else [started]


def gpu_lab(device: str) -> GpuLab | contextlib.nullcontext:
    """The GPUs that ranks run on, to be entered; nothing for the CPU.

    Raises:
        UsageError: there is no GPU.
    """
    if device == "cpu":
        return contextlib.nullcontext()
    from commfuse.testing import GpuLab

    try:
        return GpuLab()
    except BackendUnavailable as error:
        raise UsageError(f"--device {device}: {error}") from None


def run_again_as_ranks(world_size: int, environment: dict[str, str] | None = None) -> int:
    """Runs this very command on ranks of its own; the exit status of the whole.

    Args:
        world_size: how many.
        environment: added to theirs.

    Rank 0 has this process's output streams. What the others say is shown where rank 0 has not
    said the same: when the job failed for another reason than its input.
    """
    command = launch.own_command(*sys.argv[1:])
    results = launch.run_ranks(command, world_size, environment=environment, stream=True)
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

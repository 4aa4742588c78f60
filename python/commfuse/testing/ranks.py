"""Runs a function on several ranks, each a fresh process, and brings their results back.

Importing torch takes a process longer than most tests. So the ranks are forked from a server, which
has imported it and done nothing else: no thread, no kernel, no GPU has been touched there.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from commfuse.runtime import launch
from commfuse.testing import worker
from commfuse.testing.gpu_lab import GpuLab

# Not what depends on a rank's environment when it is imported: triton on TRITON_INTERPRET.
_PRELOADED = ["torch", "torch.distributed", "commfuse.generation", "commfuse.testing.worker"]


class RanksFailed(AssertionError):
    """A rank ended with an error or was still running at the deadline.

    Attributes:
        results: every rank's :class:`~commfuse.runtime.launch.RankResult`.
    """

    def __init__(self, target: str, results: list[launch.RankResult]):
        self.results = results
        lines = [f"{target} failed"]
        for result in results:
            lines.append(f"--- rank {result.rank}: {_ended(result.status)}")
            lines.append((result.stdout[-2000:] + result.stderr[-4000:]).rstrip())
        super().__init__("\n".join(lines))


def _ended(status: int) -> str:
    if status == -9:
        return "killed (at the deadline, after another rank's failure, or by the test)"
    return f"exit status {status}" if status >= 0 else f"ended by signal {-status}"


def run_ranks(
    target: str,
    world_size: int,
    args: Sequence[Any] = (),
    *,
    timeout: float = 60.0,
    env: dict[str, str] | None = None,
    check: bool = True,
    lab: GpuLab | None = None,
) -> list[Any]:
    """Calls ``function(*args)`` on ranks 0..world_size-1 with torch.distributed (gloo) initialised.

    Args:
        target: ``"path/to/file.py:function"``; the file is loaded by its path.
        world_size: how many ranks.
        args: picklable positional arguments, the same for every rank.
        timeout: seconds after which all ranks are killed.
        env: environment variables to add.
        check: raise where a rank fails; otherwise its result is its RankResult.
        lab: the GPUs that the ranks run on; they call :func:`~commfuse.runtime.launch.use_gpu`.

    Returns:
        Every rank's return value, in rank order.

    Raises:
        RanksFailed: a rank failed; the message has every rank's output.

    Example:
        >>> run_ranks("tests/workers/sums.py:sum_of_ranks", 2)
        [1, 1]
    """
    env = {**(lab.environment(world_size) if lab else {}), **(env or {})}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    processes: list[Any] = []
    with (
        tempfile.TemporaryDirectory(prefix="commfuse-test-") as folder,
        launch.job_environments(world_size, env) as environments,
    ):
        Path(folder, "arguments").write_bytes(pickle.dumps(tuple(args)))
        try:
            for environment in environments:
                rank = context.Process(
                    target=worker.main, args=(target, folder, os.environ | environment)
                )
                rank.start()
                processes.append(rank)
            launch.wait_for_ranks(
                [partial(getattr, rank, "exitcode") for rank in processes], timeout
            )
        finally:
            for rank in processes:
                rank.kill()
                rank.join()
        results = [
            launch.RankResult(
                index, rank.exitcode, *(_written(folder, index, kind) for kind in ("out", "err"))
            )
            for index, rank in enumerate(processes)
        ]
        if check and any(result.status for result in results):
            raise RanksFailed(target, results)
        return [
            result if result.status else pickle.loads(Path(folder, str(result.rank)).read_bytes())
            for result in results
        ]


def _written(folder: str, rank: int, kind: str) -> str:
    """What a rank wrote to its standard output or error."""
    path = Path(folder, f"{rank}.{kind}")
    return path.read_text(errors="replace") if path.exists() else ""

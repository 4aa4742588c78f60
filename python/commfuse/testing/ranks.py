"""Runs a function on several ranks, each a fresh process, and brings their results back."""

from __future__ import annotations

import pickle
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from commfuse.runtime import launch
from commfuse.testing.gpu_lab import GpuLab


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
    with tempfile.TemporaryDirectory(prefix="commfuse-test-") as folder:
        arguments = Path(folder, "arguments")
        arguments.write_bytes(pickle.dumps(tuple(args)))
        command = [sys.executable, "-m", "commfuse.testing.worker", target, folder]
        results = launch.run_ranks(command, world_size, timeout=timeout, environment=env)
        if check and any(result.status for result in results):
            raise RanksFailed(target, results)
        return [
            result if result.status else pickle.loads(Path(folder, str(result.rank)).read_bytes())
            for result in results
        ]

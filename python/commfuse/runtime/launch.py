"""Starts the ranks of a job on this host as processes of their own, and reaps them all.

Every rank gets torchrun's environment (RANK, WORLD_SIZE, …), so that a program need not know who
started it; only the rendezvous differs: a file that lives in this process's memory, so that no
port and no path is left behind, whatever happens.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from commfuse.errors import BackendUnavailable

if TYPE_CHECKING:
    import torch

RENDEZVOUS = "COMMFUSE_RENDEZVOUS"
PARENT = "COMMFUSE_PARENT"
# torch's own: with "1" its symmetric memory serves ranks that share a GPU.
ALLOW_OVERLAPPING = "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"
# After a rank has failed, the others get as long to notice and say so: a dead peer is noticed at
# once, a process that hangs is not waited for.
GRACE_SECONDS = 12.0


@dataclass(frozen=True)
class RankResult:
    """How a rank ended: its exit status (negative: the signal that killed it) and its output."""

    rank: int
    status: int
    stdout: str
    stderr: str


def started_by_launcher() -> bool:
    """Whether this process is a rank, of ours or of torchrun."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def join_job() -> None:
    """Initialises torch.distributed (gloo) in a rank, of ours or of torchrun.

    A rank of ours also ends when the process that started it ends.
    """
    import torch.distributed as dist

    if PARENT in os.environ:
        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() != int(os.environ[PARENT]):
            os._exit(1)  # it ended before the call above
    if RENDEZVOUS in os.environ:
        dist.init_process_group(
            "gloo",
            init_method=os.environ[RENDEZVOUS],
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
        )
    else:
        dist.init_process_group("gloo")


def use_gpu() -> torch.device:
    """The ``torch.device`` of this rank, made the current one; ranks are dealt out to GPUs in turn.

    Raises:
        BackendUnavailable: torch finds no GPU.

    Example:
        >>> comm = Communicator(dist.group.WORLD, device=use_gpu())
    """
    import torch

    if not torch.cuda.is_available():
        raise BackendUnavailable("torch finds no GPU")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def run_ranks(
    command: Sequence[str],
    world_size: int,
    *,
    timeout: float | None = None,
    environment: dict[str, str] | None = None,
    stream: bool = False,
) -> list[RankResult]:
    """Runs ``command`` as ranks 0..world_size-1 and returns when every one of them has ended.

    Args:
        command: the program and its arguments; every rank runs the same.
        world_size: how many.
        timeout: seconds after which all are killed; None: no limit.
        environment: added to this process's.
        stream: rank 0 writes to this process's own output streams instead of the result.

    When a rank fails, the others have ``GRACE_SECONDS`` to end by themselves. An exception here
    (Ctrl-C included) kills all.

    Example:
        >>> [r.status for r in run_ranks([sys.executable, "-c", "pass"], 2)]
        [0, 0]
    """
    processes: list[subprocess.Popen] = []
    outputs: list[list[bytes]] = []
    readers: list[threading.Thread] = []
    with job_environments(world_size, environment) as environments:
        try:
            for rank, env in enumerate(environments):
                pipe = None if stream and rank == 0 else subprocess.PIPE
                process = subprocess.Popen(
                    command,
                    env=os.environ | env,
                    stdin=subprocess.DEVNULL,
                    stdout=pipe,
                    stderr=pipe,
                )
                processes.append(process)
                outputs.append([b"", b""])
                for index, source in enumerate((process.stdout, process.stderr)):
                    if source is not None:
                        readers.append(
                            threading.Thread(target=_drain, args=(source, outputs[rank], index))
                        )
                        readers[-1].start()
            wait_for_ranks([process.poll for process in processes], timeout)
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                process.wait()
            for reader in readers:
                reader.join()
    return [
        RankResult(rank, process.returncode, *(text.decode(errors="replace") for text in output))
        for rank, (process, output) in enumerate(zip(processes, outputs, strict=True))
    ]


@contextmanager
def job_environments(
    world_size: int, environment: dict[str, str] | None = None
) -> Iterator[list[dict[str, str]]]:
    """What each rank of a new job needs in its environment, besides what this process has.

    The ranks meet while the context is open.
    """
    store = os.memfd_create("commfuse-rendezvous")
    try:
        yield [
            {
                "GLOO_SOCKET_IFNAME": "lo",
                **(environment or {}),
                RENDEZVOUS: f"file:///proc/{os.getpid()}/fd/{store}",
                PARENT: str(os.getpid()),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "LOCAL_WORLD_SIZE": str(world_size),
            }
            for rank in range(world_size)
        ]
    finally:
        os.close(store)


def _drain(source, output: list[bytes], index: int) -> None:
    with source:
        output[index] = source.read()


def wait_for_ranks(statuses: Sequence[Callable[[], int | None]], timeout: float | None) -> None:
    """Returns once every rank has ended, or at the deadline, or ``GRACE_SECONDS`` after a failure.

    Args:
        statuses: of each rank, what says its exit status, or None while it runs.
        timeout: seconds; None: no limit.
    """
    deadline = time.monotonic() + timeout if timeout is not None else float("inf")
    while any(status() is None for status in statuses):
        if time.monotonic() > deadline:
            return
        if any(status() for status in statuses):
            deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        time.sleep(0.01)


def own_command(*arguments: str) -> list[str]:
    """``python -m commfuse`` with these arguments, by this very interpreter."""
    return [sys.executable, "-m", "commfuse", *arguments]

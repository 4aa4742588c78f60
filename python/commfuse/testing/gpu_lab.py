"""Several ranks on one GPU, or one rank on each: what they need is set up here, and taken down.

Ranks that share a GPU run at the same time only under NVIDIA's Multi-Process Service; without it
their kernels take turns, and a barrier costs milliseconds. Each rank gets an equal share of the
multiprocessors: kernels of all ranks then fit on the GPU together, which ranks that wait for each
other inside a kernel cannot do without.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from commfuse.errors import BackendUnavailable, UsageError
from commfuse.runtime.launch import ALLOW_OVERLAPPING

CONTROL = "nvidia-cuda-mps-control"
# Per cent of the multiprocessors for each rank; else what division gives. A share is a number of
# multiprocessors, not a choice of them: where all shares together are nearly the whole GPU, a block
# of one rank waits for another rank's to leave. A GEMM and an all-reduce, W = 4, K = 2048, 64 rows,
# took 84 us with 25% on an H100 and 65 with 21%; W = 2, K = 14336, 207 with 50% and 180 with 48%.
_SHARES = {2: 48, 4: 21}

# Keeps the daemon as long as its standard input is open, and that closes when the process that
# holds the lab ends, however it ends. Nothing else removes a daemon after a SIGKILL.
_KEEPER = f"""
cd "$COMMFUSE_LAB"
timeout 30 {CONTROL} -d > start 2>&1 < /dev/null || {{ cat start; exit; }}
echo started
read -r _
pid=$(cat "$CUDA_MPS_PIPE_DIRECTORY/{CONTROL}.pid")
echo quit -t 5 | timeout 20 {CONTROL} > quit 2>&1
for _ in $(seq 100); do kill -0 "$pid" 2> /dev/null || break; sleep 0.1; done
kill -9 "$pid" 2> /dev/null
cd /
rm -rf "$COMMFUSE_LAB"
"""


def gpu_count() -> int:
    """GPUs that this process can use; creates no context on them."""
    import torch

    return torch.cuda.device_count() if torch.version.cuda else 0


def ranks_per_gpu(world_size: int, gpus: int) -> int:
    """How many of the ranks share the fullest GPU."""
    return -(-world_size // gpus)


def rank_environment(
    world_size: int, gpus: int, folder: Path | None, visible: str | None = None
) -> dict[str, str]:
    """The environment variables of every rank of a job; no CUDA call is needed to compose them.

    Args:
        world_size: ranks of the job.
        gpus: GPUs that they are dealt out to, in turn.
        folder: of the daemon; needed where ranks share a GPU.
        visible: CUDA_VISIBLE_DEVICES of the daemon, if that was set: a client counts among the
            GPUs that the daemon shows.

    Raises:
        UsageError: more than 100 ranks on a GPU: none would have a hundredth of it.

    Example:
        >>> rank_environment(4, 1, Path("/tmp/lab"))["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"]
        '21'
    """
    sharing = ranks_per_gpu(world_size, gpus)
    if sharing == 1:
        return {}
    if sharing > 100:
        raise UsageError(f"{sharing} ranks cannot share a GPU: at most 100")
    environment = {
        "CUDA_MPS_PIPE_DIRECTORY": str(folder / "pipe"),
        "CUDA_MPS_LOG_DIRECTORY": str(folder / "log"),
        "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": str(_SHARES.get(sharing, 100 // sharing)),
        ALLOW_OVERLAPPING: "1",
        # The GPU's multicast (NVLS) joins GPUs, not processes on one of them.
        "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
        "NCCL_NVLS_ENABLE": "0",
    }
    if visible is not None:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(gpus)))
    return environment


class GpuLab:
    """A place for jobs of several ranks on this machine's GPUs; serves any number of jobs in turn.

    With a GPU for every rank there is nothing to set up. Otherwise the first job that needs it
    starts an MPS daemon with folders of its own (seconds), which later jobs share, whatever their
    number of ranks. Leaving the ``with`` statement stops it; so does the end of this process,
    SIGKILL included.

    Raises:
        BackendUnavailable: there is no GPU here; :meth:`environment`: ranks must share one, and MPS
            is missing or does not start.

    Example:
        >>> with GpuLab() as lab:
        ...     for world_size in (2, 4):
        ...         run_ranks("tests/workers/gpu_verify.py:run", world_size, lab=lab)
    """

    def __init__(self):
        self.gpus = gpu_count()
        if not self.gpus:
            raise BackendUnavailable("there is no GPU here: torch finds none")
        self._keeper: subprocess.Popen | None = None
        self._folder: Path | None = None

    def environment(self, world_size: int) -> dict[str, str]:
        """What the ranks of a job need in their environment; starts MPS where they share a GPU."""
        if ranks_per_gpu(world_size, self.gpus) > 1 and self._keeper is None:
            self._start()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        return rank_environment(world_size, self.gpus, self._folder, visible)

    def _start(self) -> None:
        if shutil.which(CONTROL) is None:
            raise BackendUnavailable(
                f"ranks that share a GPU need NVIDIA's Multi-Process Service, and {CONTROL} is not "
                "on PATH; it comes with the driver (Debian, Ubuntu: nvidia-compute-utils-…)"
            )
        self._folder = Path(tempfile.mkdtemp(prefix="commfuse-mps-"))
        pipe, log = self._folder / "pipe", self._folder / "log"
        pipe.mkdir()
        log.mkdir()
        # A session of its own: Ctrl-C reaches this process alone, which then closes the input.
        self._keeper = subprocess.Popen(
            ["sh", "-c", _KEEPER],
            env={
                **os.environ,
                "CUDA_MPS_PIPE_DIRECTORY": str(pipe),
                "CUDA_MPS_LOG_DIRECTORY": str(log),
                "COMMFUSE_LAB": str(self._folder),
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        said = self._keeper.stdout.readline()
        if said.strip() != "started":
            said += self._keeper.stdout.read()
            logs = "".join(path.read_text() for path in sorted(log.glob("*.log")))
            self.close()
            raise BackendUnavailable(f"{CONTROL} does not start: {(said + logs).strip()}")

    def close(self) -> None:
        """Stops the daemon, if there is one, and removes its folders."""
        if self._keeper is not None:
            self._keeper.stdin.close()
            self._keeper.wait()
            self._keeper.stdout.close()
            self._keeper = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def __enter__(self) -> GpuLab:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

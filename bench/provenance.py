"""Where and with what a row was measured."""

from __future__ import annotations

import datetime
import functools
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist

import commfuse
from commfuse import _extension
from commfuse.runtime.communicator import Communicator
from commfuse.runtime.symmetric import device_identity


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


@functools.cache
def git_commit() -> str | None:
    """The commit of the clone this package runs from, with ``+changes`` if files differ from it."""
    clone = Path(commfuse.__file__).resolve().parents[2]
    if not (clone / ".git").exists():
        return None

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", clone, *arguments], capture_output=True, text=True)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no")
    return f"{commit}+changes" if commit and changed else commit


def cpu_model() -> str:
    """The processor's name, as the kernel reports it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def last_level_cache_bytes() -> int:
    """The size of the largest cache of the first processor; 0 where the kernel does not say."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        factor = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 0)
        sizes.append(int(text[:-1]) * factor)
    return max(sizes)


@functools.cache
def gpu_driver() -> str | None:
    """The version of NVIDIA's driver, as nvidia-smi says it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 else None


def setting(ranks: int, gpus: int) -> str:
    """How ranks were spread over GPUs, as it must stand beside every figure.

    Example:
        >>> setting(4, 1)
        'one GPU, 4 ranks'
    """
    if ranks == gpus:
        return "one GPU a rank"
    return f"{'one GPU' if gpus == 1 else f'{gpus} GPUs'}, {ranks} ranks"


@functools.cache
def gpu_provenance(comm: Communicator) -> dict[str, object]:
    """The GPUs of a communicator and what drives them; all ranks must ask."""
    places: list[str | None] = [None] * comm.world_size
    if comm.world_size > 1:
        dist.all_gather_object(places, device_identity(comm.device)[0], group=comm.group)
    gpus, properties = len(set(places)), torch.cuda.get_device_properties(comm.device)
    return {
        "gpus": gpus,
        "gpu": properties.name,
        "setting": setting(comm.world_size, gpus),
        # Of the rank's share, where ranks share a GPU.
        "multiprocessors_per_rank": properties.multi_processor_count,
        "driver": gpu_driver(),
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if dist.is_nccl_available() else None,
    }


def provenance() -> dict[str, object]:
    """Versions, machine and date, as they stand at the end of every row.

    Example:
        >>> provenance()["cores"]
        2
    """
    now = datetime.datetime.now(datetime.timezone.utc)
    return {
        "date_utc": now.isoformat(timespec="seconds"),
        "commfuse": commfuse.__version__,
        "git_commit": git_commit(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "vllm": _version("vllm"),
        "flashinfer": _version("flashinfer-python"),
        "python": platform.python_version(),
        "cpu_model": cpu_model(),
        "cpu_isa": _extension.module.cpu_isa() if _extension.module is not None else None,
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "load_average_1min": os.getloadavg()[0],
    }

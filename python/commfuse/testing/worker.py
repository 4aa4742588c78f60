"""One rank of :func:`commfuse.testing.run_ranks`."""

from __future__ import annotations

import importlib.util
import os
import pickle
import sys
from multiprocessing import forkserver
from pathlib import Path
from types import ModuleType

import torch
import torch.distributed as dist

from commfuse.runtime import launch
from commfuse.testing.interpreter import patch_language_once


def load(path: Path) -> ModuleType:
    """A module from its file, which need not be in a package.

    Example:
        >>> GPU = load(Path(__file__).with_name("gpu.py"))
    """
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(target: str, folder: str, environment: dict[str, str]) -> None:
    """Loads the target by its path, calls it, and leaves its result and output in the folder."""
    # The server ends once nobody holds this any more, and this process with it: see join_job.
    os.close(forkserver._forkserver._forkserver_alive_fd)
    os.environ.clear()
    os.environ.update(environment)
    # The server that this process was forked from, not the process that asked for it.
    os.environ[launch.PARENT] = str(os.getppid())
    for stream, kind in ((sys.stdout, "out"), (sys.stderr, "err")):
        stream.flush()
        file = os.open(Path(folder, f"{os.environ['RANK']}.{kind}"), os.O_WRONLY | os.O_CREAT)
        os.dup2(file, stream.fileno())
        os.close(file)
    path, _, name = target.rpartition(":")
    torch.set_num_threads(1)
    if os.environ.get("TRITON_INTERPRET") == "1":
        patch_language_once()
    launch.join_job()
    module = load(Path(path))
    args = pickle.loads(Path(folder, "arguments").read_bytes())
    result = getattr(module, name)(*args)
    Path(folder, os.environ["RANK"]).write_bytes(pickle.dumps(result))
    dist.destroy_process_group()
